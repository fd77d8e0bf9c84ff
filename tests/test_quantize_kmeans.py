"""Weighted k-means against what is known about it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vptq_jax.quantization.kmeans import importance_sample, kmeans

jitted = functools.partial(jax.jit, static_argnames=("num_centroids", "iterations"))(kmeans)


def weighted_loss(x: np.ndarray, w: np.ndarray, centroids: np.ndarray) -> float:
    distances = ((x[:, None].astype(np.float64) - np.asarray(centroids, np.float64)) ** 2).sum(-1)
    return float((distances.min(1) * w).sum())


def clusters(count: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.permutation(np.stack(np.meshgrid(*[np.arange(4.0) * 10] * 3), -1).reshape(-1, 3))[:count]
    return (centres[:, None] + rng.normal(size=(count, each, 3)) * 0.1).reshape(-1, 3).astype(np.float32), centres


def test_it_finds_the_best_split_of_a_line():
    rng = np.random.default_rng(0)
    x = np.sort(rng.normal(size=60)).astype(np.float32)[:, None]
    w = rng.uniform(0.1, 3, 60).astype(np.float32)

    def split(at: int) -> float:
        return weighted_loss(
            x, w, np.stack([np.average(part, 0, ww) for part, ww in ((x[:at], w[:at]), (x[at:], w[at:]))])
        )

    optimum = min(split(at) for at in range(1, 60))
    runs = [jitted(x, w, num_centroids=2, iterations=50, key=jax.random.key(seed))[0] for seed in range(5)]
    assert min(weighted_loss(x, w, run) for run in runs) <= optimum * 1.001


def test_a_fixed_point_is_where_every_centroid_is_its_weighted_mean():
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(600, 4)).astype(np.float32), rng.uniform(0.1, 5, 600).astype(np.float32)
    centroids, losses = jitted(x, w, num_centroids=16, iterations=300, key=jax.random.key(0))
    losses = np.asarray(losses)[np.isfinite(losses)]
    assert (np.diff(losses) <= 1e-5 * losses[:-1]).all()
    assert len(losses) < 300
    nearest = ((x[:, None] - np.asarray(centroids)) ** 2).sum(-1).argmin(1)
    means = np.stack([np.average(x[nearest == i], axis=0, weights=w[nearest == i]) for i in range(16)])
    np.testing.assert_allclose(np.asarray(centroids), means, atol=0.05)


def test_as_many_centroids_as_points_lose_nothing():
    x = np.random.default_rng(2).normal(size=(32, 3)).astype(np.float32)
    centroids, _ = jitted(x, np.ones(32, np.float32), num_centroids=32, iterations=5, key=jax.random.key(0))
    assert weighted_loss(x, np.ones(32), centroids) < 1e-9


def test_empty_clusters_are_given_the_costliest_vectors():
    # Most starting centroids coincide: without re-seeding only a few of the eight clusters could ever be found.
    x, centres = clusters(8, 3)
    x = np.concatenate([np.repeat(x[:1], 500, axis=0), x])
    w = np.ones(len(x), np.float32)
    centroids, _ = jitted(x, w, num_centroids=16, iterations=50, key=jax.random.key(3))
    assert weighted_loss(x, w, centroids) <= weighted_loss(x, w, centres)


def test_vectors_without_weight_have_no_influence():
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.normal(size=(200, 2)), np.full((200, 2), 1e3)]).astype(np.float32)
    w = np.repeat([1.0, 0.0], 200).astype(np.float32)
    centroids, _ = jitted(x, w, num_centroids=16, iterations=20, key=jax.random.key(0))
    assert np.abs(np.asarray(centroids)).max() < 10


def test_one_key_one_result():
    x = np.random.default_rng(5).normal(size=(500, 4)).astype(np.float32)
    w = np.ones(500, np.float32)
    runs = [jitted(x, w, num_centroids=8, iterations=20, key=jax.random.key(s))[0] for s in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_importance_sample_keeps_the_heavy_and_the_total():
    rng = np.random.default_rng(6)
    w = rng.exponential(size=1000).astype(np.float32)
    w[::100] = 1e4
    position, weights = jax.jit(importance_sample, static_argnums=1)(w, 200, jax.random.key(0))
    assert set(range(0, 1000, 100)) <= set(np.asarray(position).tolist())
    assert (np.asarray(weights) >= w[np.asarray(position)] * 0.999).all()
    assert np.asarray(weights).sum() == pytest.approx(w.sum(), rel=0.01)


def test_importance_sample_is_unbiased():
    rng = np.random.default_rng(7)
    w, value = rng.exponential(size=400).astype(np.float32), rng.normal(size=400)
    sample = jax.jit(importance_sample, static_argnums=1)
    estimates = []
    for seed in range(200):
        position, weights = sample(jnp.asarray(w), 50, jax.random.key(seed))
        estimates.append((np.asarray(weights) * value[np.asarray(position)]).sum())
    spread = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - (w * value).sum()) < 4 * spread + 1e-6
