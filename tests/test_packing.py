"""Index packing against the published format's vectors and a bit-by-bit NumPy reader."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vptq_jax.packing import pack_indices, packed_words, unpack_indices

GOLDEN = np.load(Path(__file__).parent / "golden" / "packing.npz")
CASES = sorted(key.removesuffix("/packed") for key in GOLDEN.files if key.endswith("/packed"))


def _case(case: str):
    index_bits, res_bits = (int(part[1:]) for part in case.split("_")[:2])
    residual = GOLDEN[f"{case}/res_indices"] if res_bits else None
    return index_bits, res_bits, GOLDEN[f"{case}/packed"], GOLDEN[f"{case}/indices"], residual


def _read_bits(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    stream = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little")[..., : count * bits]
    weights = 1 << np.arange(bits, dtype=np.uint64)
    return (stream.reshape(*stream.shape[:-1], count, bits) * weights).sum(-1)


@pytest.mark.parametrize("case", CASES)
def test_golden_vectors(case):
    index_bits, res_bits, packed, main, residual = _case(case)
    ours = pack_indices(jnp.asarray(main), None if residual is None else jnp.asarray(residual), index_bits, res_bits)
    np.testing.assert_array_equal(np.asarray(ours).view(np.int32), packed)
    back, res_back = unpack_indices(jnp.asarray(packed.view(np.uint32)), main.shape[-1], index_bits, res_bits)
    np.testing.assert_array_equal(back, main)
    if residual is not None:
        np.testing.assert_array_equal(res_back, residual)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 16), st.integers(0, 16), st.integers(1, 40), st.integers(0, 2**31))
def test_random_widths_and_counts(index_bits, res_bits, count, seed):
    rng = np.random.default_rng(seed)
    main = rng.integers(0, 1 << index_bits, (2, 3, count))
    residual = rng.integers(0, 1 << res_bits, (2, 3, count)) if res_bits else None
    packed = np.asarray(
        pack_indices(jnp.asarray(main), None if residual is None else jnp.asarray(residual), index_bits, res_bits)
    )
    assert packed.dtype == np.uint32
    assert packed.shape == (2, 3, packed_words(count, index_bits + res_bits))
    entries = main | (residual << index_bits if residual is not None else 0)
    np.testing.assert_array_equal(_read_bits(packed, count, index_bits + res_bits), entries)
    back, res_back = unpack_indices(jnp.asarray(packed), count, index_bits, res_bits)
    np.testing.assert_array_equal(back, main)
    assert (res_back is None) == (residual is None)
    if residual is not None:
        np.testing.assert_array_equal(res_back, residual)


def test_works_under_jit_and_vmap():
    main = jnp.arange(24, dtype=jnp.uint32).reshape(2, 12)
    packed = jax.jit(jax.vmap(lambda row: pack_indices(row, None, 5)))(main)
    np.testing.assert_array_equal(packed, pack_indices(main, None, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_indices(jnp.zeros((1, 4), jnp.uint32), None, 17), "index bits 17"),
        (lambda: pack_indices(jnp.zeros((1, 4), jnp.uint32), None, 8, 8), "residual indices are missing"),
        (lambda: unpack_indices(jnp.zeros((1, 3), jnp.uint32), 4, 8), "3 words a row; 4 entries of 8 bits take 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
