"""`VQArray`: one quantized weight matrix as a pytree of packed indices and codebooks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Integer, UInt

from vptq_jax.format import FLOATS, INTEGERS, Format
from vptq_jax.packing import pack_indices, unpack_indices


@dataclasses.dataclass(frozen=True)
class VQArray:
    """A weight [out_features, in_features] in VPTQ form.

    In permuted column order, with column c = outlier_size + g * group_size + j:

        Wp[r*v + d, c] = codebook[g, main[g, r, j], d] + res_codebook[g, residual[g, r, j], d]
        Wp[r*ov + d, c] = outlier_codebook[outlier_indices[r, c], d]        (c < outlier_size)
        W[:, perm[c]] = Wp[:, c] * scale[perm[c]] + offset[perm[c]]

    Attributes:
        indices: packed main and residual indices, uint32 [G, num_vectors, words]; see
            `vptq_jax.packing` for the bit order.
        codebook: float [G, k, v].
        res_codebook: float [G, k_r, v], or None.
        outlier_indices: uint16 [num_outlier_vectors, outlier_size], or None.
        outlier_codebook: float [outlier centroids, outlier_vector_len], or None.
        scale: float [in_features] in original column order, or None.
        offset: float [in_features] in original column order, or None.
        perm: int32 [in_features], original column of each permuted column, or None.
        format: everything static.

    A stack of weights of one format (`stack`, `jax.vmap`, `jax.lax.scan`) is a `VQArray` too, whose arrays have more
    axes in front; `shape`, `ndim` and `nbytes` count them, all else takes one matrix.

    Example:
        >>> first, second = (
        ...     VQArray.random(key, Format.of("v4-k16", (64, 96))) for key in jax.random.split(jax.random.key(0))
        ... )
        >>> first.shape, first.dequantize().shape, first.indices.dtype, first.codebook.shape
        ((64, 96), (64, 96), dtype('uint32'), (1, 16, 4))
        >>> first.format.nominal_bits, round(first.bits_per_weight, 2)  # indices alone; codebook and scales too
        (1.0, 1.92)
        >>> VQArray.stack([first, second]).shape
        (2, 64, 96)
    """

    indices: UInt[Array, "G n words"]
    codebook: Float[Array, "G k v"]
    res_codebook: Float[Array, "G kr v"] | None
    outlier_indices: UInt[Array, "on oc"] | None
    outlier_codebook: Float[Array, "ok ov"] | None
    scale: Float[Array, "in"] | None
    offset: Float[Array, "in"] | None
    perm: Int[Array, "in"] | None
    format: Format

    @classmethod
    def from_indices(
        cls,
        format: Format,
        main: Integer[Array, "G n gs"],
        residual: Integer[Array, "G n gs"] | None,
        codebook: Float[Array, "G k v"],
        res_codebook: Float[Array, "G kr v"] | None = None,
        *,
        outlier_indices: Integer[Array, "on oc"] | None = None,
        outlier_codebook: Float[Array, "ok ov"] | None = None,
        scale: Float[Array, "in"] | None = None,
        offset: Float[Array, "in"] | None = None,
        perm: Integer[Array, "in"] | None = None,
    ) -> VQArray:
        """Packs plain indices; pure and jit-friendly."""
        return cls(
            indices=pack_indices(main, residual, format.index_bits, format.res_index_bits),
            codebook=codebook,
            res_codebook=res_codebook,
            outlier_indices=None if outlier_indices is None else outlier_indices.astype(jnp.uint16),
            outlier_codebook=outlier_codebook,
            scale=scale,
            offset=offset,
            perm=None if perm is None else perm.astype(jnp.int32),
            format=dataclasses.replace(format, normalize=scale is not None, permute=perm is not None),
        )

    @classmethod
    def abstract(cls, format: Format, dtype: Any = jnp.float16) -> VQArray:
        """Shapes in place of arrays, as `jax.eval_shape` gives them; `dtype` of the fields in `FLOATS`."""

        def field(name: str, shape: tuple[int, ...] | None) -> Any:
            return None if shape is None else jax.ShapeDtypeStruct(shape, INTEGERS.get(name, dtype))

        return cls(**{name: field(name, shape) for name, shape in format.shapes().items()}, format=format)

    @classmethod
    def random(cls, key: Array, format: Format, dtype: Any = jnp.float16) -> VQArray:
        """Random indices, centroids and permutation; a weight with mean 0 and, if normalized, deviation about 0.02."""
        keys = iter(jax.random.split(key, 8))
        fields: dict[str, Any] = {}
        for name, shape in format.shapes().items():
            if shape is None:
                fields[name] = None
            elif name == "indices":
                fields[name] = jax.random.bits(next(keys), shape, jnp.uint32)
            elif name == "outlier_indices":
                fields[name] = jax.random.randint(next(keys), shape, 0, format.num_outlier_centroids).astype(jnp.uint16)
            elif name == "perm":
                fields[name] = jax.random.permutation(next(keys), format.in_features).astype(jnp.int32)
            elif name == "scale":
                fields[name] = jnp.full(shape, 0.02, dtype)
            else:
                deviation = 1e-3 if name == "offset" else 1.0
                fields[name] = (deviation * jax.random.normal(next(keys), shape)).astype(dtype)
        return cls(**fields, format=format)

    @classmethod
    def stack(cls, arrays: Sequence[VQArray]) -> VQArray:
        """Weights of one format with a new axis in front; a part that is wide in one of them is wide in all.

        Raises:
            ValueError: no arrays, or unlike formats.
        """
        formats = list(dict.fromkeys(array.format for array in arrays))
        if len(formats) != 1:
            found = " and ".join(f"{format} [{format.out_features}, {format.in_features}]" for format in formats[:2])
            raise ValueError(f"a stack needs weights of one format; found {found or 'no weights'}")

        def stacked(*parts: Array) -> Array:
            return jnp.stack([part.astype(jnp.result_type(*parts)) for part in parts])

        return jax.tree.map(stacked, *arrays)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out_features, in_features), behind the axes of a stack."""
        return (*self.indices.shape[:-3], self.format.out_features, self.format.in_features)

    @property
    def dtype(self) -> Any:
        """dtype of the codebook."""
        return self.codebook.dtype

    @property
    def ndim(self) -> int:
        """2 for a matrix, more for a stack."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Weights."""
        return math.prod(self.shape)

    @property
    def T(self) -> Float[Array, "in out"]:
        """The dense weight [in_features, out_features], decoded, in `dtype`."""
        return self.dequantize(self.dtype).T

    def astype(self, dtype: Any) -> VQArray:
        """Codebooks, scale and offset in another floating-point dtype; indices stay."""
        floats = {name: value for name in FLOATS if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **{name: value.astype(dtype) for name, value in floats.items()})

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def stored_bits(self) -> int:
        """Bits in a file, everything included."""
        narrow = 0 if self.perm is None else self.perm.size * (4 - np.dtype(self.format.stored_dtype("perm")).itemsize)
        return 8 * (self.nbytes - narrow)

    @property
    def bits_per_weight(self) -> float:
        """`stored_bits` over the number of weights."""
        return self.stored_bits / self.size

    def partition_specs(self, axis: str | None, *, dim: int = 0) -> VQArray:
        """A `PartitionSpec` in place of every array, for `jax.device_put` or a checkpoint.

        Args:
            axis: of a mesh, among whose devices the vectors of a column are divided (output features); codebooks,
                scales and permutation are on each of them. None: everything is.
            dim: of the weight, 0.

        Raises:
            NotImplementedError: dim is 1: a 32-bit word holds the indices of several input columns, and a device's
                share of the columns neither begins nor ends with a word.
        """
        if dim != 0:
            raise NotImplementedError(
                f"dim is {dim}; expected 0, the output features: packed words hold the indices of several input "
                "columns each, so that a device's share of the columns neither begins nor ends with a word"
            )
        divided = {"indices": PartitionSpec(None, axis), "outlier_indices": PartitionSpec(axis)}
        fields = {field: getattr(self, field) for field in (*INTEGERS, *FLOATS)}
        specs: dict[str, Any] = {
            field: None if value is None else divided.get(field, PartitionSpec()) for field, value in fields.items()
        }
        return dataclasses.replace(self, **specs)

    def unpack(self) -> tuple[UInt[Array, "G n gs"], UInt[Array, "G n gs"] | None]:
        """Main and residual indices, uint32 [G, num_vectors, group_size]."""
        return unpack_indices(self.indices, self.format.group_size, self.format.index_bits, self.format.res_index_bits)

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "out in"]:
        """The dense weight [out_features, in_features], computed in float32, returned in `dtype`."""
        columns = self.permuted_columns()
        if self.perm is not None:
            columns = jnp.zeros_like(columns).at[:, self.perm].set(columns, unique_indices=True)
        if self.scale is not None:
            columns = columns * self.scale.astype(jnp.float32)
        if self.offset is not None:
            columns = columns + self.offset.astype(jnp.float32)
        return columns.astype(dtype)

    def permuted_columns(self) -> Float[Array, "out in"]:
        """Decoded vectors in permuted column order, before scale and offset; float32."""
        main, residual = self.unpack()
        vectors = _gather(self.codebook, main)
        if residual is not None:
            assert self.res_codebook is not None
            vectors = vectors + _gather(self.res_codebook, residual)
        groups, rows, size, length = vectors.shape
        # [G, n, gs, v] -> [n, v, G, gs] -> [n*v, G*gs]
        columns = vectors.transpose(1, 3, 0, 2).reshape(rows * length, groups * size)
        columns = columns[: self.format.out_features]
        if self.outlier_indices is not None:
            assert self.outlier_codebook is not None
            outliers = _gather(self.outlier_codebook[None], self.outlier_indices[None])[0]
            outliers = outliers.transpose(0, 2, 1).reshape(-1, self.format.outlier_size)
            columns = jnp.concatenate([outliers[: self.format.out_features], columns], axis=1)
        return columns

    def take_rows(self, rows: Int[Array, "*batch"], dtype: Any = jnp.float32) -> Float[Array, "*batch in"]:
        """Rows of the dense weight without decoding the rest (an embedding lookup)."""
        format = self.format
        unpacked = unpack_indices(
            self.indices[:, rows // format.vector_len], format.group_size, format.index_bits, format.res_index_bits
        )

        def component(codebook: Array, index: Array, within: Array) -> Array:
            groups = jnp.arange(codebook.shape[0]).reshape(-1, *[1] * rows.ndim, 1)
            return codebook.astype(jnp.float32)[groups, index, within[None, ..., None]]

        within = rows % format.vector_len
        values = component(self.codebook, unpacked[0], within)
        if unpacked[1] is not None:
            assert self.res_codebook is not None
            values = values + component(self.res_codebook, unpacked[1], within)
        values = jnp.moveaxis(values, 0, -2).reshape(*rows.shape, -1)
        if self.outlier_indices is not None:
            assert self.outlier_codebook is not None
            length = format.outlier_vector_len
            outliers = component(
                self.outlier_codebook[None], self.outlier_indices[rows // length][None], rows % length
            )[0]
            values = jnp.concatenate([outliers, values], axis=-1)
        if self.perm is not None:
            values = jnp.zeros_like(values).at[..., self.perm].set(values, unique_indices=True)
        if self.scale is not None:
            values = values * self.scale.astype(jnp.float32)
        if self.offset is not None:
            values = values + self.offset.astype(jnp.float32)
        return values.astype(dtype)

    def validate(self, name: str = "VQArray") -> VQArray:
        """Checks shapes, dtypes, finiteness and index ranges on the host; returns self.

        Raises:
            ValueError: all problems found, each naming the tensor, what was found and what was expected.
        """
        problems = _problems(self)
        if problems:
            raise ValueError(f"{name} is not a valid quantized weight:\n" + "\n".join(f"  {p}" for p in problems))
        return self


jax.tree_util.register_dataclass(
    VQArray,
    data_fields=[field.name for field in dataclasses.fields(VQArray) if field.name != "format"],
    meta_fields=["format"],
)
nnx.register_data_type(VQArray)  # an attribute of a module needs no wrapping


def _gather(codebook: Float[Array, "G k v"], index: UInt[Array, "G n m"]) -> Float[Array, "G n m v"]:
    groups = jnp.arange(codebook.shape[0])[:, None, None]
    return codebook.astype(jnp.float32)[groups, index]


_KINDS = {"indices": np.uint32, "outlier_indices": np.uint16, "perm": np.integer}


def _problems(array: VQArray) -> list[str]:
    problems = []
    for field, shape in array.format.shapes().items():
        value = getattr(array, field)
        found = None if value is None else tuple(value.shape)
        if found != shape:
            problems.append(f"{field}: found shape {found}, expected {shape}")
        elif value is not None:
            kind = _KINDS.get(field, jnp.floating)
            if not jnp.issubdtype(value.dtype, kind):
                problems.append(f"{field}: found dtype {value.dtype}, expected {kind.__name__}")
            elif kind is jnp.floating and not bool(jnp.isfinite(value).all()):
                problems.append(f"{field}: holds NaN or infinite values, expected finite ones")
    if problems:
        return problems
    if array.perm is not None and not np.array_equal(np.sort(np.asarray(array.perm)), np.arange(array.shape[1])):
        problems.append(f"perm: not a permutation of 0 .. {array.shape[1] - 1}")
    if array.outlier_indices is not None:
        top = int(np.max(np.asarray(array.outlier_indices)))
        if top >= array.format.num_outlier_centroids:
            problems.append(
                f"outlier_indices: found index {top}, expected at most {array.format.num_outlier_centroids - 1}"
            )
    # Packed indices cannot exceed a power-of-two codebook: their bit width is log2(k).
    return problems
