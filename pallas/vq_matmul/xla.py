"""The portable implementation: x is permuted and scaled once, and the weight is decoded piece by piece.

    y = sum_c (x * scale)[perm[c]] * Wp[:, c] + sum_q x[q] * offset[q]

so that the offset costs one pass over x instead of one over the weight, columns need no scatter, and on a CPU no more
than a block of decoded vectors exists at a time.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from vptq_jax.array import VQArray
from vptq_jax.packing import unpack_indices

_BLOCK = 1 << 19  # weights that a CPU decodes at a time: 2 MB, what a core's cache holds
_FEW = 4  # rows for which a GPU gathers inside the reduction; with more it decodes first and multiplies


def vq_matmul(x: Float[Array, "*batch in"], weight: VQArray, *, out_dtype: Any = None) -> Float[Array, "*batch out"]:
    """`x @ weight.dequantize().T`, accumulated in float32, differentiable in x, codebooks, scale and offset.

    Args:
        x: activations [..., in_features].
        weight: the quantized weight.
        out_dtype: of the result; None takes that of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not rows.size:
        return jnp.zeros((*x.shape[:-1], weight.layout.out_features), out_dtype or x.dtype)
    y = _product(rows, weight)
    return y.astype(out_dtype or x.dtype).reshape(*x.shape[:-1], weight.layout.out_features)


@jax.checkpoint  # Saving the packed weight instead of the decoded one for the backward pass.
def _product(x: Float[Array, "rows in"], weight: VQArray) -> Float[Array, "rows out"]:
    # Without the barrier XLA moves the decoding of every weight out of a loop around it (decode), and keeps them all.
    x, weight = jax.lax.optimization_barrier((x, weight))
    size = weight.layout.outlier_size
    scale = jnp.ones(x.shape[1]) if weight.scale is None else weight.scale.astype(jnp.float32)
    columns = x
    if weight.perm is not None:
        columns, scale = x[:, weight.perm], scale[weight.perm]
    y = jax.lax.platform_dependent(columns[:, size:], scale[size:], weight, cpu=_by_blocks, default=_at_once)
    if size:
        y = y + _outliers(columns[:, :size] * scale[:size], weight)
    if weight.offset is None:
        return y
    return y + (x.astype(jnp.float32) @ weight.offset.astype(jnp.float32))[:, None]


def _by_blocks(
    x: Float[Array, "rows columns"], scale: Float[Array, " columns"], weight: VQArray
) -> Float[Array, "rows out"]:
    """Blocks of vectors one after the other, each decoded and multiplied while it lies in the cache."""
    layout = weight.layout
    size = max(1, min(layout.num_vectors, _BLOCK // (layout.vector_len * x.shape[1])))
    count = -(-layout.num_vectors // size)
    words = jnp.pad(weight.indices, ((0, 0), (0, count * size - layout.num_vectors), (0, 0)))
    words = words.reshape(layout.num_groups, count, size, -1).swapaxes(0, 1)
    x = (x * scale).reshape(len(x), layout.num_groups, layout.group_size)

    @jax.checkpoint
    def block(words: UInt[Array, "G size words"]) -> Float[Array, "rows size v"]:
        vectors = _decode(words, weight)
        return jnp.einsum("rgc,gncv->rnv", x, vectors, preferred_element_type=jnp.float32)

    y = jax.lax.map(block, words) if count > 1 else block(words[0])[None]
    return y.swapaxes(0, 1).reshape(len(x), count * size * layout.vector_len)[:, : layout.out_features]


def _at_once(
    x: Float[Array, "rows columns"], scale: Float[Array, " columns"], weight: VQArray
) -> Float[Array, "rows out"]:
    """Few rows: one component of the centroids at a time, which XLA fuses with the sum; more: decode, then multiply."""
    layout = weight.layout
    if len(x) > _FEW:  # x stays as it is, so that only the weight is rounded
        scale = scale.reshape(layout.num_groups, 1, layout.group_size, 1)
        vectors = (_decode(weight.indices, weight) * scale).astype(x.dtype)
        x = x.reshape(len(x), layout.num_groups, layout.group_size)
        y = jnp.einsum("rgc,gncv->rnv", x, vectors, preferred_element_type=jnp.float32)
        return y.reshape(len(x), layout.num_vectors * layout.vector_len)[:, : layout.out_features]
    x = (x * scale).reshape(len(x), layout.num_groups, layout.group_size)
    main, residual = unpack_indices(weight.indices, layout.group_size, layout.index_bits, layout.res_index_bits)

    def component(d: int) -> Float[Array, "rows n"]:
        values = _take(weight.codebook[..., d], main)
        if residual is not None and weight.res_codebook is not None:
            values = values + _take(weight.res_codebook[..., d], residual)
        return jnp.stack([jnp.sum(values * row[:, None], axis=(0, 2)) for row in x])

    y = jnp.stack([component(d) for d in range(layout.vector_len)], axis=-1)
    return y.reshape(len(x), -1)[:, : layout.out_features]


def _decode(words: UInt[Array, "G n words"], weight: VQArray) -> Float[Array, "G n c v"]:
    """The vectors of some packed rows, before scale and offset; float32."""
    layout = weight.layout
    main, residual = unpack_indices(words, layout.group_size, layout.index_bits, layout.res_index_bits)
    vectors = _take(weight.codebook, main)
    if residual is not None and weight.res_codebook is not None:
        vectors = vectors + _take(weight.res_codebook, residual)
    return vectors


def _take(book: Float[Array, "G k *v"], index: UInt[Array, "G n c"]) -> Float[Array, "G n c *v"]:
    """Entries of the codebook of each group, in float32; indices of k bits are never out of range."""
    book = book.astype(jnp.float32)
    pick = functools.partial(jnp.take, axis=0, mode="clip")
    if len(book) == 1:
        return pick(book[0], index[0].astype(jnp.int32))[None]
    return jax.vmap(pick)(book, index.astype(jnp.int32))


def _outliers(x: Float[Array, "rows columns"], weight: VQArray) -> Float[Array, "rows out"]:
    assert weight.outlier_codebook is not None
    assert weight.outlier_indices is not None
    vectors = weight.outlier_codebook.astype(jnp.float32)[weight.outlier_indices.astype(jnp.int32)]
    y = jnp.einsum("rc,ncv->rnv", x, vectors, preferred_element_type=jnp.float32)
    return y.reshape(len(x), math.prod(y.shape[1:]))[:, : weight.layout.out_features]
