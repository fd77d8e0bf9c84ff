"""Collecting Hessians from a model, against PyTorch hooks."""

import jax
import numpy as np
import pytest

from vptq_jax.convert.hessian_files import load_hessians
from vptq_jax.convert.loading import load, open_streamed
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.hessians import collect_hessians
from vptq_jax.lm.params import RandomSource
from vptq_jax.lm.registry import build
from vptq_jax.nn.linear import Linear

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (rows, length)) for rows, length in ((2, 24), (2, 24), (1, 24), (3, 10))]


@pytest.fixture(scope="module")
def model(tiny_hf):
    return load(tiny_hf).module


@pytest.fixture(scope="module")
def hessians(model, batches):
    return collect_hessians(model, batches, progress=False)


@pytest.fixture(scope="module")
def reference(tiny_hf, batches):
    """Second moments in float64 of what transformers' layers receive."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_hf, dtype=torch.float64)
    sums = {}

    def hook(path):
        def add(_, inputs):
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[path] = sums.get(path, 0) + x.T @ x

        return add

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(path))
    with torch.no_grad():
        for batch in batches:
            model(torch.tensor(batch))
    return {path: total.numpy() / sum(b.size for b in batches) for path, total in sums.items()}


def test_every_layer_matches_pytorch(hessians, reference, batches):
    assert set(hessians) == set(reference)
    assert hessians.tokens == sum(batch.size for batch in batches)
    for path, expected in reference.items():
        found = hessians.for_module(path)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=path)
        np.testing.assert_array_equal(found, found.T)


def test_layers_with_one_input_share_one_array(hessians):
    assert len(hessians.arrays) == 2 * 4 + 1
    layer = "model.layers.1."
    query, value = (hessians.for_module(f"{layer}self_attn.{name}_proj") for name in "qv")
    assert query is value


def test_chunks_make_no_difference(model, batches, hessians):
    chunked = collect_hessians(model, iter(batches), progress=False, chunk_tokens=40)
    for path in hessians:
        expected = hessians.for_module(path)
        np.testing.assert_allclose(chunked.for_module(path), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert chunked.fingerprint == hessians.fingerprint


def test_stored_models_are_streamed(tiny_hf, batches, hessians):
    streamed = collect_hessians(open_streamed(tiny_hf), batches, progress=False)
    assert streamed.fingerprint == hessians.fingerprint
    assert streamed.modules == hessians.modules
    for path in hessians:
        np.testing.assert_array_equal(streamed.for_module(path), hessians.for_module(path))


def test_tied_output_projection_is_the_embedding(batches):
    config = ModelConfig.from_hf(
        {
            "model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    hessians = collect_hessians(build(config, RandomSource(jax.random.key(0))), batches, progress=False)
    assert "model.embed_tokens" in hessians
    assert "lm_head" not in hessians


def test_fingerprint_tells_models_apart_not_dtypes(tiny_hf, model, hessians, batches):
    again = collect_hessians(load(tiny_hf), batches[:1], progress=False)
    assert again.fingerprint == hessians.fingerprint
    other = load(tiny_hf).module
    path = "model.layers.1.mlp.down_proj"
    other.set_linear(path, Linear(other.linears()[path].weight[...].at[5, 7].add(1e-3)))
    changed = collect_hessians(other, batches[:1], progress=False)
    assert changed.fingerprint != hessians.fingerprint
    assert changed.weight_digest(path) != hessians.weight_digest(path)
    assert changed.weight_digest("lm_head") == hessians.weight_digest("lm_head")


def test_saved_and_loaded(hessians, tmp_path):
    hessians.save(tmp_path / "h")
    again = load_hessians(tmp_path / "h")
    assert (again.tokens, again.fingerprint, set(again)) == (hessians.tokens, hessians.fingerprint, set(hessians))
    for path in hessians:
        np.testing.assert_array_equal(again.for_module(path), hessians.for_module(path))


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("model.layers.0.self_attn.v_proj", r"model\.layers\.0\.self_attn\.o_proj"),
        ("model.layers.0.mlp.gate_proj", r"model\.layers\.0\.mlp\.down_proj"),
        ("model.layers.1.mlp.down_proj", r"model\.norm"),
    ],
)
def test_activations_that_are_not_finite_are_named(tiny_hf, batches, path, named):
    model = load(tiny_hf).module
    weight = model.linears()[path].weight[...]
    model.set_linear(path, Linear(weight.at[0, 0].set(np.nan)))
    with pytest.raises(ValueError, match=rf"gives {named} values that are NaN"):
        collect_hessians(model, batches, progress=False)


def test_bad_batches(model):
    with pytest.raises(ValueError, match="no calibration batches"):
        collect_hessians(model, [], progress=False)
    with pytest.raises(ValueError, match="calibration batch 1: token id 100000"):
        collect_hessians(model, [np.zeros((1, 4), int), np.full((1, 4), 100000)], progress=False)


def test_blocks_share_one_compiled_program(model, batches):
    from vptq_jax.lm.activations import _observe

    _observe.clear_cache()
    collect_hessians(model, batches[:2], progress=False)
    assert _observe._cache_size() == 1
