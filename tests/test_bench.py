"""The benchmark functions on a model small enough for a CPU; speeds are not judged."""

import jax
import pytest

from vptq_jax.cli import benchmarking as bench
from vptq_jax.spec import SearchOptions


@pytest.fixture
def tiny(monkeypatch):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
    monkeypatch.setitem(bench.SHAPES, "tiny", shape)


def test_shapes_have_the_sizes_of_their_names():
    def parameters(name):
        config = bench.model_config(name)
        heads = (config.num_heads + config.num_kv_heads) * config.head_dim * 2
        layer = config.hidden_size * (heads + 3 * config.intermediate_size)
        return config.num_layers * layer + 2 * config.vocab_size * config.hidden_size

    sizes = {"llama2-7b": 6.7e9, "llama2-13b": 13.0e9, "llama2-70b": 69.0e9, "llama3-8b": 8.0e9, "mistral-7b": 7.2e9}
    sizes["smollm2-135m"] = 163e6  # with an output projection of its own, which the real one ties
    assert sizes.keys() == bench.SHAPES.keys()
    for name, size in sizes.items():
        assert parameters(name) == pytest.approx(size, rel=0.02)


def test_unknown_shape_lists_the_known():
    with pytest.raises(ValueError, match="llama2-7b"):
        bench.model_config("llama9")


def test_decode_measures_dense_and_packed(tiny):
    dense, packed = bench.bench_decode("tiny", ["v8-k16-16"], new_tokens=4)
    assert (dense.spec, packed.spec) == ("bf16", "v8-k16-16")
    assert packed.model_bytes < dense.model_bytes
    assert min(dense.tokens_per_second, packed.tokens_per_second) > 0


def test_quantize_reports_a_row_a_spec():
    rows = bench.bench_quantize(["v4-k16"], 32, 48, options=SearchOptions(rounds=0))
    assert [row["spec"] for row in rows] == ["v4-k16"]
    assert 0 < rows[0]["error"] < 1


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="tests the answer without a GPU")
def test_matmul_needs_a_gpu():
    with pytest.raises(NotImplementedError, match="GPU"):
        bench.bench_matmul(["v8-k16"], [(64, 64)])


@pytest.mark.gpu
def test_matmul_times():
    times = bench.bench_matmul(["v8-k256"], [(1024, 1024)], [1, 8])
    assert [(time.spec, time.rows) for time in times] == [("bf16", 1), ("bf16", 8), ("v8-k256", 1), ("v8-k256", 8)]
    assert all(0 < time.microseconds <= 1.01 * time.total_microseconds for time in times)
