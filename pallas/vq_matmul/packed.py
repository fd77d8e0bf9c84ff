"""The kernel order of a quantized weight: `pack` from the checkpoint order, `unpack` back.

The kernel multiplies 16x16 blocks of the weight on the tensor cores. Each thread of a warp looks
up one centroid per block, so a *unit* of the kernel order holds, thread by thread, the entries a
warp consumes together: `tiles` blocks down the output rows times `steps` blocks along the input
columns. One vector fills half of a block's rows when v <= 8 (a block holds two vectors, 32
streams), or all of them when 8 < v <= 16 (16 streams, each read by two threads).

A stream of tiles * steps entries is packed without gaps, exactly log2(k) + log2(k_r) bits an
entry, and the words of all streams interleave so that every load of a warp is contiguous.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt

from vptq_jax.array import VQArray
from vptq_jax.format import FLOATS, INTEGERS, Format
from vptq_jax.meshes import automatic, is_divided
from vptq_jax.packing import pack_indices, unpack_indices
from vptq_jax.pallas.ptx import SHARED_MEMORY_BYTES

RESERVED_BYTES = 2048  # Of a block's shared memory, kept for the compiler's own use.
ROW_BYTES = 16  # A centroid, or a plane of one: 8 values of 16 bits.
_SCRATCH_BYTES = 26 * 1024  # The most that a kernel wants for other things than codebooks.
_TARGET_UNITS = 2 * 132 * 16  # Units a large GPU wants: two for each of 16 warps on 132 processors.


@dataclasses.dataclass(frozen=True)
class Order:
    """How many blocks a unit spans.

    Attributes:
        tiles: blocks down the output rows.
        steps: blocks along the input columns, an even number.
    """

    tiles: int
    steps: int

    @property
    def entries(self) -> int:
        """Entries of one stream of a unit."""
        return self.tiles * self.steps

    @property
    def columns(self) -> int:
        """Input columns of a unit."""
        return 16 * self.steps


@dataclasses.dataclass(frozen=True)
class UnitGrid:
    """The units of one weight in one order, all static."""

    format: Format
    order: Order

    @property
    def planes(self) -> int:
        """Runs of 8 components that a vector takes, 1 or 2."""
        return -(-self.format.vector_len // 8)

    @property
    def streams(self) -> int:
        """Streams of entries in a unit, one a thread (or a pair of threads)."""
        return 32 // self.planes

    @property
    def unit_vectors(self) -> int:
        """Vectors of one column in a unit."""
        return 2 * self.order.tiles // self.planes

    @property
    def unit_rows(self) -> int:
        """Output rows of a unit."""
        return self.unit_vectors * self.format.vector_len

    @property
    def row_units(self) -> int:
        """Units down the output rows, the last one padded."""
        return -(-self.format.num_vectors // self.unit_vectors)

    @property
    def column_units(self) -> int:
        """Units along the input columns of a group, the last one padded."""
        return -(-self.format.group_size // self.order.columns)

    @property
    def padded_columns(self) -> int:
        """Input columns of a group, padded to whole units."""
        return self.column_units * self.order.columns

    @property
    def bits(self) -> int:
        """Bits of an entry: main and residual index."""
        return self.format.index_bits + self.format.res_index_bits

    @property
    def stream_words(self) -> int:
        """32-bit words of a stream."""
        return self.order.entries * self.bits // 32

    @property
    def words_shape(self) -> tuple[int, int, int, int]:
        """Shape of the packed words of a weight."""
        return self.format.num_groups, self.row_units, self.column_units, self.streams * self.stream_words


@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight [out_features, in_features] in kernel order: what `VQArray` holds, ready for the GPU kernels.

    It is frozen: tables, `column_scale` and `centred_offset` derive from the codebooks, scale and offset at the time
    of `pack`, so that its product has no gradient with respect to them.

    Attributes:
        words: packed indices, uint32 [G, row units, column units, words of a unit].
        table: [G, k, 8 or 16], the codebook less its mean (where there is an offset to take the
            mean up), components padded with zeros.
        res_table: [G, k_r, 8 or 16], or None.
        tail_table: [G, max(k, k_r), 8] where `shares_tail`: components 8 to 11 of both codebooks'
            centroids, the main one's first; the other tables then hold components 0 to 7. Else None.
        columns: int32 [G * padded columns], original column of each kernel column, or None for the identity.
        column_scale: float32 [G * padded columns], zero in the padding.
        centred_offset: float32 [in_features], offset plus scale times codebook mean, or None.
        codebook, res_codebook, outlier_indices, outlier_codebook, scale, offset, perm: as in `VQArray`.
        format: the static shape facts.
        order: the unit of the kernel order.
    """

    words: UInt[Array, "G rows columns words"]
    table: Float[Array, "G k p"]
    res_table: Float[Array, "G kr p"] | None
    tail_table: Float[Array, "G kt 8"] | None
    columns: Int[Array, " n"] | None
    column_scale: Float[Array, " n"]
    centred_offset: Float[Array, " in"] | None
    codebook: Float[Array, "G k v"]
    res_codebook: Float[Array, "G kr v"] | None
    outlier_indices: UInt[Array, "n_o o"] | None
    outlier_codebook: Float[Array, "ko vo"] | None
    scale: Float[Array, " in"] | None
    offset: Float[Array, " in"] | None
    perm: Int[Array, " in"] | None
    format: Format
    order: Order

    @property
    def grid(self) -> UnitGrid:
        """The units of this weight."""
        return UnitGrid(self.format, self.order)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.format.out_features, self.format.in_features

    @property
    def dtype(self) -> Any:
        """dtype of the activations that the kernels take."""
        return self.table.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on the device, everything included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


