"""Rotary embedding against transformers, on its own and at long positions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from vptq_jax.lm.config import ModelConfig, RopeConfig
from vptq_jax.lm.rope import inverse_frequencies, rotary, rotate

# As published: LLaMA 2, LLaMA 3, LLaMA 3.1 8B, LLaMA 3.2 1B, Qwen2.5 with yarn, and two old styles of long context.
PUBLISHED = {
    "default": (128, 4096, {"rope_theta": 10000.0}),
    "llama3 theta": (128, 8192, {"rope_theta": 500000.0}),
    "llama3": (
        128,
        131072,
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "llama3 small": (
        64,
        131072,
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "yarn": (
        128,
        32768,
        {
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
    ),
    "linear": (128, 4096, {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "dynamic": (128, 4096, {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}}),
}


def raw_config(name: str) -> dict[str, Any]:
    head_dim, context, options = PUBLISHED[name]
    return {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": context,
        **options,
    }


def theirs(name: str) -> Any:
    """The rotary embedding of transformers."""
    pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = raw_config(name)
    raw.pop("model_type")
    if "rope_scaling" in raw:
        raw["rope_parameters"] = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    return LlamaRotaryEmbedding(transformers.LlamaConfig(**raw))


def ours(name: str) -> ModelConfig:
    return ModelConfig.from_hf(raw_config(name))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "dynamic"])
def test_inverse_frequencies_are_those_of_transformers_to_the_last_bit_but_one(name):
    config, reference = ours(name), theirs(name)
    frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
    assert frequencies.dtype == np.float32
    np.testing.assert_array_max_ulp(frequencies, reference.inv_freq.numpy(), maxulp=2)
    assert factor == pytest.approx(reference.attention_scaling, rel=1e-7)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("last", [5, 4095, 30000])
def test_cos_and_sin_at_long_positions(name, last):
    config, reference = ours(name), theirs(name)
    import torch

    positions = np.array([[0, 1, last // 2, last]])
    at = rotary(config, jnp.asarray(positions))
    cos, sin = reference(torch.zeros(1), torch.tensor(positions))
    half = config.head_dim // 2
    # An angle of n radians in float32 is uncertain by n * 2^-24, times the few ulps of its frequency.
    tolerance = 1e-6 + last * 4e-7
    np.testing.assert_allclose(at.cos, cos[..., :half], atol=tolerance)
    np.testing.assert_allclose(at.sin, sin[..., :half], atol=tolerance)


def test_dynamic_leaves_short_texts_alone_and_stretches_long_ones_row_by_row():
    config, default = ours("dynamic"), ours("default")
    short = jnp.array([[0, 100, 4095]])
    np.testing.assert_array_equal(rotary(config, short).cos, rotary(default, short).cos)
    long = jnp.array([[0, 100, 8000]])
    batch = rotary(config, jnp.concatenate([short, long]))
    np.testing.assert_array_equal(batch.cos[:1], rotary(config, short).cos)
    np.testing.assert_array_equal(batch.cos[1:], rotary(config, long).cos)
    assert np.abs(batch.cos[1, 1] - rotary(default, long).cos[0, 1]).max() > 0.1


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(0, 1000), st.integers(0, 1000))
def test_rotation_keeps_lengths_and_depends_on_distance_only(half, first, second):
    rng = np.random.default_rng(half)
    q, k = jnp.asarray(rng.standard_normal((2, 1, 1, 1, 2 * half)), jnp.float32)
    config = ModelConfig("llama", 8, 2 * half, 8, 1, 1, 1, 2 * half, max_position_embeddings=4096)

    def at(position: int):
        return rotary(config, jnp.array([[position]]))

    turned = rotate(q, at(first))
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(q), rel=1e-5)
    shift = 17
    score = float((rotate(q, at(first)) * rotate(k, at(second))).sum())
    moved = float((rotate(q, at(first + shift)) * rotate(k, at(second + shift))).sum())
    assert score == pytest.approx(moved, abs=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "longrope"}, "'longrope', which is not supported; supported: default, linear, dynamic, llama3, yarn"),
        ({"theta": 0.0}, "theta is 0.0; expected a number above 1"),
        ({"theta": float("nan")}, "theta is nan"),
        ({"type": "linear", "factor": 0.5}, "factor is 0.5; expected a number of at least 1"),
        ({"type": "yarn", "factor": 2.0}, "needs original_max_position_embeddings"),
        (
            {"type": "llama3", "original_max_position_embeddings": 8, "low_freq_factor": 4.0},
            "low_freq_factor is 4.0 and high_freq_factor is 4.0",
        ),
        (
            {"type": "yarn", "original_max_position_embeddings": 8, "beta_fast": 1.0},
            "beta_slow is 1.0 and beta_fast is 1.0",
        ),
    ],
)
def test_bad_rope_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**options)
