"""Logits against transformers' PyTorch, over every option of a config."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_vqarray
from reference_models import jax_model, random_model, random_tokens, torch_logits, torch_model

from vptq_jax.lm.attention import attend
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.diagnose import first_nonfinite
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.params import AbstractSource, RandomSource
from vptq_jax.lm.registry import build, model_types
from vptq_jax.nn.forms import cast
from vptq_jax.nn.linear import Linear, VQLinear


def rope(kind: str, **values: float | bool) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "grouped queries": ("llama", {}),
    "as many kv heads as heads": ("llama", {"num_key_value_heads": 4}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "wide heads": ("llama", {"head_dim": 20}),
    "narrow heads": ("llama", {"head_dim": 2}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "attention bias": ("llama", {"attention_bias": True}),
    "mlp bias": ("llama", {"mlp_bias": True}),
    "all biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "eps": ("llama", {"rms_norm_eps": 0.1}),
    "theta": ("llama", rope("default")),
    "linear": ("llama", rope("linear", factor=3.0)),
    "dynamic": ("llama", rope("dynamic", factor=2.0)),
    "llama3": ("llama", LLAMA3),
    "yarn": ("llama", rope("yarn", **YARN)),
    "yarn, all options": (
        "llama",
        rope("yarn", **YARN, beta_fast=8.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.3, truncate=False),
    ),
    "yarn, attention factor": ("llama", rope("yarn", **YARN, attention_factor=0.8)),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 7, "head_dim": 12}),
    "mistral, window of one": ("mistral", {"sliding_window": 1}),
    "mistral, window, tied, yarn": (
        "mistral",
        {"sliding_window": 9, "tie_word_embeddings": True, **rope("yarn", **YARN)},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, **rope("yarn", **YARN)}),
    "qwen2, windows in upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2, windows by list": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3, biases, tied, yarn": (
        "qwen3",
        {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 6, **rope("yarn", **YARN)},
    ),
    "qwen3, windows in upper layers": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    family, options = CASES[case]
    reference = torch_model(family, **options)
    tokens = random_tokens(2, 50)
    logits = jax_model(reference)(tokens)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - torch_logits(reference, tokens)).max() <= 2e-4


@pytest.mark.parametrize("case", ["theta", "linear", "dynamic", "llama3", "yarn", "mistral, window"])
def test_long_inputs_equal_transformers(case):
    # 1100 tokens pass the context of 64 and take the path with chunks of queries. Dynamic frequencies come from
    # float32 powers, which machines round differently, so that angles beyond some hundred radians differ.
    family, options = CASES[case]
    reference = torch_model(family, **options)
    tokens = random_tokens(1, 400 if case == "dynamic" else 1100)
    assert np.abs(jax_model(reference)(tokens) - torch_logits(reference, tokens)).max() <= 2e-4


@pytest.mark.parametrize("case", ["all biases", "mistral, window", "qwen2", "qwen3", "tied", "yarn"])
@pytest.mark.parametrize("scale", [0.02, 0.15, 0.3])
def test_bf16_logits_are_near_float32(case, scale):
    family, options = CASES[case]
    reference = torch_model(family, **(options | {"initializer_range": scale})).bfloat16()
    tokens = random_tokens(2, 50)
    theirs = torch_logits(reference, tokens)
    logits = jax_model(reference, jnp.bfloat16)(tokens)
    assert logits.dtype == jnp.float32
    expected = torch_logits(reference.float(), tokens)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    # At the largest scale attention is so sharp that PyTorch's own bfloat16 error exceeds 2e-2.
    assert error <= np.linalg.norm(theirs - expected) / np.linalg.norm(expected)
    assert error <= 2e-2 or scale == 0.3


def test_norms_and_logits_are_float32_in_a_bf16_model():
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_model("llama"))
    logits = np.asarray(model(random_tokens(1, 20)))
    # Float32 results are not all on the grid of bfloat16.
    assert (logits != np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float32)).mean() > 0.9


def test_one_program_equals_layer_by_layer():
    model = random_model("llama")
    tokens = jnp.asarray(random_tokens(2, 20))
    whole = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
    np.testing.assert_allclose(model(tokens), whole, atol=1e-4)


def test_pieces_make_the_model():
    model = random_model("qwen2")
    tokens = jnp.asarray(random_tokens(2, 20))
    at = model.rotary(jnp.arange(20)[None])
    h = model.embed(tokens)
    for block in model.layers:
        h = block(h, at)
    np.testing.assert_allclose(model(tokens), model.head(h), atol=1e-4)


def test_linears_come_in_forward_order_and_can_be_replaced():
    reference = torch_model("llama")
    model = jax_model(reference)
    paths = list(model.linears())
    assert paths == [name for name, m in reference.named_modules() if type(m).__name__ == "Linear"][:-1]
    path = "model.layers.1.mlp.up_proj"
    tokens = random_tokens(1, 8)
    before = model(tokens)
    weight = model.linears()[path].weight[...]
    model.set_linear(path, Linear(weight * 2))
    reference.model.layers[1].mlp.up_proj.weight.data.mul_(2)
    assert not np.allclose(before, model(tokens))
    assert np.abs(model(tokens) - torch_logits(reference, tokens)).max() <= 2e-4


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("model.layers.9.mlp.up_proj", (48, 32), "no linear layer 'model.layers.9.mlp.up_proj'"),
        ("model.layers.0.mlp.up_proj", (32, 48), r"shape \[32, 48\]; expected \[48, 32\]"),
        ("lm_head", (96, 32), r"lm_head: .*\[96, 32\]; expected \[97, 32\]"),
    ],
)
def test_set_linear_refuses(path, shape, message):
    model = random_model("llama")
    with pytest.raises(ValueError, match=message):
        model.set_linear(path, Linear(jnp.zeros(shape)))


@pytest.mark.parametrize("path", ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.k_proj"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_layers_equal_their_dense_weights(path, tied):
    tokens = random_tokens(2, 12)
    models = [random_model("llama", tie_word_embeddings=tied) for _ in range(2)]
    shape = (97, 32) if "layers" not in path else models[0].linears()[path].shape
    weight = random_vqarray("v4-k16-8", *shape, seed=1)
    models[0].set_linear(path, VQLinear(weight))
    models[1].set_linear(path, Linear(weight.dequantize()))
    np.testing.assert_allclose(models[0](tokens), models[1](tokens), atol=1e-4)
    assert models[0].config.tie_word_embeddings == (tied and path != "lm_head")


def test_a_compiled_function_returns_the_module_that_it_was_given():
    # Two models of one structure share a program, whatever belongs to them otherwise.
    first, second = (LanguageModel(random_model("llama"), tokenizer) for tokenizer in ({"unhashable": []}, "another"))
    with pytest.raises(TypeError, match="LanguageModel"):
        jax.jit(lambda m: m)(first)
    change = jax.jit(functools.partial(cast, dtype=jnp.bfloat16))
    for lm in (first, second):
        new = dataclasses.replace(lm, module=change(lm.module))
        assert new.tokenizer is lm.tokenizer
        assert jax.tree.structure(new.module) == jax.tree.structure(lm.module)
        assert new.module.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([[1, 97]]), "token id 97 at row 0, column 1 is outside the vocabulary; expected 0 to 96"),
        (np.array([[-1]]), "token id -1"),
        (np.array([1, 2]), r"int64 \[2\]; expected integer token ids \[batch, length\]"),
        (np.array([[0.5]]), "float64"),
    ],
)
def test_bad_tokens_are_named(tokens, message):
    with pytest.raises(ValueError, match=message):
        random_model("llama")(tokens)


def test_nonfinite_places_are_named():
    model = random_model("llama")
    tokens = jnp.asarray(random_tokens(1, 5))
    assert first_nonfinite(model, tokens) is None
    layer = model.layers[1].mlp.down_proj
    good = layer.weight[...]
    model.set_linear("model.layers.1.mlp.down_proj", Linear(good.at[3, 4].set(jnp.nan)))
    assert first_nonfinite(model, tokens) == "the weight model.layers.1.mlp.down_proj.weight"
    model.set_linear("model.layers.1.mlp.down_proj", Linear(good * 1e38))
    model.set_linear("model.layers.1.mlp.up_proj", Linear(model.layers[1].mlp.up_proj.weight[...] * 1e30))
    assert first_nonfinite(model, tokens) == "the output of model.layers.1"


def test_attention_in_chunks_equals_attention_at_once(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, [(2, 37, 4, 8), (2, 2, 37, 8), (2, 2, 37, 8)], strict=True)
    )
    positions = jnp.arange(37)[None] - jnp.array([[0], [5]])
    whole = attend(q, k, v, positions, positions, 11)
    monkeypatch.setattr("vptq_jax.lm.attention.QUERY_CHUNK", 8)
    chunked = attend(q, k, v, positions, positions, 11)
    np.testing.assert_allclose(whole[0], chunked[0], atol=1e-6)
    np.testing.assert_allclose(whole[1, 5:], chunked[1, 5:], atol=1e-6)
    assert np.isfinite(chunked).all()


def test_sources():
    reference = torch_model("qwen2", tie_word_embeddings=True)
    config = ModelConfig.from_hf(reference.config.to_dict())
    abstract = AbstractSource()
    build(config, abstract)
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert abstract.shapes == {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    model = build(config, RandomSource(jax.random.key(0), jnp.bfloat16))
    assert model.dtype == jnp.bfloat16
    assert np.isfinite(model(random_tokens(1, 4))).all()


def test_registry_knows_what_configs_know():
    for model_type in model_types():
        config = ModelConfig(model_type, 11, 8, 8, 1, 2, 1, 4)
        assert build(config, AbstractSource()).config.model_type == model_type
    with pytest.raises(ValueError, match="supported: " + ", ".join(model_types())):
        dataclasses.replace(config, model_type="gpt2")


@pytest.mark.parametrize("quantized", [False, True])
def test_logits_are_not_rounded_to_bfloat16(quantized):
    config = dataclasses.replace(ModelConfig("llama", 256, 32, 48, 1, 4, 2, 8), dtype="bfloat16")
    model = build(config, RandomSource(jax.random.key(0), jnp.bfloat16))
    if quantized:
        model.set_linear("lm_head", VQLinear(random_vqarray("v4-k16", 256, 32, seed=1, dtype=jnp.bfloat16)))
    logits = model(np.arange(14).reshape(2, 7))
    assert logits.dtype == jnp.float32
    on_the_grid = float(jnp.mean(logits == logits.astype(jnp.bfloat16)))
    assert on_the_grid < 0.1