_SHARED_FIELDS = tuple(field for field in (*FLOATS, *INTEGERS) if field != "indices")
PACKED_FIELDS = (
    "words",
    "table",
    "res_table",
    "tail_table",
    "columns",
    "column_scale",
    "centred_offset",
    *_SHARED_FIELDS,
)

jax.tree_util.register_dataclass(Packed, data_fields=list(PACKED_FIELDS), meta_fields=["format", "order"])


def unsupported(format: Format, dtype: Any) -> str | None:
    """Why the kernels cannot multiply such a weight with activations of a dtype, or None."""
    if format.vector_len > 16:
        return f"vector length {format.vector_len} is above 16"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {jnp.dtype(dtype)}; the tensor cores take bfloat16 or float16"
    return None


def shares_tail(format: Format) -> bool:
    """Whether components 8.. of main and residual centroids share the rows of one table.

    With 8 < v <= 12 both fit one row of 8 values. It is done where the codebooks fit shared memory
    only so; the products of main and residual centroids then need sums of their own.
    """
    if not 8 < format.vector_len <= 12 or not format.num_res_centroids:
        return False
    sizes = (format.num_centroids, format.num_res_centroids)
    free = SHARED_MEMORY_BYTES - RESERVED_BYTES - _SCRATCH_BYTES
    return 2 * sum(sizes) * ROW_BYTES > free >= (sum(sizes) + max(sizes)) * ROW_BYTES


def choose_order(formats: Sequence[Format]) -> Order:
    """One order for weights that run in one launch: the largest unit that still gives every warp work."""
    format = formats[0]
    bits = format.index_bits + format.res_index_bits
    streamed = max(format.num_centroids, format.num_res_centroids) > 8192
    candidates = [(4, 2), (2, 2), (4, 4)] if streamed else [(4, 4), (4, 2), (2, 2)]
    fitting = [Order(*c) for c in [*candidates, (4, 8)] if c[0] * c[1] * bits % 32 == 0]
    for order in fitting:
        units = sum(math.prod(UnitGrid(part, order).words_shape[:3]) for part in formats)
        if units >= _TARGET_UNITS:
            return order
    return min(fitting, key=lambda order: order.entries)


def pack(weight: VQArray, order: Order | None = None, *, dtype: Any = None) -> Packed:
    """The weight in kernel order; no bit of it is lost, `unpack` gives it back. Codebooks are shared, not copied.

    Args:
        weight: the weight in checkpoint order.
        order: the unit; by default chosen for this weight alone.
        dtype: dtype of the activations to come, bfloat16 or float16; by default that of the codebooks, bfloat16 for
            wider ones.

    Raises:
        NotImplementedError: the kernels cannot hold this weight (the message says why).
    """
    dtype = jnp.dtype(dtype or (jnp.bfloat16 if weight.dtype == jnp.float32 else weight.dtype))
    reason = unsupported(weight.format, dtype)
    if reason or is_divided(weight):
        reason = reason or "it is divided among devices, and a packed one lies whole on each; place it without axis"
        raise NotImplementedError(f"no kernel order for this weight: {reason}")
    order = order or choose_order([weight.format])
    shared = {field: getattr(weight, field) for field in _SHARED_FIELDS}
    derived = automatic(functools.partial(_derived, order=order, dtype=dtype), PartitionSpec(), weight)
    return Packed(**derived, **shared, format=weight.format, order=order)


