"""The portable implementation: x is permuted and scaled once, and the weight is decoded piece by piece.

    y = sum_c (x * scale)[perm[c]] * Wp[:, c] + sum_q x[q] * offset[q]

so that the offset costs one pass over x instead of one over the weight, columns need no scatter, and on a CPU no more
than a block of decoded vectors exists at a time: none at all with few rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from vptq_jax.array import VQArray
from vptq_jax.format import Format
from vptq_jax.packing import packed_words, unpack_indices

_BLOCK = 1 << 19  # weights that a CPU decodes at a time: 2 MB, what a core's cache holds
_FEW = 4  # rows for which a GPU gathers inside the reduction; with more it decodes first and multiplies
_FEW_ON_CPU = 4  # rows that a CPU multiplies one by one; with more it decodes once for all of them
_MOST_USES = 15  # of a constant in a fusion; XLA keeps others outside, where LLVM cannot see what they are
_CHAINS = 4  # sums that a CPU runs side by side: each addition waits for the one before it in its sum


def vq_matmul(x: Float[Array, "*batch in"], weight: VQArray, *, out_dtype: Any = None) -> Float[Array, "*batch out"]:
    """`x @ weight.dequantize().T`, accumulated in float32, differentiable in x, codebooks, scale and offset.

    Args:
        x: activations [..., in_features].
        weight: the quantized weight.
        out_dtype: of the result; None takes that of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not rows.size:
        return jnp.zeros((*x.shape[:-1], weight.format.out_features), out_dtype or x.dtype)
    y = _product(rows, weight)
    return y.astype(out_dtype or x.dtype).reshape(*x.shape[:-1], weight.format.out_features)


@jax.checkpoint  # Saving the packed weight instead of the decoded one for the backward pass.
def _product(x: Float[Array, "rows in"], weight: VQArray) -> Float[Array, "rows out"]:
    # Without the barrier XLA moves the decoding of every weight out of a loop around it (decode), and keeps them all.
    x, weight = jax.lax.optimization_barrier((x, weight))
    size = weight.format.outlier_size
    scale = jnp.ones(x.shape[1]) if weight.scale is None else weight.scale.astype(jnp.float32)
    columns = x
    if weight.perm is not None:
        columns, scale = x[:, weight.perm], scale[weight.perm]
    cpu = _by_columns if len(x) <= _FEW_ON_CPU else _by_blocks
    y = jax.lax.platform_dependent(columns[:, size:], scale[size:], weight, cpu=cpu, default=_at_once)
    if size:
        y = y + _outliers(columns[:, :size] * scale[:size], weight)
    if weight.offset is None:
        return y
    return y + (x.astype(jnp.float32) @ weight.offset.astype(jnp.float32))[:, None]


