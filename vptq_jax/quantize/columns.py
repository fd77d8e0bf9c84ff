"""How the columns of one weight are laid out while they are quantized, and what has been chosen for them.

All stages work on W^T in *slots*: permuted columns, outliers first, each segment padded with empty
slots to whole blocks, so that every loop over blocks has one shape. An empty slot has weight 0 and
Hessian 0 and couples with nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vptq_jax.pallas.nearest_centroid import nearest_centroid
from vptq_jax.spec import VQLayout

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Segment:
    """Columns with one vector length: all outlier columns, or all groups of main columns.

    Attributes:
        start: first slot.
        size: columns.
        slots: slots, `size` rounded up to whole blocks.
        rows: out_features.
        vector_len: v.
        num_centroids: k of each group.
        num_res_centroids: k_r of each group, 0 without residual.
        num_groups: groups of `size / num_groups` columns, each with its own codebooks.
    """

    start: int
    size: int
    slots: int
    rows: int
    vector_len: int
    num_centroids: int
    num_res_centroids: int
    num_groups: int

    @property
    def block(self) -> int:
        """Columns of one lazy update."""
        return min(BLOCK, self.slots)

    @property
    def group_size(self) -> int:
        """Columns of one group."""
        return self.size // self.num_groups

    @property
    def num_vectors(self) -> int:
        """Vectors of one column, the last one possibly partial."""
        return -(-self.rows // self.vector_len)

    @property
    def tail(self) -> int:
        """Rows of the last vector, 1 to v."""
        return self.rows - (self.num_vectors - 1) * self.vector_len

    def group(self, slot: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """Group of a slot of this segment (counted from its start); empty slots count to the last group."""
        return jnp.minimum(slot // self.group_size, self.num_groups - 1)

    def split(self, columns: Float[Array, "*n rows"]) -> Float[Array, "*n vectors v"]:
        """Columns cut into vectors, the last one padded with zeros."""
        padding = self.num_vectors * self.vector_len - self.rows
        columns = jnp.pad(columns, [(0, 0)] * (columns.ndim - 1) + [(0, padding)])
        return columns.reshape(*columns.shape[:-1], self.num_vectors, self.vector_len)

    def join(self, vectors: Float[Array, "*n vectors v"]) -> Float[Array, "*n rows"]:
        """Inverse of `split`."""
        return vectors.reshape(*vectors.shape[:-2], -1)[..., : self.rows]


def arrange(layout: VQLayout) -> tuple[tuple[Segment, ...], np.ndarray]:
    """The segments of a layout, and the permuted column in each slot (-1: empty)."""

    def padded(size: int) -> int:
        return -(-size // BLOCK) * BLOCK if size > BLOCK else size

    segments: list[Segment] = []
    if layout.outlier_size:
        segments.append(
            Segment(
                0, layout.outlier_size, padded(layout.outlier_size), layout.out_features,
                layout.outlier_vector_len, layout.num_outlier_centroids, 0, 1,
            )
        )  # fmt: skip
    size = layout.num_groups * layout.group_size
    start = segments[0].slots if segments else 0
    segments.append(
        Segment(
            start, size, padded(size), layout.out_features,
            layout.vector_len, layout.num_centroids, layout.num_res_centroids, layout.num_groups,
        )
    )  # fmt: skip
    columns = np.full(start + segments[-1].slots, -1)
    first = 0
    for segment in segments:
        columns[segment.start : segment.start + segment.size] = first + np.arange(segment.size)
        first += segment.size
    return tuple(segments), columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """Codebooks and indices of one segment.

    Attributes:
        codebook: float32 [G, k, v].
        res_codebook: float32 [G, k_r, v], or None.
        index: int32 [slots, vectors].
        res_index: int32 [slots, vectors], or None.
    """

    codebook: Float[Array, "G k v"]
    res_codebook: Float[Array, "G kr v"] | None
    index: Int[Array, "slots n"]
    res_index: Int[Array, "slots n"] | None


def decode(segment: Segment, codes: Codes) -> Float[Array, "slots rows"]:
    """The columns that the codes stand for."""
    group = segment.group(jnp.arange(codes.index.shape[0]))[:, None]
    vectors = codes.codebook[group, codes.index]
    if codes.res_codebook is not None:
        vectors = vectors + codes.res_codebook[group, codes.res_index]
    return segment.join(vectors)


def decode_all(segments: tuple[Segment, ...], codes: tuple[Codes, ...]) -> Float[Array, "slots rows"]:
    """`decode` of every segment, one below the other."""
    return jnp.concatenate([decode(segment, code) for segment, code in zip(segments, codes, strict=True)])


def encode_column(
    segment: Segment,
    column: Float[Array, " rows"],
    codebook: Float[Array, "k v"],
    res_codebook: Float[Array, "kr v"] | None,
) -> tuple[Int[Array, " n"], Int[Array, " n"] | None, Float[Array, " rows"]]:
    """The nearest centroid of each vector of a column, and the nearest residual of what is left (greedy).

    Returns:
        (index, residual index or None, decoded column).
    """
    vectors = segment.split(column)
    index = nearest(segment, vectors, codebook)
    decoded = codebook[index]
    if res_codebook is None:
        return index, None, segment.join(decoded)
    res_index = nearest(segment, vectors - decoded, res_codebook)
    return index, res_index, segment.join(decoded + res_codebook[res_index])


def nearest(segment: Segment, vectors: Float[Array, "n v"], codebook: Float[Array, "k v"]) -> Int[Array, " n"]:
    """Nearest centroids; a partial last vector is compared in the rows that it has."""
    index, _ = nearest_centroid(vectors, codebook)
    if segment.tail == segment.vector_len:
        return index
    last, _ = nearest_centroid(vectors[-1:, : segment.tail], codebook[:, : segment.tail])
    return index.at[-1].set(last[0])


def group_books(
    segment: Segment, codes: Codes, slot: Int[Array, ""]
) -> tuple[Float[Array, "k v"], Float[Array, "kr v"] | None]:
    """The main and the residual codebook of a slot's group."""

    def pick(codebooks: Float[Array, "G k v"]) -> Float[Array, "k v"]:
        return codebooks[0] if segment.num_groups == 1 else codebooks[segment.group(slot)]

    return pick(codes.codebook), None if codes.res_codebook is None else pick(codes.res_codebook)
