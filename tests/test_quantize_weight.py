"""`quantize_weight`: every spec, what it reports, what it refuses, and the golden operators."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vptq_jax.format import Format
from vptq_jax.quantization.columns import arrange
from vptq_jax.quantization.metric import factorize
from vptq_jax.quantization.search import check_finite, prepare, quantize_weight, search, store
from vptq_jax.spec import QuantConfig, SearchOptions, VQSpec

FAST = SearchOptions(kmeans_iters=8, rounds=1)


def operator(out_features: int, in_features: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the second moment of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(6 * in_features, in_features // 4)) @ rng.normal(size=(in_features // 4, in_features))
    x = (common + rng.normal(size=common.shape)) * np.exp(0.5 * rng.normal(size=in_features))
    W = rng.normal(size=(out_features, in_features)) * np.exp(0.5 * rng.normal(size=in_features)) + 0.1
    return W.astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def relative_error(W: np.ndarray, array, H: np.ndarray) -> float:
    W, H = np.asarray(W, np.float64), np.asarray(H, np.float64)
    E = np.asarray(array.dequantize(), np.float64) - W
    return float(np.sum((E @ H) * E) / np.sum((W @ H) * W))


@st.composite
def specs(draw) -> VQSpec:
    outliers = draw(st.booleans())
    return VQSpec(
        vector_len=draw(st.integers(1, 5)),
        num_centroids=2 ** draw(st.integers(1, 4)),
        num_res_centroids=draw(st.sampled_from([0, 2, 16])),
        num_groups=draw(st.sampled_from([1, 2, 3])) if outliers else draw(st.sampled_from([1, 2])),
        outlier_percent=draw(st.sampled_from([1.0, 12.5])) if outliers else 0,
        outlier_vector_len=draw(st.integers(1, 3)) if outliers else 0,
        num_outlier_centroids=2 ** draw(st.integers(1, 3)) if outliers else 0,
        normalize=draw(st.booleans()),
        permute=draw(st.booleans()),
    )


@settings(max_examples=5)  # Each compiles programs of its own.
@given(spec=specs(), out_features=st.integers(10, 33), wide=st.booleans())
def test_every_spec_gives_a_valid_array_and_the_error_that_is_reported(spec, out_features, wide):
    W, H = operator(out_features, 140 if wide else 24)
    array, stats = quantize_weight(W, H, spec, key=jax.random.key(0), options=FAST)
    array.validate()
    assert array.shape == W.shape
    assert stats["error"] == pytest.approx(relative_error(W, array, H), rel=2e-3)
    assert stats["error"] < 1
    last = stats["error_residual"] if spec.num_res_centroids else stats["error_pass"]
    assert stats["error"] == stats["error_refine_1"]
    assert stats["error"] <= last * 1.01  # The refined loss is that of the damped Hessian.


def test_the_stages_fall_in_order():
    W, H = operator(64, 96)
    _, stats = quantize_weight(W, H, "v4-k16-16", key=jax.random.key(0), options=SearchOptions(rounds=3, damping=0))
    stages = [stats[f"error_{name}"] for name in ("kmeans", "pass", "residual", "refine_1", "refine_2", "refine_3")]
    assert (np.diff(stages) < 0).all()
    assert stats["error"] == stages[-1]
    assert stats["rounds"] == 3


def test_it_stops_when_a_round_gains_too_little():
    W, H = operator(32, 40)
    _, stats = quantize_weight(W, H, "v4-k16", key=jax.random.key(0), options=SearchOptions(rounds=20, tolerance=0.02))
    assert 1 <= stats["rounds"] < 20
    assert f"error_refine_{stats['rounds']}" in stats
    assert f"error_refine_{stats['rounds'] + 1}" not in stats


@pytest.mark.parametrize("spec", ["v4-k16-noperm", "v4-k16", "v4-k16-nonorm", "v4-k16-16"])
def test_the_exact_metric_beats_rounding_to_the_nearest(spec):
    W, H = operator(64, 96)
    _, stats = quantize_weight(W, H, spec, key=jax.random.key(0), options=SearchOptions(rounds=0))
    assert stats["error_pass"] < 0.75 * stats["error_kmeans"]


def test_one_key_one_result_to_the_bit():
    W, H = operator(30, 40)
    runs = [quantize_weight(W, H, "v4-k16-4-g2-o5v2k8", key=jax.random.key(s), options=FAST)[0] for s in (0, 0, 1)]
    same, other = (
        [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(runs[0]), jax.tree.leaves(run), strict=True)]
        for run in runs[1:]
    )
    assert all(same)
    assert not all(other)


def test_the_order_of_the_inputs_does_not_matter():
    W, H = operator(32, 48)
    order = np.random.default_rng(0).permutation(48)
    a = quantize_weight(W, H, "v4-k16", key=jax.random.key(0), options=FAST)[0].dequantize()
    b = quantize_weight(W[:, order], H[np.ix_(order, order)], "v4-k16", key=jax.random.key(0), options=FAST)[
        0
    ].dequantize()
    np.testing.assert_allclose(np.asarray(a)[:, order], b, atol=1e-3)


def test_the_scale_of_weight_and_hessian_does_not_matter():
    W, H = operator(32, 48)
    a, _ = quantize_weight(W, H, "v4-k16", key=jax.random.key(0), options=FAST)
    b, _ = quantize_weight(W * 2.0**-12, H * 2.0**20, "v4-k16", key=jax.random.key(0), options=FAST)
    np.testing.assert_allclose(np.asarray(a.dequantize()) * 2.0**-12, b.dequantize(), rtol=1e-3, atol=1e-6)


def test_importance_is_the_compensated_cost():
    """Errors weigh in k-means what they cost once the columns behind them have compensated; dead inputs nothing."""
    W, H = operator(24, 32)
    H[5] = H[:, 5] = 0  # A dead input.
    columns = arrange(Format.of("v4-k16-o12.5v2k8", (24, 32)))[1]
    metric = factorize(jnp.asarray(H), damping=0.01, permute=True)
    problem = prepare(jnp.asarray(W), metric, columns, normalize=True)
    unit = np.asarray(metric.H)[0, 0] / H[0, 0]
    assert np.log2(unit) == int(np.log2(unit))
    H = np.asarray(H, np.float64) * unit
    live = np.diag(H) > 0
    H += np.diag(np.where(live, 0.01 * np.diag(H)[live].mean(), 1))
    perm = np.asarray(problem.perm)
    H = H[perm][:, perm]
    # What is left of H_qq when the columns behind q are minimized over: a Schur complement.
    cost = [H[q, q] - H[q, q + 1 :] @ np.linalg.solve(H[q + 1 :, q + 1 :], H[q + 1 :, q]) for q in range(32)]
    expected = np.where(live[perm], cost, 0)[np.maximum(columns, 0)]
    np.testing.assert_allclose(problem.importance, np.where(columns >= 0, expected, 0), rtol=1e-4)


def test_rows_that_only_pad_do_not_disturb():
    """31 rows in vectors of 8: the error per row is that of 32 rows, not that of a codebook full of zeros."""
    W, H = operator(32, 64)
    W = W + 5
    errors = [quantize_weight(W[:rows], H, "v8-k16-nonorm", key=jax.random.key(0))[1]["error"] for rows in (31, 32)]
    assert errors[0] < 1.15 * errors[1]


def test_fewer_rows_than_a_vector_is_long():
    W, H = operator(3, 40)
    array, stats = quantize_weight(W, H, "v8-k16", key=jax.random.key(0), options=FAST)
    array.validate()
    assert stats["error"] < 0.5


def test_as_many_centroids_as_vectors_lose_nothing():
    W, H = operator(16, 8)
    array, stats = quantize_weight(W, H, "v4-k32", key=jax.random.key(0), options=SearchOptions(rounds=0))
    np.testing.assert_allclose(array.dequantize(), W, atol=1e-5)
    assert stats["error"] < 1e-9


def test_equal_shapes_run_as_one_program():
    pairs = [operator(24, 32, seed) for seed in range(3)]
    W, H = (jnp.stack(part) for part in zip(*pairs, strict=True))
    keys = jax.random.split(jax.random.key(0), 3)
    spec = VQSpec.parse("v4-k16-4")
    batched = jax.vmap(lambda W, H, key: search(W, H, key, format=Format.of(spec, (24, 32)), options=FAST))
    errors = batched(W, H, keys)[1]["error"]
    for i, (W_one, H_one) in enumerate(pairs):
        _, stats = quantize_weight(W_one, H_one, spec, key=keys[i], options=FAST)
        assert float(errors[i]) == pytest.approx(stats["error"], rel=0.02)


def test_a_factorized_hessian_gives_the_same_to_the_bit():
    W, H = operator(32, 48)
    metric = factorize(jnp.asarray(H), damping=FAST.damping, permute=True)
    for part in (W, W[:, ::-1]):
        direct, facts = quantize_weight(part, H, "v4-k16-8", key=jax.random.key(1), options=FAST)
        shared, same = quantize_weight(part, metric, "v4-k16-8", key=jax.random.key(1), options=FAST)
        assert facts == same
        assert jax.tree.all(jax.tree.map(jnp.array_equal, direct, shared))


def test_a_metric_of_other_options_is_refused():
    W, H = operator(16, 32)
    metric = factorize(jnp.asarray(H), damping=0.5, permute=True)
    message = r"damping, permute\) = \(32, 0.5, True\); expected \(32, 0.01, False\)"
    with pytest.raises(ValueError, match=message):
        quantize_weight(W, metric, "v4-k16-noperm", key=jax.random.key(0))


def test_constant_columns_are_kept():
    W, H = operator(32, 40)
    W[:, 3], W[:, 7] = 0.25, 0
    array, _ = quantize_weight(W, H, "v4-k16", key=jax.random.key(0), options=FAST)
    array.validate()
    np.testing.assert_allclose(np.asarray(array.dequantize())[:, [3, 7]], W[:, [3, 7]], atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_constant_weight_is_kept(value):
    _, H = operator(32, 40)
    W = np.full((32, 40), value, np.float32)
    array, stats = quantize_weight(W, H, "v4-k16", key=jax.random.key(0), options=FAST)
    np.testing.assert_allclose(array.validate().dequantize(), W, atol=1e-4)
    assert np.isfinite(list(stats.values())).all()


@pytest.mark.parametrize("spec", ["v4-k16", "v4-k16-nonorm", "v4-k16-4-o10v2k4"])
def test_dead_inputs_are_reported_and_harmless(spec):
    W, H = operator(32, 40)
    H[[2, 9]] = 0
    H[:, [2, 9]] = 0
    array, stats = quantize_weight(W, H, spec, key=jax.random.key(0), options=FAST)
    array.validate()
    assert stats["dead_columns"] == 2
    live, H_live = np.delete(W, [2, 9], 1), np.delete(np.delete(H, [2, 9], 0), [2, 9], 1)
    _, alone = quantize_weight(live, H_live, spec, key=jax.random.key(0), options=FAST)
    assert stats["error"] < 1.25 * alone["error"]


def test_a_hessian_of_few_tokens_is_damped_and_reported():
    W, _ = operator(32, 64)
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    array, stats = quantize_weight(
        W, x.T @ x / 4, "v4-k16", key=jax.random.key(0), options=dataclasses.replace(FAST, damping=0)
    )
    array.validate()
    assert 0 < stats["damping"] <= 0.01
    assert np.isfinite(list(stats.values())).all()


@pytest.mark.parametrize(
    ("W", "H", "spec", "message"),
    [
        (np.full((16, 8), np.nan, np.float32), np.eye(8), "v4-k4", "the weight holds NaN"),
        (np.ones((16, 8, 2), np.float32), np.eye(8), "v4-k4", r"expected \[out_features, in_features\]"),
        (np.ones((16, 8), np.int32), np.eye(8), "v4-k4", "dtype int32"),
        (np.ones((16, 8), np.float32), np.eye(9), "v4-k4", r"expected \(8, 8\)"),
        (np.ones((16, 8), np.float32), np.zeros((8, 8)), "v4-k4", "all zeros"),
        (np.ones((16, 8), np.float32), np.diag(np.full(8, np.inf)), "v4-k4", "NaN or infinite"),
        (np.ones((16, 8), np.float32), np.eye(8) - 2 * np.ones((8, 8)), "v4-k4", "diagonal goes down"),
        (np.ones((16, 8), np.float32), 0.01 * np.eye(8) + np.fliplr(np.eye(8)), "v4-k4", "not positive"),
        (np.ones((16, 8), np.float32), np.eye(8), "v4-k64", "64 centroids of length 4 for only 32 vectors"),
        (np.ones((16, 8), np.float32), np.eye(8), "v4-k4-64", "64 residual centroids of length 4 for only 32 vectors"),
        (np.ones((16, 8), np.float32), np.eye(8), "v4-k4-g3", "do not divide into 3 groups"),
    ],
)
def test_bad_input_is_refused_by_name(W, H, spec, message):
    with pytest.raises(ValueError, match=message) as error:
        quantize_weight(W, np.asarray(H, np.float32), spec, key=jax.random.key(0), name="model.layers.1.mlp.up_proj")
    assert "model.layers.1.mlp.up_proj" in str(error.value)


@pytest.mark.parametrize("name", ["L0_q_proj", "L10_up_proj", "L20_down_proj"])
@pytest.mark.parametrize(("spec", "config"), [("v4-k256", "a_v4_k256"), ("v8-k256-256", "c_v8_k256_r256")])
def test_golden_operators_beat_the_original(shared, name, spec, config):
    """Without refinement better than the original, with it by a quarter at least."""
    directory = shared / "golden" / "operators"
    runs = json.loads((directory / "reference_errors.json").read_text())["operators"][name]["runs"]
    runs = [run for run in runs if run["config"] == config and run["kind"] == "reference"]
    original = min(run.get("after_residual", run["after_vptq"])["true"] for run in runs)
    data = np.load(directory / f"{name}.npz")
    array, stats = quantize_weight(
        data["weight"], data["hessian"], spec, key=jax.random.key(0), options=SearchOptions(rounds=1)
    )
    assert stats["error_residual" if "error_residual" in stats else "error_pass"] < original
    assert relative_error(data["weight"], array, data["hessian"]) < 0.8 * original


@pytest.mark.parametrize("spec", ["v4-k16", "v4-k16-nonorm", "v4-k16-4-o10v2k4"])
@pytest.mark.parametrize(("of_weight", "of_hessian"), [(100, 0), (-100, 0), (0, 100), (0, -96), (90, -60), (-98, 100)])
def test_units_of_weight_and_hessian_change_nothing(spec, of_weight, of_hessian):
    W, H = operator(32, 40)
    array, stats = quantize_weight(W, H, spec, key=jax.random.key(0), options=FAST)
    scaled, found = quantize_weight(
        np.ldexp(W, of_weight), np.ldexp(H, of_hessian), spec, key=jax.random.key(0), options=FAST
    )
    assert found == stats
    np.testing.assert_array_equal(scaled.indices, array.indices)
    np.testing.assert_array_equal(np.asarray(scaled.dequantize()), np.ldexp(np.asarray(array.dequantize()), of_weight))


def test_weights_of_dead_inputs_do_not_set_the_unit():
    W, H = operator(32, 40)
    H[[2, 9]] = 0
    H[:, [2, 9]] = 0
    array, stats = quantize_weight(W, H, "v4-k16", key=jax.random.key(0), options=FAST)
    W[:, 2] = 1e30
    large, found = quantize_weight(W, H, "v4-k16", key=jax.random.key(0), options=FAST)
    assert found == stats
    jax.tree.map(np.testing.assert_array_equal, large, array)


@pytest.mark.parametrize("factor", [1e30, 1e-30, 3.0])
def test_any_units_give_the_same_relative_error(factor):
    W, H = operator(32, 40)
    _, stats = quantize_weight(W, H, "v4-k16", key=jax.random.key(0), options=FAST)
    for weight, hessian in ((W * np.float32(factor), H), (W, H * np.float32(factor))):
        _, found = quantize_weight(weight, hessian, "v4-k16", key=jax.random.key(0), options=FAST)
        np.testing.assert_allclose(found["error"], stats["error"], rtol=0.05)


def true_error(array, W, H):
    """tr(E H E^T) / tr(W H W^T) in float64."""
    E = np.asarray(array.dequantize(), np.float64) - np.asarray(W, np.float64)
    H, W = np.asarray(H, np.float64), np.asarray(W, np.float64)
    return np.sum(E @ H * E) / np.sum(W @ H * W)


@pytest.mark.parametrize("factor", [1.0, 1e-5, 1e-6, 1e-7, 1e-8, 1e-20, 1e6, 1e20])
def test_what_is_stored_has_the_error_that_is_reported(factor):
    W, H = operator(32, 40)
    W = W * np.float32(factor)
    array, stats = quantize_weight(W, H, "v4-k64", key=jax.random.key(0), options=FAST)
    stored, error, wide = store(array, jnp.asarray(W), jnp.asarray(H), stats["error"])
    stored.validate()
    np.testing.assert_allclose(error, true_error(stored, W, H), rtol=1e-4)
    np.testing.assert_allclose(error, stats["error"], rtol=0.011)
    assert bool(wide) == (not 1e-5 <= factor < 1e5)
    assert stored.codebook.dtype == jnp.float16
    assert (stored.scale.dtype == jnp.float16) == (not wide)


def test_a_result_that_is_not_finite_is_an_error():
    W, H = operator(32, 40)
    array, stats = quantize_weight(W, H, "v4-k16", key=jax.random.key(0), options=FAST)
    check_finite(array, stats, "layer 7")
    with pytest.raises(ValueError, match=r"layer 7: .*NaN or infinite \(scale\)"):
        check_finite(dataclasses.replace(array, scale=array.scale.at[3].set(jnp.inf)), stats, "layer 7")
    with pytest.raises(ValueError, match=r"layer 7: .*NaN or infinite \(error\)"):
        check_finite(array, stats | {"error": float("nan")}, "layer 7")
    with pytest.raises(ValueError, match="the Hessian holds NaN or infinite"):
        quantize_weight(W, H.astype(np.float64) * 1e300, "v4-k16", key=jax.random.key(0), options=FAST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kmeans_iters": 1.5}, "kmeans_iters is 1.5; expected a whole number"),
        ({"samples_per_centroid": 0}, "samples_per_centroid is 0; expected a whole number of at least 1"),
        ({"rounds": True}, "rounds is True; expected a whole number"),
        ({"tolerance": float("nan")}, "tolerance is nan; expected a number of at least 0"),
        ({"damping": "much"}, "damping is 'much'; expected a number"),
    ],
)
def test_options_of_the_wrong_kind(options, message):
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)
    with pytest.raises(ValueError, match=message):
        QuantConfig("v4-k16", **options)