def _by_blocks(
    x: Float[Array, "rows columns"], scale: Float[Array, " columns"], weight: VQArray
) -> Float[Array, "rows out"]:
    """Blocks of vectors one after the other, each decoded and multiplied while it lies in the cache."""
    format = weight.format
    size = max(1, min(format.num_vectors, _BLOCK // (format.vector_len * x.shape[1])))
    count = -(-format.num_vectors // size)
    words = jnp.pad(weight.indices, ((0, 0), (0, count * size - format.num_vectors), (0, 0)))
    words = words.reshape(format.num_groups, count, size, -1).swapaxes(0, 1)
    x = (x * scale).reshape(len(x), format.num_groups, format.group_size)

    @jax.checkpoint
    def block(words: UInt[Array, "G size words"]) -> Float[Array, "rows size v"]:
        vectors = _decode(words, weight)
        return jnp.einsum("rgc,gncv->rnv", x, vectors, preferred_element_type=jnp.float32)

    y = jax.lax.map(block, words) if count > 1 else block(words[0])[None]
    return y.swapaxes(0, 1).reshape(len(x), count * size * format.vector_len)[:, : format.out_features]


@jax.custom_jvp
def _by_columns(
    x: Float[Array, "rows columns"], scale: Float[Array, " columns"], weight: VQArray
) -> Float[Array, "rows out"]:
    """Some columns at a time, each centroid multiplied as it is read: y stays in the cache, no vector is written."""
    format = weight.format
    bits = format.index_bits + format.res_index_bits
    length = 4 if format.vector_len <= 4 else -(-format.vector_len // 8) * 8  # whole registers
    books = [(_padded(weight.codebook, length), 0, format.index_bits)]
    if weight.res_codebook is not None:
        books.append((_padded(weight.res_codebook, length), format.index_bits, format.res_index_bits))
    step = _step(bits, length * len(books))
    steps, rest = divmod(format.group_size, step)

    size = _rows_at_a_time(format, step, length)
    parts = -(-format.num_vectors // size)

    def row(x: Float[Array, "G gs"]) -> Float[Array, " out"]:
        def part(first: Any) -> Float[Array, "size w"]:
            def group(g: Any, y: Float[Array, "size w"]) -> Float[Array, "size w"]:
                tables = [(jax.lax.dynamic_index_in_dim(book, g, keepdims=False), *place) for book, *place in books]

                def add(i: Any, y: Float[Array, "size w"], count: int = step) -> Float[Array, "size w"]:
                    start = (g, first, i * packed_words(step, bits))
                    words = jax.lax.dynamic_slice(weight.indices, start, (1, size, packed_words(count, bits)))[0]
                    factors = jax.lax.dynamic_slice(x, (g, i * step), (1, count))[0]
                    sums: list[Any] = [0.0] * min(_CHAINS, count)
                    for c in range(count):
                        for table, bit, width in tables:
                            vectors = table.at[_field(words, c * bits + bit, width)].get(mode="promise_in_bounds")
                            sums[c % _CHAINS] += factors[c] * vectors
                    return y + sum(sums[1:], sums[0])

                y = jax.lax.fori_loop(0, steps, add, y) if steps else y
                return add(steps, y, rest) if rest else y

            y = jnp.zeros((size, length))
            return jax.lax.fori_loop(0, format.num_groups, group, y) if format.num_groups > 1 else group(0, y)

        def place(i: Any, y: Float[Array, "n w"]) -> Float[Array, "n w"]:
            first = jnp.minimum(i * size, format.num_vectors - size)
            return jax.lax.dynamic_update_slice(y, part(first), (first, 0))

        y = jax.lax.fori_loop(0, parts, place, jnp.zeros((format.num_vectors, length))) if parts > 1 else part(0)
        return y[:, : format.vector_len].reshape(-1)[: format.out_features]

    x = (x * scale).reshape(len(x), format.num_groups, format.group_size)
    return jax.lax.map(row, x) if len(x) > 1 else row(x[0])[None]


@_by_columns.defjvp
def _derivative(primals: Any, tangents: Any) -> Any:
    """That of the other form, which decodes once for all it needs."""
    return jax.jvp(_by_blocks, primals, tangents)


def _step(bits: int, floats: int) -> int:
    """Columns of one step, for entries of some bits that read some floats; a step begins and ends with a word.

    LLVM unrolls the loop over a vector's components where its body is short, and then gathers single components over
    many vectors; a body that reads 112 floats or more stays a loop, whose registers hold components side by side.
    """
    period = 32 // math.gcd(bits, 32)
    step = max(16, 128 // floats, period)
    return step if step <= _MOST_USES * period else (_MOST_USES - 1) * period


def _rows_at_a_time(format: Format, step: int, length: int) -> int:
    """Rows of vectors that a step serves: all, or what one thread does where a step is too small to be shared out.

    XLA divides what it estimates at twice 1e5 cycles or more, at 10 cycles a byte, whatever handing it out takes.
    """
    rows, books = format.num_vectors, 2 if format.num_res_centroids else 1
    bits = format.index_bits + format.res_index_bits
    if rows * step * books > 1 << 15:
        return rows
    tables = 40 * length * (format.num_centroids + format.num_res_centroids)
    most = (190_000 - tables) // (10 * (step * bits // 8 + 8 * length) + 3 * step * length * books)
    return -(-rows // -(-rows // most)) if most >= 64 else rows


def _padded(book: Float[Array, "G k v"], length: int) -> Float[Array, "G k length"]:
    return jnp.pad(book.astype(jnp.float32), ((0, 0), (0, 0), (0, length - book.shape[-1])))


def _field(words: UInt[Array, "n words"], start: int, width: int) -> UInt[Array, " n"]:
    """Bits `start` ... `start + width - 1` of each row, masked by constants or cast: so LLVM drops the bounds check.

    Masked where they lie, so that a step holds a constant once for each of a period's entries (see `_MOST_USES`).
    """
    word, offset = divmod(start, 32)
    over = offset + width - 32  # bits that lie in the next word
    value = words[:, word]
    if over > 0:
        high = words[:, word + 1] & np.uint32((1 << over) - 1)
        return value >> np.uint32(offset) | high << np.uint32(32 - offset)
    if width in (8, 16):
        return (value >> np.uint32(offset)).astype(f"uint{width}").astype(jnp.uint32)
    return (value & np.uint32(((1 << width) - 1) << offset)) >> np.uint32(offset)


def _at_once(
    x: Float[Array, "rows columns"], scale: Float[Array, " columns"], weight: VQArray
) -> Float[Array, "rows out"]:
    """Few rows: one component of the centroids at a time, which XLA fuses with the sum; more: decode, then multiply."""
    format = weight.format
    if len(x) > _FEW:  # x stays as it is, so that only the weight is rounded
        scale = scale.reshape(format.num_groups, 1, format.group_size, 1)
        vectors = (_decode(weight.indices, weight) * scale).astype(x.dtype)
        x = x.reshape(len(x), format.num_groups, format.group_size)
        y = jnp.einsum("rgc,gncv->rnv", x, vectors, preferred_element_type=jnp.float32)
        return y.reshape(len(x), format.num_vectors * format.vector_len)[:, : format.out_features]
    x = (x * scale).reshape(len(x), format.num_groups, format.group_size)
    main, residual = unpack_indices(weight.indices, format.group_size, format.index_bits, format.res_index_bits)

    def component(d: int) -> Float[Array, "rows n"]:
        values = _take(weight.codebook[..., d], main)
        if residual is not None and weight.res_codebook is not None:
            values = values + _take(weight.res_codebook[..., d], residual)
        return jnp.stack([jnp.sum(values * row[:, None], axis=(0, 2)) for row in x])

    y = jnp.stack([component(d) for d in range(format.vector_len)], axis=-1)
    return y.reshape(len(x), -1)[:, : format.out_features]


def _decode(words: UInt[Array, "G n words"], weight: VQArray) -> Float[Array, "G n c v"]:
    """The vectors of some packed rows, before scale and offset; float32."""
    format = weight.format
    main, residual = unpack_indices(words, format.group_size, format.index_bits, format.res_index_bits)
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
    return y.reshape(len(x), math.prod(y.shape[1:]))[:, : weight.format.out_features]
