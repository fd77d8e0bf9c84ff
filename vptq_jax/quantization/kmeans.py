"""Hessian-weighted k-means (paper section 3.2), to be jitted by its caller, deterministic under its key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from vptq_jax.pallas.nearest_centroid import cluster_sums

_MOVEMENT_TOLERANCE = 1e-4  # Of the weighted loss: an iteration that gains less than this share is the last.
_MAX_RESEEDS = 256  # Empty clusters filled in one iteration.


def kmeans(
    vectors: Float[Array, "n v"],
    weights: Float[Array, " n"],
    *,
    num_centroids: int,
    iterations: int,
    key: Array,
) -> tuple[Float[Array, "k v"], Float[Array, " iterations"]]:
    """Lloyd's algorithm on weighted vectors.

    Starts from distinct random vectors among those with weight. An empty cluster takes the vector
    that costs most (weight times squared distance). Stops early when the loss no longer falls.

    Args:
        vectors: float32 [n, v], n >= num_centroids.
        weights: float32 [n], >= 0; vectors of weight 0 have no influence.
        num_centroids: k.
        iterations: Lloyd iterations at most.
        key: PRNG key of the starting centroids.

    Returns:
        (centroids [k, v], weighted loss before each iteration [iterations], NaN where not run).
    """
    scores = jnp.where(weights > 0, jax.random.gumbel(key, weights.shape), -jnp.inf)
    start = vectors[lax.top_k(scores, num_centroids)[1]]

    def running(state: tuple[Array, Array, Array]) -> Array:
        i, _, losses = state
        before, last = losses[jnp.maximum(i - 2, 0)], losses[jnp.maximum(i - 1, 0)]
        return (i < iterations) & ((i < 2) | (before - last > _MOVEMENT_TOLERANCE * before))

    def iterate(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        i, centroids, losses = state
        centroids, loss = lloyd_step(vectors, weights, centroids)
        return i + 1, centroids, losses.at[i].set(loss)

    losses = jnp.full(iterations, jnp.nan)
    _, centroids, losses = lax.while_loop(running, iterate, (jnp.zeros((), jnp.int32), start, losses))
    return centroids, losses


def importance_sample(
    weights: Float[Array, " n"], count: int, key: Array
) -> tuple[Int[Array, " count"], Float[Array, " count"]]:
    """A systematic sample that takes vectors in proportion to their weight, and the weights that make it unbiased.

    Vectors heavier than a threshold are all taken and keep their weight; the others are taken with probability
    weight / threshold and weigh as much as the threshold. A uniform sample would miss the few
    columns that decide the loss.

    Args:
        weights: [n], >= 0, not all zero.
        count: size of the sample, at most n.
        key: PRNG key.

    Returns:
        (positions, ascending; weights).
    """
    ordered = jnp.sort(weights)[::-1]
    lighter = jnp.cumsum(ordered[::-1])[::-1]  # Total weight from each position on.
    taken = jnp.arange(weights.shape[0])
    thresholds = lighter / jnp.maximum(count - taken, 1)
    threshold = thresholds[jnp.argmax((ordered <= thresholds) | (taken >= count - 1))]
    reach = jnp.cumsum(jnp.minimum(weights / threshold, 1))
    steps = (jnp.arange(count) + jax.random.uniform(key)) * (reach[-1] / count)
    position = jnp.minimum(jnp.searchsorted(reach, steps, side="right"), weights.shape[0] - 1)
    return position, jnp.maximum(weights[position], threshold)


def lloyd_step(
    vectors: Float[Array, "n v"], weights: Float[Array, " n"], centroids: Float[Array, "k v"]
) -> tuple[Float[Array, "k v"], Float[Array, ""]]:
    """One iteration: assign, move to the weighted means, re-seed what is empty.

    Returns:
        (new centroids, weighted loss of the old ones).
    """
    _, distance, mass, shift = cluster_sums(vectors, centroids, weights)
    cost = weights * distance
    tiny = jnp.finfo(jnp.float32).tiny
    # Clusters without mass keep their centroid.
    means = centroids + jnp.where(mass[:, None] > tiny, shift / jnp.maximum(mass, tiny)[:, None], 0)
    return _reseed(vectors, cost, mass, means), cost.sum()


def _reseed(
    vectors: Float[Array, "n v"], cost: Float[Array, " n"], mass: Float[Array, " k"], centroids: Float[Array, "k v"]
) -> Float[Array, "k v"]:
    count = min(_MAX_RESEEDS, centroids.shape[0], vectors.shape[0])

    def fill(centroids: Array) -> Array:
        worst_cost, worst = lax.top_k(cost, count)
        empty_score, empty = lax.top_k((mass <= 0).astype(jnp.float32), count)
        use = (empty_score > 0) & (worst_cost > 0)
        return centroids.at[empty].set(jnp.where(use[:, None], vectors[worst], centroids[empty]))

    return lax.cond((mass <= 0).any(), fill, lambda centroids: centroids, centroids)
