"""`nearest_centroid` against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vptq_jax.pallas import cluster_sums, nearest_centroid
from vptq_jax.pallas.nearest_centroid import kernel


def _float64_search(vectors, codebook):
    vectors, codebook = np.asarray(vectors, np.float64), np.asarray(codebook, np.float64)
    distances = ((vectors[:, None] - codebook[None]) ** 2).sum(-1)
    return distances.argmin(1), distances


def _check(vectors, codebook, index, distance):
    expected, distances = _float64_search(vectors, codebook)
    index, distance = np.asarray(index), np.asarray(distance)
    assert index.dtype == np.int32
    assert distance.dtype == np.float32
    assert (index == expected).mean() >= 0.999
    rows = np.arange(len(index))
    np.testing.assert_allclose(distances[rows, index], distances[rows, expected], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(distance, distances[rows, index], rtol=1e-5, atol=1e-12)


def _data(n, k, v, seed=0, shift=0.5):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(shift + 0.1 * rng.standard_normal((n, v)), jnp.float32),
        jnp.asarray(shift + 0.1 * rng.standard_normal((k, v)), jnp.float32),
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=st.integers(1, 300), k=st.integers(1, 300), v=st.integers(1, 17), seed=st.integers(0, 99))
def test_agrees_with_float64(n, k, v, seed):
    vectors, codebook = _data(n, k, v, seed)
    _check(vectors, codebook, *jax.jit(nearest_centroid)(vectors, codebook))


def test_many_blocks():
    vectors, codebook = _data(5000, 2500, 6)
    _check(vectors, codebook, *jax.jit(nearest_centroid)(vectors, codebook))


def test_lowest_index_wins_a_tie():
    vectors, codebook = _data(64, 700, 4)
    doubled = jnp.concatenate([codebook, codebook, codebook])
    index, _ = nearest_centroid(vectors, doubled)
    assert int(index.max()) < 700


def test_vmap_is_a_loop():
    vectors, codebook = _data(96, 40, 8)
    batched = jax.vmap(nearest_centroid)(vectors.reshape(3, 32, 8), jnp.stack([codebook, codebook + 0.1, codebook]))
    for b, shift in enumerate((0.0, 0.1, 0.0)):
        single = nearest_centroid(vectors[32 * b : 32 * (b + 1)], codebook + shift)
        np.testing.assert_array_equal(batched[0][b], single[0])
        np.testing.assert_allclose(batched[1][b], single[1], rtol=1e-6)


def test_memory_stays_far_below_all_distances():
    n, k = 100_000, 65_536
    shapes = (jax.ShapeDtypeStruct((n, 8), jnp.float32), jax.ShapeDtypeStruct((k, 8), jnp.float32))
    memory = jax.jit(nearest_centroid).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 << 20


def test_cluster_sums_agree_with_float64():
    rng = np.random.default_rng(0)
    vectors, codebook, weights = rng.normal(size=(500, 6)), rng.normal(size=(20, 6)), rng.exponential(size=500)
    given = [jnp.asarray(array, jnp.float32) for array in (vectors, codebook, weights)]
    index, distance, mass, shift = cluster_sums(*given)
    found = nearest_centroid(*given[:2])
    np.testing.assert_array_equal(index, found[0])
    np.testing.assert_array_equal(distance, found[1])
    for i in range(20):
        mine = np.asarray(index) == i
        np.testing.assert_allclose(mass[i], weights[mine].sum(), rtol=1e-5)
        expected = (weights[mine, None] * (vectors[mine] - codebook[i])).sum(axis=0)
        np.testing.assert_allclose(shift[i], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"weights have shape \(3,\)"):
        cluster_sums(*given[:2], jnp.ones(3))


def test_no_vectors():
    index, distance = nearest_centroid(jnp.zeros((0, 4)), jnp.zeros((3, 4)))
    assert index.shape == distance.shape == (0,)


def test_nan_never_gives_an_index_out_of_range():
    vectors, codebook = _data(8, 16, 4)
    index, distance = nearest_centroid(vectors.at[3].set(jnp.nan), codebook)
    assert int(index.min()) >= 0
    assert int(index.max()) < 16
    assert bool(jnp.isnan(distance[3]))


@pytest.mark.parametrize(
    ("vectors", "codebook", "message"),
    [
        (jnp.zeros((3, 4)), jnp.zeros((5, 2)), "same v"),
        (jnp.zeros(4), jnp.zeros((5, 4)), "expected"),
        (jnp.zeros((3, 4)), jnp.zeros((0, 4)), "empty"),
        (jnp.zeros((3, 4), jnp.int32), jnp.zeros((5, 4)), "floating"),
    ],
)
def test_bad_input_is_named(vectors, codebook, message):
    with pytest.raises(ValueError, match=message):
        nearest_centroid(vectors, codebook)


def test_unknown_implementation():
    with pytest.raises(NotImplementedError, match="xla"):
        nearest_centroid(jnp.zeros((3, 4)), jnp.zeros((5, 4)), implementation="magic")


@pytest.mark.parametrize(
    ("n", "v", "k"),
    [(7_340_032, 8, 65536), (1792, 8, 65536), (100, 6, 256), (5000, 12, 4096), (70_000, 2, 16), (3, 16, 300)],
)
def test_kernel_lowers_to_cuda(n, v, k):
    shapes = jax.ShapeDtypeStruct((n, v), jnp.float32), jax.ShapeDtypeStruct((k, v), jnp.float32)
    text = jax.jit(kernel.nearest_index).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert kernel.Plan(n, v, k, 132).shared_bytes <= 227 * 1024


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="tests the CPU's answer")
def test_mosaic_on_cpu_says_why_not():
    with pytest.raises(NotImplementedError, match="'cpu'"):
        nearest_centroid(jnp.zeros((3, 4)), jnp.zeros((5, 4)), implementation="mosaic")


def test_long_vectors_have_no_kernel():
    with pytest.raises(NotImplementedError, match="vector length 17"):
        nearest_centroid(jnp.zeros((3, 17)), jnp.zeros((5, 17)), implementation="mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "v", "k"),
    [(300, 8, 300), (1000, 6, 4096), (5000, 12, 1024), (70_000, 2, 16), (33, 16, 2048), (2500, 8, 65536), (1, 1, 2)],
)
def test_kernel_agrees_with_float64(n, v, k):
    vectors, codebook = _data(n, k, v)
    found = jax.jit(lambda *a: nearest_centroid(*a, implementation="mosaic"))(vectors, codebook)
    _check(vectors[:2500], codebook, *(array[:2500] for array in found))


@pytest.mark.gpu
def test_kernel_under_vmap_and_with_nan():
    vectors, codebook = _data(96, 40, 8)
    index, distance = jax.vmap(lambda x: nearest_centroid(x, codebook, implementation="mosaic"))(
        vectors.at[5].set(jnp.nan).reshape(3, 32, 8)
    )
    assert bool(jnp.isnan(distance[0, 5]))
    assert 0 <= int(index[0, 5]) < 40
    expected, _ = _float64_search(vectors, codebook)
    np.testing.assert_array_equal(np.delete(index.reshape(-1), 5), np.delete(expected, 5))
