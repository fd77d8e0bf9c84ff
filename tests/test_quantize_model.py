"""`quantize` on whole models: rules, modes, streaming, resuming, bad input."""

import contextlib
import gc
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.hessians import collect_hessians
from vptq_jax.lm.params import DenseSource, RandomSource
from vptq_jax.lm.quantizer import StreamedModel, quantize
from vptq_jax.lm.registry import build
from vptq_jax.nn import quantizer as driver
from vptq_jax.nn.hessians import Hessians
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.nn.quantizer import operator_key
from vptq_jax.quantization import metric
from vptq_jax.quantization.metric import factorize
from vptq_jax.quantization.search import quantize_weight
from vptq_jax.spec import QuantConfig, SearchOptions, VQSpec

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
OPTIONS = {"rounds": 0, "kmeans_iters": 3}


def tiny_config(**changes):
    """Two blocks whose linear layers all have one shape, so that little is compiled."""
    values = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return ModelConfig.from_hf(values | changes)


def config(spec="v4-k16", **changes):
    return QuantConfig(spec, **(OPTIONS | changes))


@pytest.fixture(scope="module")
def model():
    return build(tiny_config(), RandomSource(jax.random.key(0), std=0.2))


@pytest.fixture(scope="module")
def batches():
    return [np.asarray(jax.random.randint(jax.random.key(i), (2, 16), 0, 64)) for i in range(3)]


@pytest.fixture(scope="module")
def hessians(model, batches):
    return collect_hessians(model, batches, progress=False)


@pytest.fixture
def made(monkeypatch):
    """Paths that were really quantized, with their weight and Hessian."""
    calls, given = {}, {}
    metric_of = metric.LastMetric.of

    def spy_metric(self, hessian, in_features, name, *options):
        given[name] = np.asarray(hessian)
        return metric_of(self, hessian, in_features, name, *options)

    def spy(weight, hessian, spec, **options):
        calls[options["name"]] = (np.asarray(weight), given[options["name"]])
        return quantize_weight(weight, hessian, spec, **options)

    monkeypatch.setattr(metric.LastMetric, "of", spy_metric)
    monkeypatch.setattr(driver, "quantize_weight", spy)
    return calls


def arrays(model: Decoder):
    layers = model.linears() | {"lm_head": model.lm_head, "model.embed_tokens": model.embed_tokens}
    return {path: layer.weight for path, layer in layers.items() if isinstance(layer, VQLinear)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        jax.tree.map(np.testing.assert_array_equal, found[path], array)
        assert found[path].format == array.format


def test_every_layer_is_quantize_weight_with_its_own_key(model, hessians):
    quantized, report = quantize(model, config(seed=3), hessians, progress=False)
    assert list(arrays(quantized)) == list(model.linears())
    for path in (Q0, DOWN1):
        weight = model.linears()[path].weight[...]
        key = operator_key(3, path)
        options = SearchOptions(**OPTIONS)
        expected, stats = quantize_weight(weight, hessians.for_module(path), "v4-k16", key=key, options=options)
        found = arrays(quantized)[path]
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.codebook, expected.codebook.astype(jnp.float16))
        row = next(row for row in report.operators if row["path"] == path)
        assert row["error_pass"] == stats["error_pass"]
        assert row["bits_nominal"] == 1.0
        assert row["bits_total"] == found.bits_per_weight
    assert isinstance(model.linears()[Q0], Linear), "the given model has been changed"
    assert np.isfinite(quantized(np.zeros((1, 8), np.int32))).all()


def test_batches_give_what_collected_hessians_give(model, batches, hessians):
    along, _ = quantize(model, config(), batches, progress=False)
    before, _ = quantize(model, config(), hessians, progress=False)
    assert_same(arrays(along), arrays(before))


def test_first_matching_rule_wins_and_none_leaves_a_layer_dense(model, hessians):
    rules = [(r"layers\.0\.self_attn", "v8-k16"), (r"layers\.0", None), ("lm_head|embed", "v4-k32")]
    quantized, report = quantize(model, config(rules=rules), hessians, progress=False)
    specs = {path: row["spec"] for row in report.operators for path in [row["path"]]}
    assert specs[Q0] == "v8-k16"
    assert "model.layers.0.mlp.up_proj" not in specs
    assert isinstance(quantized.linears()["model.layers.0.mlp.up_proj"], Linear)
    assert specs[DOWN1] == "v4-k16"
    assert specs["lm_head"] == specs["model.embed_tokens"] == "v4-k32"
    assert set(arrays(quantized)) == set(specs)


