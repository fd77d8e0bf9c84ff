"""Configs in and out: both styles of Hugging Face, defaults, and everything that is refused."""

from __future__ import annotations

import json

import pytest
import transformers
from reference_models import FAMILIES, SHAPE

from vptq_jax.lm.config import ModelConfig, RopeConfig

RAW = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def read(**changes) -> ModelConfig:
    return ModelConfig.from_hf({key: value for key, value in (RAW | changes).items() if value is not ...})


def test_old_and_new_style_are_one():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    old = read(rope_theta=500000.0, rope_scaling=scaling, torch_dtype="bfloat16")
    new = read(rope_parameters=scaling | {"rope_theta": 500000.0}, dtype="bfloat16")
    assert old == new
    assert hash(old) == hash(new)
    assert old.rope == RopeConfig(500000.0, "llama3", 8.0, 8192, 1.0, 4.0)
    assert old.dtype == "bfloat16"


def test_older_names_of_the_rope_type():
    assert read(rope_scaling={"type": "linear", "factor": 2}).rope == RopeConfig(10000.0, "linear", 2.0)
    assert read(rope_scaling=None).rope == RopeConfig()


def test_yarn_takes_what_is_missing_from_the_context():
    config = read(
        max_position_embeddings=4096,
        rope_scaling={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
    )
    assert config.rope.factor == 4.0
    outside = read(
        max_position_embeddings=4096,
        original_max_position_embeddings=2048,
        rope_scaling={"rope_type": "yarn", "factor": 2.0},
    )
    assert outside.rope.original_max_position_embeddings == 2048


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"num_kv_heads": 4, "max_position_embeddings": 2048, "eos_token_id": (2,), "sliding_window": None}),
        ("mistral", {"num_kv_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}),
        ("qwen2", {"num_kv_heads": 32, "attention_bias": True, "attention_out_bias": False, "eos_token_id": ()}),
        ("qwen3", {"num_kv_heads": 32, "attention_bias": False, "head_dim": 128, "sliding_window": None}),
    ],
)
def test_silence_means_the_family_default(family, expected):
    heads = {"llama": 4, "mistral": 8, "qwen2": 32, "qwen3": 32}[family]
    config = read(model_type=family, num_attention_heads=heads, hidden_size=2 * heads, num_key_value_heads=...)
    assert {name: getattr(config, name) for name in expected} == expected
    defaults = FAMILIES[family][0](
        **{k: v for k, v in RAW.items() if k not in ("model_type", "num_key_value_heads")}
        | {"num_attention_heads": heads, "hidden_size": 2 * heads}
    )
    assert config.num_kv_heads == defaults.num_key_value_heads
    assert config.max_position_embeddings == defaults.max_position_embeddings
    assert config.head_dim == getattr(defaults, "head_dim", 2)
    assert config.rms_norm_eps == defaults.rms_norm_eps
    assert config.tie_word_embeddings == defaults.tie_word_embeddings


def test_null_heads_windows_and_tokens():
    config = read(model_type="mistral", num_key_value_heads=None, sliding_window=None, head_dim=None)
    assert (config.num_kv_heads, config.sliding_window, config.head_dim) == (4, None, 8)
    config = read(eos_token_id=[5, 6], bos_token_id=None, pad_token_id=-1)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == ((5, 6), None, None)


def test_windows_by_layer():
    config = read(model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1)
    assert [config.window(layer) for layer in range(2)] == [None, 7]
    config = read(model_type="qwen2", use_sliding_window=False, sliding_window=7)
    assert [config.window(layer) for layer in range(2)] == [None, None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "head_dim": 6},
        {"eos_token_id": [3, 4], "bos_token_id": 1, "pad_token_id": 0},
        {"attention_bias": True, "mlp_bias": True},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 7.0,
                "factor": 2.0,
                "original_max_position_embeddings": 9,
                "truncate": False,
                "mscale": 0.5,
            }
        },
    ],
)
def test_round_trip_through_json_and_transformers(family, options):
    if family != "llama":
        options = {key: value for key, value in options.items() if key not in ("attention_bias", "mlp_bias")}
    config = ModelConfig.from_hf(FAMILIES[family][0](**(SHAPE | options)).to_dict())
    raw = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(raw) == config
    theirs = transformers.AutoConfig.for_model(**raw)
    assert ModelConfig.from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', which is not supported; supported: llama, mistral, qwen2, "),
        ({"model_type": ...}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported; supported: silu"),
        ({"hidden_size": ...}, "hidden_size is missing; expected a whole number"),
        ({"hidden_size": "32"}, "hidden_size is '32'; expected a whole number"),
        ({"hidden_size": True}, "hidden_size is True; expected a whole number"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5"),
        ({"hidden_size": -32}, "hidden_size is -32; expected a whole number of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_heads is 4 and num_kv_heads is 3; expected num_kv_heads to divide num_heads"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"head_dim": 7}, "head_dim is 7; expected an even number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; expected a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0; expected a number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id, a list of them, or null"),
        ({"torch_dtype": "int8"}, "dtype is 'int8', which is not supported; supported: float32, bfloat16, float16"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type is 'longrope', which is not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type is .*, which is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing; expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor is '2'; expected a number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected a JSON object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one rope per layer type is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not supported; supported: 1.0"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0; expected at least 1"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types has 1 entries; expected"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "chunked"]}, "layer_types holds 'chunked'"),
    ],
)
def test_what_is_refused_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


def test_problems_are_gathered():
    with pytest.raises(ValueError, match=r"hidden_size is 'a'(.|\n)*hidden_act is 'relu'(.|\n)*rope type is 'x'"):
        read(hidden_size="a", hidden_act="relu", rope_scaling={"rope_type": "x"})


@pytest.mark.parametrize("raw", [None, [], "llama", 3])
def test_a_config_is_an_object(raw):
    with pytest.raises(ValueError, match="expected a JSON object"):
        ModelConfig.from_hf(raw)


def test_context_length():
    assert read(max_position_embeddings=100).context_length == 100
    assert read(max_position_embeddings=100, rope_scaling={"type": "dynamic", "factor": 2.0}).context_length == 200
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert read(max_position_embeddings=100, rope_scaling=yarn).context_length == 400
    assert read(max_position_embeddings=400, rope_scaling=yarn).context_length == 400
