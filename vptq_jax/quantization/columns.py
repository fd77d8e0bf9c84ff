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
from jax import lax
from jaxtyping import Array, Float, Int

from vptq_jax.format import Format
from vptq_jax.pallas.nearest_centroid import nearest_centroid
from vptq_jax.quantization.linalg import dot

BLOCK = 128
_PARTS = 32  # Parts of the main codebook that each offer a candidate for a pair ...
_CANDIDATES = 8  # ... and how many of these are tried with every residual.


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

    def group(self, slot: Int[Array | np.ndarray, "*n"]) -> Int[Array, "*n"]:
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


def arrange(format: Format) -> tuple[tuple[Segment, ...], np.ndarray]:
    """The segments of a format, and the permuted column in each slot (-1: empty)."""

    def padded(size: int) -> int:
        return -(-size // BLOCK) * BLOCK if size > BLOCK else size

    segments: list[Segment] = []
    if format.outlier_size:
        segments.append(
            Segment(
                0, format.outlier_size, padded(format.outlier_size), format.out_features,
                format.outlier_vector_len, format.num_outlier_centroids, 0, 1,
            )
        )  # fmt: skip
    size = format.num_groups * format.group_size
    start = segments[0].slots if segments else 0
    segments.append(
        Segment(
            start, size, padded(size), format.out_features,
            format.vector_len, format.num_centroids, format.num_res_centroids, format.num_groups,
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
    """The nearest centroid of each vector of a column, or the nearest sum of a centroid and a residual.

    Pairs are chosen jointly among several near main centroids, each with its best residual: the nearest main
    centroid alone belongs to the best pair only now and then (the paper takes it always).

    Returns:
        (index, residual index or None, decoded column).
    """
    vectors = segment.split(column)
    if res_codebook is None:
        index = nearest(segment, vectors, codebook)
        return index, None, segment.join(codebook[index])
    index, res_index = _nearest_pair(vectors, codebook, res_codebook)
    if segment.tail < segment.vector_len:
        tail = segment.tail
        last = _nearest_pair(vectors[-1:, :tail], codebook[:, :tail], res_codebook[:, :tail])
        index, res_index = index.at[-1].set(last[0][0]), res_index.at[-1].set(last[1][0])
    return index, res_index, segment.join(codebook[index] + res_codebook[res_index])


def _nearest_pair(
    vectors: Float[Array, "n v"], codebook: Float[Array, "k v"], res_codebook: Float[Array, "kr v"]
) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    candidates = _near_centroids(vectors, codebook)
    rest = vectors[:, None] - codebook[candidates]
    res_index, distance = nearest_centroid(rest.reshape(-1, vectors.shape[1]), res_codebook)
    best = jnp.argmin(distance.reshape(candidates.shape), axis=1)[:, None]
    index = jnp.take_along_axis(candidates, best, axis=1)
    return index[:, 0], jnp.take_along_axis(res_index.reshape(candidates.shape), best, axis=1)[:, 0]


def _near_centroids(vectors: Float[Array, "n v"], codebook: Float[Array, "k v"]) -> Int[Array, "n candidates"]:
    """The nearest centroid and others that are near: the best few of the nearest one in each part of the codebook.

    The order of centroids is random, so hardly any of the really nearest ones share a part, and no sort over
    the whole codebook is needed.
    """
    parts = min(_PARTS, codebook.shape[0])
    size = codebook.shape[0] // parts
    centre = codebook.mean(axis=0)
    centred = codebook - centre
    scores = 0.5 * jnp.sum(jnp.square(centred), axis=-1) - dot(vectors - centre, centred.T)
    scores = scores.reshape(-1, parts, size)
    lowest = scores.min(axis=-1)
    # Two plain reductions: XLA:CPU does not vectorize argmin.
    within = jnp.where(scores == lowest[..., None], jnp.arange(size, dtype=jnp.int32), size).min(axis=-1)
    _, chosen = lax.top_k(-lowest, min(_CANDIDATES, parts))
    return jnp.take_along_axis(within, chosen, axis=1) + chosen * size


def nearest(segment: Segment, vectors: Float[Array, "n v"], codebook: Float[Array, "k v"]) -> Int[Array, " n"]:
    """Nearest centroids; a partial last vector is compared in the rows that it has."""
    index, _ = nearest_centroid(vectors, codebook)
    if segment.tail == segment.vector_len:
        return index
    last, _ = nearest_centroid(vectors[-1:, : segment.tail], codebook[:, : segment.tail])
    return index.at[-1].set(last[0])


def assign_columns(segment: Segment, columns: Float[Array, "slots rows"], codes: Codes) -> Codes:
    """Every vector goes to its nearest main centroid, all columns at once."""
    vectors = segment.split(columns[: segment.size])

    def assign(group: tuple[Array, Array]) -> Int[Array, "size n"]:
        vectors, codebook = group
        index, _ = nearest_centroid(vectors.reshape(-1, segment.vector_len), codebook)
        index = index.reshape(vectors.shape[:2])
        if segment.tail < segment.vector_len:
            last, _ = nearest_centroid(vectors[:, -1, : segment.tail], codebook[:, : segment.tail])
            index = index.at[:, -1].set(last)
        return index

    grouped = vectors.reshape(segment.num_groups, segment.group_size, segment.num_vectors, segment.vector_len)
    index = lax.map(assign, (grouped, codes.codebook)).reshape(segment.size, segment.num_vectors)
    return dataclasses.replace(codes, index=jnp.pad(index, ((0, segment.slots - segment.size), (0, 0))))


def group_books(
    segment: Segment, codes: Codes, slot: Int[Array, ""]
) -> tuple[Float[Array, "k v"], Float[Array, "kr v"] | None]:
    """The main and the residual codebook of a slot's group."""

    def pick(codebooks: Float[Array, "G k v"]) -> Float[Array, "k v"]:
        return codebooks[0] if segment.num_groups == 1 else codebooks[segment.group(slot)]

    return pick(codes.codebook), None if codes.res_codebook is None else pick(codes.res_codebook)