@functools.partial(jax.jit, static_argnames=("order", "dtype"))
def _derived(weight: VQArray, order: Order, dtype: Any) -> dict[str, Array | None]:
    grid = UnitGrid(weight.format, order)
    main, residual = weight.unpack()
    means = None if weight.offset is None else weight.codebook.astype(jnp.float32).mean(axis=(1, 2))
    columns, column_scale = _kernel_columns(weight, grid)
    table, res_table, tail_table = _tables(weight, means, grid.planes, dtype)
    return {
        "words": _pack_units(_to_streams(main, grid), None if residual is None else _to_streams(residual, grid), grid),
        "table": table,
        "res_table": res_table,
        "tail_table": tail_table,
        "columns": columns,
        "column_scale": column_scale,
        "centred_offset": None if means is None else _centred_offset(weight, means),
    }


def unpack(kernel: Packed) -> VQArray:
    """Inverse of `pack`, bit for bit."""
    shared = {field: getattr(kernel, field) for field in _SHARED_FIELDS}
    indices = automatic(functools.partial(_indices, grid=kernel.grid), PartitionSpec(), kernel.words)
    return VQArray(indices=indices, **shared, format=kernel.format)


@functools.partial(jax.jit, static_argnames="grid")
def _indices(words: UInt[Array, "G rows columns unit"], grid: UnitGrid) -> UInt[Array, "G n words"]:
    main, residual = _unpack_units(words, grid)
    main = _from_streams(main, grid)
    residual = None if residual is None else _from_streams(residual, grid)
    return pack_indices(main, residual, grid.format.index_bits, grid.format.res_index_bits)


def kernel_columns(x: Float[Array, "m in"], kernel: Packed) -> Float[Array, "m n"]:
    """Activations permuted, scaled and padded as the kernel reads them, in the dtype of the tables."""
    gathered = x if kernel.columns is None else x[:, kernel.columns]
    return (gathered.astype(jnp.float32) * kernel.column_scale).astype(kernel.table.dtype)


def _outliers(kernel: Packed) -> tuple[Int[Array, " o"], Float[Array, "n o d"]]:
    """The outlier columns' indices, and their vectors before scale and offset."""
    assert kernel.outlier_indices is not None
    assert kernel.outlier_codebook is not None
    size = kernel.format.outlier_size
    columns = jnp.arange(size) if kernel.perm is None else kernel.perm[:size]
    return columns, kernel.outlier_codebook[kernel.outlier_indices]


def outlier_weight(kernel: Packed) -> tuple[Int[Array, " o"], Float[Array, "o out"]]:
    """The outlier columns' indices and float32 weights, offset included."""
    format = kernel.format
    columns, vectors = _outliers(kernel)
    values = vectors.astype(jnp.float32).transpose(1, 0, 2).reshape(format.outlier_size, -1)[:, : format.out_features]
    if kernel.scale is not None:
        values = values * kernel.scale[columns, None].astype(jnp.float32)
    if kernel.centred_offset is not None:
        values = values + kernel.centred_offset[columns, None]
    return columns, values


def outlier_product(x: Float[Array, "m in"], kernel: Packed) -> Float[Array, "m out"]:
    """The outlier columns' share of the product, float32."""
    format = kernel.format
    columns, vectors = _outliers(kernel)
    gathered = x[:, columns].astype(jnp.float32)
    if kernel.scale is not None:
        gathered = gathered * kernel.scale[columns].astype(jnp.float32)
    product = jnp.einsum("mc,ncd->mnd", gathered.astype(vectors.dtype), vectors, preferred_element_type=jnp.float32)
    return product.reshape(x.shape[0], -1)[:, : format.out_features]


def _kernel_columns(weight: VQArray, grid: UnitGrid) -> tuple[Array | None, Array]:
    format = weight.format
    original = jnp.arange(format.in_features, dtype=jnp.int32) if weight.perm is None else weight.perm
    original = original[format.outlier_size :].reshape(format.num_groups, format.group_size)
    scale = jnp.ones(format.in_features) if weight.scale is None else weight.scale
    padding = ((0, 0), (0, grid.padded_columns - format.group_size))
    column_scale = jnp.pad(scale.astype(jnp.float32)[original], padding).reshape(-1)
    identity = weight.perm is None and not format.outlier_size and not padding[1][1]
    return None if identity else jnp.pad(original, padding).reshape(-1), column_scale


