"""Index bits in, 32-bit words out, and back.

A row of entries is one bit stream, least significant bit first: entry j takes stream bits
j*bits ... (j+1)*bits - 1, and stream bit t is bit t % 32 of word t // 32. An entry is
`main | residual << index_bits`. Entries cross word borders; the last word is padded with zero
bits. This is the order of the published VPTQ checkpoints.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt


def packed_words(count: int, bits: int) -> int:
    """32-bit words that `count` entries of `bits` bits take."""
    return -(-count * bits // 32)


def _positions(count: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    start = np.arange(count, dtype=np.int64) * bits
    return start // 32, (start % 32).astype(np.uint32)


def _check_bits(index_bits: int, res_bits: int) -> int:
    if not (0 < index_bits <= 16 and 0 <= res_bits <= 16):
        raise ValueError(f"index bits {index_bits} and residual bits {res_bits}; expected 1 to 16 and 0 to 16")
    return index_bits + res_bits


def pack_indices(
    main: Integer[Array, "*rows n"], residual: Integer[Array, "*rows n"] | None, index_bits: int, res_bits: int = 0
) -> UInt[Array, "*rows words"]:
    """Packs indices into uint32 words.

    Args:
        main: indices [..., n], any integer dtype, each below 2**index_bits.
        residual: residual indices [..., n] below 2**res_bits, or None when res_bits is 0.
        index_bits: 1 to 16.
        res_bits: 0 to 16.

    Returns:
        uint32 [..., ceil(n * (index_bits + res_bits) / 32)].
    """
    bits = _check_bits(index_bits, res_bits)
    if (residual is None) != (res_bits == 0):
        found = "missing" if residual is None else "given"
        raise ValueError(f"residual indices are {found} but res_bits is {res_bits}")
    entries = main.astype(jnp.uint32)
    if residual is not None:
        entries = entries | (residual.astype(jnp.uint32) << index_bits)
    count = entries.shape[-1]
    word, offset = _positions(count, bits)
    words = packed_words(count, bits)
    # Entries touch disjoint bits, so adding is or-ing. One spare word takes the last spill.
    packed = jnp.zeros((*entries.shape[:-1], words + 1), jnp.uint32)
    packed = packed.at[..., word].add(entries << offset)
    spill = offset + bits > 32
    if spill.any():
        packed = packed.at[..., word[spill] + 1].add(entries[..., spill] >> (32 - offset[spill]))
    return packed[..., :words]


def unpack_indices(
    packed: UInt[Array, "*rows words"], count: int, index_bits: int, res_bits: int = 0
) -> tuple[UInt[Array, "*rows n"], UInt[Array, "*rows n"] | None]:
    """Inverse of `pack_indices`: (main, residual or None), both uint32 [..., count].

    Example:
        >>> packed = pack_indices(jnp.array([3, 1, 2, 0]), None, index_bits=2)
        >>> bin(packed[0])
        '0b100111'
        >>> unpack_indices(packed, count=4, index_bits=2)[0].tolist()
        [3, 1, 2, 0]
    """
    bits = _check_bits(index_bits, res_bits)
    if packed.shape[-1] != packed_words(count, bits):
        raise ValueError(
            f"packed indices have {packed.shape[-1]} words a row; {count} entries of {bits} bits "
            f"take {packed_words(count, bits)}"
        )
    # Where entries begin repeats: slices of every period-th entry are faster than a gather of words.
    period, words = 32 // math.gcd(bits, 32), bits // math.gcd(bits, 32)
    packed = packed.astype(jnp.uint32)
    packed = jnp.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, -packed.shape[-1] % words)])
    packed = packed.reshape(*packed.shape[:-1], -1, words)

    def each(index: int) -> Array:
        word, offset = divmod(index * bits, 32)
        entry = packed[..., word] >> np.uint32(offset)
        return entry if offset + bits <= 32 else entry | (packed[..., word + 1] << np.uint32(32 - offset))

    entries = jnp.stack([each(index) for index in range(period)], axis=-1)
    entries = entries.reshape(*entries.shape[:-2], -1)[..., :count]
    main = entries & np.uint32((1 << index_bits) - 1)
    if not res_bits:
        return main, None
    return main, (entries >> index_bits) & np.uint32((1 << res_bits) - 1)
