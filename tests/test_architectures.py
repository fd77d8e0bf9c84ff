"""What each entry of the architecture table promises: names, shapes, and the way of a model through every format."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from random_models import assert_same_bits, random_vqarray
from reference_models import FAMILIES, jax_model, random_model, random_tokens, torch_logits, torch_model

import vptq_jax as vq
from vptq_jax.convert import checkpoint
from vptq_jax.convert.export import export, plan_hf, plan_vptq
from vptq_jax.convert.hf import load_hf
from vptq_jax.convert.vptq_format import load_vptq
from vptq_jax.lm.arch import ARCHITECTURES, SAME_INPUT
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.evaluation import perplexity
from vptq_jax.lm.hessians import collect_hessians
from vptq_jax.lm.params import AbstractSource
from vptq_jax.lm.quantizer import quantize
from vptq_jax.lm.registry import build
from vptq_jax.nn.linear import VQLinear
from vptq_jax.spec import QuantConfig

# Two layers, of which one has a window where the architecture has windows.
OPTIONS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 12, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma3_text": {
        "head_dim": 12,
        "query_pre_attn_scalar": 7,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 9.0,
    },
}
NEW = ("qwen3", "gemma3_text")


def options(model_type):
    return {"num_hidden_layers": 2, **OPTIONS[model_type]}


def random_quantized(model_type):
    """A model whose linear layers are all quantized, with random contents."""
    model = random_model(model_type, **options(model_type))
    for seed, (path, layer) in enumerate(model.linears().items()):
        bias = None if layer.bias is None else layer.bias[...]
        weight = random_vqarray("v4-k16-8", *layer.shape, seed=seed, dtype=jnp.bfloat16)
        model.set_linear(path, VQLinear(weight, bias))
    return model


def test_every_architecture_is_tested():
    assert set(OPTIONS) == set(FAMILIES) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", OPTIONS)
def test_tensors_are_those_of_transformers(model_type):
    reference = torch_model(model_type, **options(model_type))
    config = ModelConfig.from_hf(reference.config.to_dict())
    source = AbstractSource()
    build(config, source)
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert source.shapes == shapes
    assert reference.config.architectures in (None, [config.architecture.hf_class])
    assert type(reference).__name__ == config.architecture.hf_class


@pytest.mark.parametrize("model_type", OPTIONS)
def test_layers_of_one_input_read_one_input(model_type):
    torch = pytest.importorskip("torch")
    reference = torch_model(model_type, **options(model_type))
    inputs = {}
    for path, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in path:
            module.register_forward_hook(lambda _, args, __, path=path: inputs.update({path: args[0]}))
    torch_logits(reference, random_tokens(1, 8))
    groups = ARCHITECTURES[model_type].inputs()
    assert [f"model.layers.0.{path}" for group in groups for path in group] == [p for p in inputs if ".0." in p]
    for path, x in inputs.items():
        parent, _, name = path.rpartition(".")
        assert inputs[f"{parent}.{SAME_INPUT.get(name, name)}"] is x


def test_unknown_types_are_answered_with_the_known_ones():
    known = "llama, mistral, qwen2, qwen3, gemma3_text"
    with pytest.raises(ValueError, match=f"model_type is 'gemma3', which is not supported; supported: {known}"):
        ModelConfig.from_hf({"model_type": "gemma3"})
    config = ModelConfig("llama", 11, 8, 8, 1, 2, 1, 4)
    with pytest.raises(ValueError, match=f"supported: {known}"):
        dataclasses.replace(config, model_type="gpt2")


@pytest.mark.parametrize("model_type", NEW)
def test_hugging_face_directories_are_read(tmp_path, model_type):
    reference = torch_model(model_type, **options(model_type))
    reference.save_pretrained(tmp_path)
    model, tokens = load_hf(tmp_path).module, random_tokens(2, 20)
    assert (model.lm_head is None) == ARCHITECTURES[model_type].tie_word_embeddings
    assert np.abs(model(tokens) - torch_logits(reference, tokens)).max() <= 2e-4


@pytest.mark.parametrize("model_type", NEW)
def test_quantized_models_travel(tmp_path, model_type):
    model, tokens = jax_model(torch_model(model_type, **options(model_type))), random_tokens(2, 20)
    batches = [random_tokens(2, 16, seed=seed) for seed in range(2)]
    config = QuantConfig("v4-k16-8", rounds=0, kmeans_iters=3)
    small, report = quantize(model, config, batches, progress=False)
    assert [row["path"] for row in report.operators] == list(model.linears())
    expected = np.asarray(small(tokens))
    checkpoint.save(small, tmp_path / "orbax")
    assert_same_bits(small, checkpoint.load(tmp_path / "orbax"))
    assert checkpoint.load(tmp_path / "orbax").config == small.config
    export(small, tmp_path / "vptq", plan_vptq(small))
    again = load_vptq(tmp_path / "vptq")
    assert_same_bits(small, again)
    assert again.config == small.config
    export(small, tmp_path / "hf", plan_hf(small))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert type(theirs).__name__ == ARCHITECTURES[model_type].hf_class
    assert np.abs(expected - torch_logits(theirs, tokens)).max() <= 2e-4
    assert load_hf(tmp_path / "hf").config == small.config


@pytest.mark.parametrize("model_type", NEW)
def test_hessians_are_second_moments_of_what_pytorch_sees(model_type):
    torch = pytest.importorskip("torch")
    reference = torch_model(model_type, **options(model_type))
    tokens, seen = random_tokens(2, 16), {}
    for path, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in path:
            module.register_forward_hook(lambda _, args, __, path=path: seen.update({path: args[0].numpy()}))
    torch_logits(reference, tokens)
    hessians = collect_hessians(jax_model(reference), [tokens], progress=False)
    for path, x in seen.items():
        rows = x.reshape(-1, x.shape[-1])
        np.testing.assert_allclose(hessians.for_module(path), rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", NEW)
def test_kernels_get_the_same_inputs(model_type, launches):
    """Layers in kernel order, a plain product in the kernels' place: norms are left to them."""
    model, tokens = random_quantized(model_type), jnp.asarray(random_tokens(2, 12))
    expected = model(tokens)
    packed = vq.pack(model)
    start = jnp.zeros(2, jnp.int32)
    _, cache = jax.jit(lambda model: model.prefill(tokens[:, :11], start, capacity=12))(packed)
    logits = packed.step(tokens[:, 11], cache)[0]
    assert {1, 2, 3} == set(launches)
    # Kernels round activations to bfloat16.
    error = np.linalg.norm(logits - expected[:, -1]) / np.linalg.norm(expected[:, -1])
    assert error < 0.1


def test_gemma_is_measured_behind_its_first_token():
    model = jax_model(torch_model("gemma3_text", **options("gemma3_text")))
    model.config = dataclasses.replace(model.config, bos_token_id=2)
    tokens, first = np.arange(40) % 30, model.config.first_token
    assert first == 2
    rows = np.array([[first, *tokens[at : at + 7]] for at in range(0, 35, 7)])
    expected = -jax.nn.log_softmax(model(rows)[:, :-1])[np.arange(5)[:, None], np.arange(7), rows[:, 1:]].mean()
    assert perplexity(model, tokens, context=8).value == pytest.approx(np.exp(expected), rel=1e-5)