def test_tied_embedding_is_quantized_in_the_metric_of_the_output_projection(batches, made):
    model = build(tiny_config(tie_word_embeddings=True), RandomSource(jax.random.key(0), std=0.2))
    hessians = collect_hessians(model, batches, progress=False)
    quantized, _ = quantize(model, config(None, rules=[("embed", "v4-k16")]), hessians, progress=False)
    assert list(arrays_tied(quantized)) == ["model.embed_tokens"]
    hidden = np.concatenate([np.asarray(last_hidden(model, batch)).reshape(-1, 32) for batch in batches])
    np.testing.assert_allclose(made["model.embed_tokens"][1], hidden.T @ hidden / len(hidden), rtol=1e-4, atol=1e-5)


def arrays_tied(model):
    assert model.lm_head is None
    return {"model.embed_tokens": model.embed_tokens.weight}


def last_hidden(model, tokens):
    h, at = model.embed(jnp.asarray(tokens)), model.rotary(jnp.arange(tokens.shape[1])[None])
    for block in model.layers:
        h = block(h, at)
    return model.norm(h)


def test_operators_do_not_depend_on_each_other(model, hessians):
    everything, _ = quantize(model, config(), hessians, progress=False)
    alone, _ = quantize(model, config(None, rules=[("down_proj", "v4-k16")]), hessians, progress=False)
    for path, array in arrays(alone).items():
        jax.tree.map(np.testing.assert_array_equal, array, arrays(everything)[path])


def test_rules_that_match_nothing_are_refused(model, hessians):
    with pytest.raises(ValueError, match=r"rule 'layer7' matches no layer; near it are .*model\.layers"):
        quantize(model, config(rules=[("layer7", None)]), hessians, progress=False)
    quantize(model, config(rules=[("lm_head", None)]), hessians, progress=False)


def test_sequential_hessians_come_from_what_is_quantized_before(model, batches, made):
    quantized, _ = quantize(model, config(mode="sequential"), batches, progress=False)
    prefix = build(model.config, RandomSource(jax.random.key(0), std=0.2))
    full = collect_hessians(model, batches, progress=False)
    for path, layer in quantized.linears().items():
        if path.endswith(("q_proj", "o_proj", "gate_proj", "down_proj")):
            expected = collect_hessians(prefix, batches, progress=False).for_module(path)
            np.testing.assert_allclose(made[path][1], expected, rtol=1e-3, atol=1e-5)
            assert path == Q0 or full.for_module(path) != pytest.approx(expected, rel=1e-2)
        prefix.set_linear(path, layer)
    np.testing.assert_array_equal(made[DOWN1][0], model.linears()[DOWN1].weight[...])


