"""The XLA implementation: distances in blocks of a bounded size, never all of them at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_CPU_BLOCK_BYTES = 1 << 21  # Stays in the cache of one core.
_GPU_BLOCK_BYTES = 1 << 28
_CPU_BLOCK_ROWS = 2048
_GPU_BLOCK_ROWS = 1 << 14


def nearest_centroid(
    vectors: Float[Array, "n v"], codebook: Float[Array, "k v"]
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The argmin over |c|^2 / 2 - x.c block by block, then the distance from its definition, in float32."""
    count, centroids = vectors.shape[0], codebook.shape[0]
    if count == 0:
        return jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.float32)
    vectors, codebook = vectors.astype(jnp.float32), codebook.astype(jnp.float32)
    rows, columns = _block_shape(count, centroids)
    index = _search(_padded_blocks(vectors, rows, 0.0), codebook, columns)[:count]
    return index, squared_distance(vectors, codebook, index)


def squared_distance(
    vectors: Float[Array, "n v"], codebook: Float[Array, "k v"], index: Int[Array, " n"]
) -> Float[Array, " n"]:
    """Squared distance of every vector from its centroid, from the definition, float32."""
    nearest = codebook.astype(jnp.float32)[index]
    return jnp.sum(jnp.square(vectors.astype(jnp.float32) - nearest), axis=-1)


def _block_shape(count: int, centroids: int) -> tuple[int, int]:
    """Vectors and centroids of one block of float32 scores."""
    cpu = jax.default_backend() == "cpu"
    values = (_CPU_BLOCK_BYTES if cpu else _GPU_BLOCK_BYTES) // 4
    rows = min(count, _CPU_BLOCK_ROWS if cpu else _GPU_BLOCK_ROWS)
    columns = min(centroids, values // rows)
    return min(count, values // columns), columns


def _padded_blocks(array: Array, size: int, fill: float) -> Array:
    padding = [(0, -array.shape[0] % size)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding, constant_values=fill).reshape(-1, size, *array.shape[1:])


def _search(
    blocks: Float[Array, "blocks rows v"], codebook: Float[Array, "k v"], columns: int
) -> Int[Array, " blocks*rows"]:
    # Distances do not change under a shift, and their rounding is smallest around the origin.
    centre = codebook.mean(axis=0)
    centred = codebook - centre
    half_norms = _padded_blocks(0.5 * jnp.sum(jnp.square(centred), axis=-1), columns, jnp.inf)
    candidates = _padded_blocks(centred, columns, 0.0)
    starts = jnp.arange(candidates.shape[0], dtype=jnp.int32) * columns
    within = jnp.arange(columns, dtype=jnp.int32)[:, None]

    def search_rows(rows: Float[Array, "rows v"]) -> Int[Array, " rows"]:
        rows = (rows - centre).T

        def step(carry, block):
            best, index = carry
            candidate, half_norm, start = block
            scores = half_norm[:, None] - jnp.dot(candidate, rows, precision=lax.Precision.HIGHEST)
            lowest = scores.min(axis=0)
            # Two plain reductions: XLA:CPU does not vectorize argmin.
            position = jnp.where(scores == lowest, within, columns).min(axis=0)
            nearer = lowest < best
            return (jnp.where(nearer, lowest, best), jnp.where(nearer, start + position, index)), None

        first = (jnp.full(rows.shape[1], jnp.inf), jnp.zeros(rows.shape[1], jnp.int32))
        return lax.scan(step, first, (candidates, half_norms, starts))[0][1]

    return lax.map(search_rows, blocks).reshape(-1)