def _tables(
    weight: VQArray, means: Float[Array, " G"] | None, planes: int, dtype: Any
) -> tuple[Array, Array | None, Array | None]:
    main, residual = weight.codebook, weight.res_codebook
    # Centred values round less: where columns are stored as minimum and range, a codebook's mean
    # is several times its deviation.
    if means is not None:
        main = main.astype(jnp.float32) - means[:, None, None]

    def rows(codebook: Float[Array, "G k v"]) -> Float[Array, "G k p"]:
        return jnp.pad(codebook.astype(dtype), ((0, 0), (0, 0), (0, 8 * planes - codebook.shape[-1])))

    if residual is None:
        return rows(main), None, None
    books = [rows(main), rows(residual)]
    if not shares_tail(weight.format):
        return books[0], books[1], None
    longest = max(book.shape[1] for book in books)
    tails = [jnp.pad(book[..., 8:12], ((0, 0), (0, longest - book.shape[1]), (0, 0))) for book in books]
    return books[0][..., :8], books[1][..., :8], jnp.concatenate(tails, axis=-1)


def _centred_offset(weight: VQArray, means: Float[Array, " G"]) -> Float[Array, " in"]:
    format = weight.format
    mean = jnp.concatenate([jnp.zeros(format.outlier_size), jnp.repeat(means, format.group_size)])
    if weight.perm is not None:
        mean = jnp.zeros_like(mean).at[weight.perm].set(mean, unique_indices=True)
    assert weight.offset is not None
    scale = 1.0 if weight.scale is None else weight.scale.astype(jnp.float32)
    return weight.offset.astype(jnp.float32) + mean * scale


def _to_streams(index: UInt[Array, "G n gs"], grid: UnitGrid) -> UInt[Array, "G rows columns streams entries"]:
    """Indices by unit and stream; within 32 columns a thread's 8 values of x are contiguous."""
    groups, vectors, columns = index.shape
    tiles, steps, per_tile = grid.order.tiles, grid.order.steps, 2 // grid.planes
    padded_vectors = grid.row_units * grid.unit_vectors
    index = jnp.pad(index, ((0, 0), (0, padded_vectors - vectors), (0, grid.padded_columns - columns)))
    shape = (groups, grid.row_units, tiles, per_tile, grid.column_units, steps // 2, 4, 2, 2, 2)
    #        G       row unit        tile   vector    column unit        pair        quad step half parity
    return index.reshape(shape).transpose(0, 1, 4, 8, 3, 6, 9, 5, 7, 2).reshape(*grid.words_shape[:3], grid.streams, -1)


def _from_streams(streams: UInt[Array, "G rows columns streams entries"], grid: UnitGrid) -> UInt[Array, "G n gs"]:
    tiles, steps, per_tile = grid.order.tiles, grid.order.steps, 2 // grid.planes
    groups, rows, columns = grid.words_shape[:3]
    index = streams.reshape(groups, rows, columns, 2, per_tile, 4, 2, steps // 2, 2, tiles)
    index = index.transpose(0, 1, 9, 4, 2, 7, 5, 8, 3, 6)
    index = index.reshape(groups, rows * grid.unit_vectors, grid.padded_columns)
    return index[:, : grid.format.num_vectors, : grid.format.group_size]


def load_widths(words: int) -> list[int]:
    """A stream's words as loads of 4, 2 or 1."""
    return [4] * (words // 4) + [width for width in (2, 1) if words % 4 & width]


def _pack_units(main: Array, residual: Array | None, grid: UnitGrid) -> UInt[Array, "G rows columns words"]:
    packed = pack_indices(main, residual, grid.format.index_bits, grid.format.res_index_bits)
    borders = np.cumsum(load_widths(grid.stream_words))[:-1].tolist()
    loads = jnp.split(packed, borders, axis=-1)
    return jnp.concatenate([load.reshape(*load.shape[:3], -1) for load in loads], axis=-1)


def _unpack_units(words: UInt[Array, "G rows columns words"], grid: UnitGrid) -> tuple[Array, Array | None]:
    widths = load_widths(grid.stream_words)
    borders = np.cumsum([grid.streams * width for width in widths])[:-1].tolist()
    loads = jnp.split(words, borders, axis=-1)
    packed = jnp.concatenate(
        [load.reshape(*load.shape[:3], grid.streams, width) for load, width in zip(loads, widths, strict=True)], axis=-1
    )
    return unpack_indices(packed, grid.order.entries, grid.format.index_bits, grid.format.res_index_bits)