class StoredTensors(DenseSource):
    """Host arrays, handed out anew at each request; counts the device arrays of blocks that are alive."""

    def __init__(self, model):
        self.stored = {f"{path}.weight": np.asarray(layer.weight[...]) for path, layer in model.linears().items()}
        self.stored |= {"model.embed_tokens.weight": np.asarray(model.embed_tokens.weight[...])}
        self.stored |= {"lm_head.weight": np.asarray(model.lm_head.weight[...])}
        self.stored |= {"model.norm.weight": np.asarray(model.norm.weight[...])}
        for layer, block in enumerate(model.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.stored[f"model.layers.{layer}.{norm}.weight"] = np.asarray(getattr(block, norm).weight[...])
        self.alive, self.most = weakref.WeakSet(), 0

    def tensor(self, name, shape):
        assert self.stored[name].shape == shape
        array = jnp.array(self.stored[name])
        if name.endswith("proj.weight"):
            gc.collect()
            self.alive.add(_Token(array))
            self.most = max(self.most, len(self.alive))
        return array


class _Token:
    """Lives as long as an array does."""

    def __init__(self, array):
        weakref.finalize(array, lambda token: None, self)


def test_streamed_model_gives_the_same_and_never_loads_more_than_a_block(batches):
    model = build(tiny_config(num_hidden_layers=4), RandomSource(jax.random.key(0), std=0.2))
    expected, _ = quantize(model, config(), batches, progress=False)
    source = StoredTensors(model)
    quantized, report = quantize(StreamedModel(model.config, source, "a tokenizer"), config(), batches, progress=False)
    assert_same(arrays(quantized.module), arrays(expected))
    assert quantized.tokenizer == "a tokenizer"
    np.testing.assert_array_equal(quantized(batches[0]), expected(batches[0]))
    assert len(report.operators) == 28
    assert 7 <= source.most <= 14, f"{source.most} dense layers at once; a block has 7"


def test_finished_operators_are_kept_and_the_rest_is_made(model, hessians, tmp_path, made, monkeypatch):
    whole, report = quantize(model, config(), hessians, workdir=tmp_path / "whole", progress=False)
    made.clear()
    spy = driver.quantize_weight

    def interrupted(*args, **options):
        if len(made) == 5:
            raise KeyboardInterrupt
        return spy(*args, **options)

    monkeypatch.setattr(driver, "quantize_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, config(), hessians, workdir=tmp_path / "work", progress=False)
    monkeypatch.setattr(driver, "quantize_weight", spy)
    finished = list(made)
    assert len(finished) == 5
    made.clear()
    resumed, resumed_report = quantize(model, config(), hessians, workdir=tmp_path / "work", progress=False)
    assert len(made) == 9
    assert not set(made) & set(finished)
    assert_same(arrays(resumed), arrays(whole))
    assert same_files(tmp_path / "work", tmp_path / "whole")
    strip = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in r.operators] for r in (report, resumed_report)
    ]
    assert strip[0] == strip[1]
    assert all(row["seconds"] > 0 for row in resumed_report.operators)


def same_files(one, other):
    files = [{f.name: f.read_bytes() for f in d.iterdir() if f.name != "seconds.jsonl"} for d in (one, other)]
    return files[0] == files[1]


@pytest.mark.parametrize("mode", ["independent", "sequential"])
def test_resuming_with_batches(model, batches, tmp_path, made, mode):
    whole, _ = quantize(model, config(mode=mode), batches, workdir=tmp_path, progress=False)
    removed = [path for path in made if path.startswith("model.layers.1.mlp")]
    for path in removed:
        (tmp_path / f"{path}.safetensors").unlink()
    made.clear()
    again, report = quantize(model, config(mode=mode), batches, workdir=tmp_path, progress=False)
    assert list(made) == removed
    assert_same(arrays(again), arrays(whole))
    made.clear()
    done, report = quantize(model, config(mode=mode), batches, workdir=tmp_path, progress=False)
    assert not made
    assert report.seconds["calibration"] == 0, "nothing is left to do, yet the batches were run"
    assert_same(arrays(done), arrays(whole))


def test_changed_inputs_refuse_to_resume_and_say_what_changed(model, batches, hessians, tmp_path):
    quantize(model, config(None, rules=[("down_proj", "v4-k16")]), hessians, workdir=tmp_path, progress=False)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def refused(message, given=model, calibration=hessians, **changes):
        options = {"rules": [("down_proj", "v4-k16")]} | changes
        with pytest.raises(ValueError, match=message):
            quantize(given, config(None, **options), calibration, workdir=tmp_path, progress=False)

    refused(r"config\.seed: 0 then, 1 now", seed=1)
    refused(r"config\.rules: .*v4-k16.* then, .*v4-k32.* now", rules=[("down_proj", "v4-k32")])
    refused(r"config\.rounds: 0 then, 2 now", rounds=2)
    other_shape = build(tiny_config(rms_norm_eps=1e-6), RandomSource(jax.random.key(0), std=0.2))
    refused(r"model\.rms_norm_eps: 1e-05 then, 1e-06 now", other_shape)
    other_weights = build(tiny_config(), RandomSource(jax.random.key(1), std=0.2))
    refused(r"weight: '\w+' then, '\w+' now", other_weights, collect_hessians(other_weights, batches, progress=False))
    refused(r"hessian: '\w+' then, '\w+' now", calibration=collect_hessians(model, batches[:1], progress=False))
    refused("token ids: 'absent' then", calibration=batches)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_other_calibration_text_refuses_to_resume(model, batches, tmp_path):
    rules = {"rules": [("0.self_attn.q_proj", "v4-k16")]}
    quantize(model, config(None, **rules), batches, workdir=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"token ids: '\w+' then, '\w+' now"):
        quantize(model, config(None, **rules), batches[:2], workdir=tmp_path, progress=False)


def test_work_directory_with_other_files_is_refused(model, hessians, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds files but no run\.json"):
        quantize(model, config(), hessians, workdir=tmp_path, progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_operator_file_is_named(model, hessians, tmp_path):
    rules = {"rules": [("0.self_attn.q_proj", "v4-k16")]}
    quantize(model, config(None, **rules), hessians, workdir=tmp_path, progress=False)
    file = tmp_path / f"{Q0}.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"q_proj\.safetensors is damaged .*delete it"):
        quantize(model, config(None, **rules), hessians, workdir=tmp_path, progress=False)


def test_full_disk_leaves_finished_operators_usable(model, hessians, tmp_path, made, monkeypatch):
    import os

    whole, _ = quantize(model, config(), hessians, progress=False)
    made.clear()
    sync = os.fsync

    def full(descriptor):
        if len(made) > 4:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr("vptq_jax.files.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*safetensors"):
        quantize(model, config(), hessians, workdir=tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    resumed, _ = quantize(model, config(), hessians, workdir=tmp_path, progress=False)
    assert_same(arrays(resumed), arrays(whole))


def test_unwritable_work_directory(model, hessians, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        quantize(model, config(), hessians, workdir=tmp_path / "file" / "work", progress=False)


class CountedReads(dict):
    """Hessians as files give them: a new array at every read."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.reads = []

    def __getitem__(self, key):
        self.reads.append(key)
        return np.array(super().__getitem__(key))


def test_layers_that_share_an_input_read_and_factorize_its_hessian_once(model, hessians, tmp_path, monkeypatch):
    whole, _ = quantize(model, config(), hessians, progress=False)
    counted = CountedReads({key: hessians.arrays[key] for key in hessians.arrays})
    factorized = []
    monkeypatch.setattr(
        metric, "factorize", lambda H, **options: (factorized.append(H.shape), factorize(H, **options))[1]
    )
    files = Hessians(counted, hessians.modules, hessians.tokens, hessians.fingerprint)
    counted.reads.clear()  # a check of annotations may have looked at one
    again, _ = quantize(model, config(), files, workdir=tmp_path, progress=False)
    assert_same(arrays(again), arrays(whole))
    # Inputs of q/k/v, o, gate/up and down in two blocks, and the check of all of them before work starts.
    assert len(factorized) == 8
    assert sorted(counted.reads) == sorted(2 * [key for key in hessians.modules if key != "lm_head"])


def changed(hessians: Hessians, path, change):
    arrays = {key: np.array(hessians.arrays[key]) for key in hessians.arrays}
    arrays[path] = change(arrays[path])
    return Hessians(arrays, hessians.modules, hessians.tokens, hessians.fingerprint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[:8, :8], r"shape \(8, 8\); expected \(32, 32\)"),
        (lambda h: np.full_like(h, np.nan), "NaN or infinite"),
        (lambda h: h + np.triu(np.full_like(h, h.max()), 1), "not symmetric"),
        (lambda h: -h, "diagonal"),
        (np.zeros_like, "all zeros"),
    ],
)
def test_bad_hessians_are_named_before_work_starts(model, hessians, tmp_path, made, change, message):
    with pytest.raises(ValueError, match=rf"{DOWN1}.*{message}"):
        quantize(model, config(), changed(hessians, DOWN1, change), workdir=tmp_path, progress=False)
    assert not made
    assert not list(tmp_path.iterdir())


def test_dead_inputs_and_singular_hessians_are_handled_and_reported():
    model = build(tiny_config(), RandomSource(jax.random.key(0), std=0.2))
    norm = model.layers[1].input_layernorm.weight
    norm.set_value(norm[...].at[jnp.array([3, 8])].set(0))
    few = [np.arange(8)[None]]  # 8 tokens for 32 inputs: every Hessian is singular
    quantized, report = quantize(model, config(), few, progress=False)
    dead = {row["path"]: row["dead_columns"] for row in report.operators}
    assert [path.rpartition(".")[2] for path, count in dead.items() if count] == ["q_proj", "k_proj", "v_proj"]
    assert dead["model.layers.1.self_attn.k_proj"] == 2
    assert all(np.isfinite(row["error"]) and row["damping"] > 0.0099 for row in report.operators)
    assert np.isfinite(quantized(few[0])).all()


def test_hessians_of_another_model(model, batches, made):
    other = build(tiny_config(), RandomSource(jax.random.key(1), std=0.2))
    hessians = collect_hessians(other, batches, progress=False)
    with pytest.raises(ValueError, match=r"collected on another model: model\.layers\.0\.self_attn\.q_proj\.weight"):
        quantize(model, config(), hessians, progress=False)
    with pytest.raises(ValueError, match="collected on another model"):
        quantize(StreamedModel(model.config, StoredTensors(model)), config(), hessians, progress=False)
    assert not made


def test_missing_hessians(model, hessians):
    modules = {key: paths for key, paths in hessians.modules.items() if "layers.1.mlp" not in key}
    partial = Hessians(hessians.arrays, modules, hessians.tokens)
    with pytest.raises(ValueError, match=r"no Hessian for model\.layers\.1\.mlp\.gate_proj and 2 other layers"):
        quantize(model, config(), partial, progress=False)


def test_sequential_mode_needs_batches(model, hessians):
    with pytest.raises(ValueError, match="'sequential' collects Hessians while it quantizes"):
        quantize(model, config(mode="sequential"), hessians, progress=False)


def test_weights_must_be_finite(hessians, made, tmp_path):
    broken = build(tiny_config(), RandomSource(jax.random.key(0), std=0.2))
    weight = broken.linears()[DOWN1].weight[...]
    broken.set_linear(DOWN1, Linear(weight.at[3, 4].set(jnp.inf)))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinite"):
        quantize(broken, config(), hessians, workdir=tmp_path / "w", progress=False)
    assert not made
    assert not (tmp_path / "w").exists()


def test_specs_that_do_not_fit_are_listed(model, hessians):
    rules = [("q_proj", "v4-k4096"), ("down", "v4-k16-g5")]
    with pytest.raises(ValueError, match=r"(?s)4 layers cannot.*q_proj.*v4-k4096.*centroids.*down_proj.*5 groups"):
        quantize(model, config(rules=rules), hessians, progress=False)


def test_nothing_to_quantize(model, hessians):
    with pytest.raises(ValueError, match="no layer has a spec"):
        quantize(model, config(None), hessians, progress=False)


def test_quantized_models_are_refused(model, hessians):
    quantized, _ = quantize(model, config(), hessians, progress=False)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantized, config(), hessians, progress=False)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration batches"),
        ([np.full((1, 4), 64)], r"calibration batch 0: token id 64 .* 0 to 63"),
        ([np.zeros((1, 4), np.int32), np.full((1, 4), -1)], "calibration batch 1: token id -1"),
        ([np.zeros(4, np.int32)], "expected integer token ids"),
        ([np.zeros((1, 4))], "expected integer token ids"),
        ([np.zeros((1, 0), np.int32)], "expected at least a token"),
    ],
)
def test_bad_batches(model, tmp_path, batches, message):
    with pytest.raises(ValueError, match=message):
        quantize(model, config(), batches, workdir=tmp_path / "w", progress=False)
    assert not (tmp_path / "w").exists()


def test_run_record_is_readable(model, hessians, tmp_path):
    quantize(model, config(rules=[("down", None)]), hessians, workdir=tmp_path, progress=False)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["spec"] == "v4-k16"
    assert record["config"]["rules"] == [["down", None]]
    assert VQSpec.parse(record["config"]["spec"]) == VQSpec(4, 16)


def test_stored_checkpoints_are_streamed(tiny_hf, tmp_path):
    from vptq_jax.convert.loading import load, open_streamed

    rules = [("layers.1.self_attn.o_proj", "v4-k16")]
    batches = [np.arange(64).reshape(2, 32)]
    loaded, _ = quantize(load(tiny_hf), config(None, rules=rules), batches, progress=False)
    stored = open_streamed(tiny_hf)
    streamed, _ = quantize(stored, config(None, rules=rules), batches, progress=False)
    assert_same(arrays(streamed.module), arrays(loaded.module))
    np.testing.assert_array_equal(streamed(batches[0]), loaded(batches[0]))
    assert streamed.tokenizer.encode("the fox") == loaded.tokenizer.encode("the fox")
    assert streamed.config == loaded.config
    assert streamed.generation_config == loaded.generation_config
    with pytest.raises(FileNotFoundError):
        open_streamed(tmp_path)


def test_gguf_is_streamed(smollm2_gguf):
    from vptq_jax.convert.loading import open_streamed

    stored = open_streamed(smollm2_gguf)
    assert stored.config.num_layers == 30
    assert stored.tokenizer is not None
    weight = stored.source.linear("model.layers.29.self_attn.k_proj", 192, 576, bias=False).weight[...]
    assert weight.shape == (192, 576)
    assert np.isfinite(weight).all()


def test_the_final_norm_counts_for_the_output_projection(model, batches, tmp_path):
    settings = config(None, rules=[("lm_head", "v4-k8")])
    model = nnx.clone(model)
    quantize(model, settings, batches, workdir=tmp_path / "w", progress=False)
    model.norm.weight[...] = jnp.geomspace(0.01, 100, model.norm.weight.shape[0])
    with pytest.raises(ValueError, match="weights up to its block"):
        quantize(model, settings, batches, workdir=tmp_path / "w", progress=False)


def test_a_layer_that_float16_cannot_hold_is_stored_in_float32_and_said(model, batches):
    model = nnx.clone(model)
    layer = model.layers[0].mlp.up_proj
    layer.weight[...] = layer.weight[...] * 1e-8
    weight = np.asarray(layer.weight[...], np.float64)
    hessians = collect_hessians(model, batches, progress=False)
    quantized, report = quantize(model, config(), hessians, progress=False)
    rows = {row["path"]: row for row in report.operators}
    path = "model.layers.0.mlp.up_proj"
    assert rows[path]["wide"] == ["scale", "offset"]
    assert not any("wide" in row for name, row in rows.items() if name != path)
    stored = quantized.linears()[path].weight
    H = np.asarray(hessians.for_module(path), np.float64)
    E = np.asarray(stored.dequantize(), np.float64) - weight
    np.testing.assert_allclose(rows[path]["error"], np.sum(E @ H * E) / np.sum(weight @ H * weight), rtol=1e-3)
    assert rows[path]["error"] < 2 * rows["model.layers.0.mlp.gate_proj"]["error"]


@pytest.mark.parametrize("seed", range(12))
def test_every_flipped_bit_of_an_operator_is_noticed(model, hessians, tmp_path, seed):
    settings = config(None, rules=[("0.mlp.up_proj", "v4-k8")])
    expected, _ = quantize(model, settings, hessians, workdir=tmp_path / "w", progress=False)
    file = tmp_path / "w" / "model.layers.0.mlp.up_proj.safetensors"
    data = bytearray(file.read_bytes())
    position = np.random.default_rng(seed).integers(len(data) * 8)
    data[position // 8] ^= 1 << position % 8
    file.write_bytes(data)
    with contextlib.suppress(ValueError):  # refused, or harmless: never other weights
        found, _ = quantize(model, settings, hessians, workdir=tmp_path / "w", progress=False)
        assert_same(arrays(found), arrays(expected))


@pytest.mark.parametrize("content", ["[]", "7", "null", "{", '"x"', "[" * 5000])
def test_a_damaged_record_of_the_run_is_named(model, hessians, tmp_path, content):
    quantize(model, config(), hessians, workdir=tmp_path / "w", progress=False)
    (tmp_path / "w" / "seconds.jsonl").write_text("5\nnull\n{\n[1]\n")
    quantize(model, config(), hessians, workdir=tmp_path / "w", progress=False)
    (tmp_path / "w" / "run.json").write_text(content)
    for _ in range(2):  # the first lets go of the directory
        with pytest.raises(ValueError, match=r"run\.json (is not JSON|holds a JSON)") as found:
            quantize(model, config(), hessians, workdir=tmp_path / "w", progress=False)
    assert not (tmp_path / "w" / "lock").exists(), found
