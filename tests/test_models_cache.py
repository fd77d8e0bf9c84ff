"""Decoding with a cache against the whole text at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_models import jax_model, random_model, random_tokens, torch_logits, torch_model
from test_models_logits import LLAMA3, YARN, rope

from vptq_jax.lm.cache import LayerCache

prefill = jax.jit(lambda model, tokens, start: model.prefill(tokens, start, capacity=30))
step = jax.jit(lambda model, tokens, cache: model.step(tokens, cache))

MODELS = {
    "llama": ("llama", {}),
    "llama, llama3 rope, biases": ("llama", {"attention_bias": True, "mlp_bias": True, **LLAMA3}),
    "llama, dynamic rope": ("llama", rope("dynamic", factor=2.0)),
    "llama, yarn": ("llama", {"num_key_value_heads": 1, **rope("yarn", **YARN)}),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "mistral, window of one": ("mistral", {"sliding_window": 1}),
    "qwen2, mixed": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 12}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", [1, 12])
def test_cache_equals_no_cache(name, prompt):
    family, options = MODELS[name]
    model = random_model(family, **options)
    tokens = jnp.asarray(random_tokens(2, 30))
    expected = model(tokens)
    logits, cache = prefill(model, tokens[:, :prompt], jnp.zeros(2, jnp.int32))
    for position in range(prompt, 30):
        np.testing.assert_allclose(logits, expected[:, position - 1], atol=1e-4)
        logits, cache = step(model, tokens[:, position], cache)
    np.testing.assert_allclose(logits, expected[:, -1], atol=1e-4)


@pytest.mark.parametrize("name", ["mistral, window", "qwen3"])
def test_cached_decoding_equals_transformers(name):
    family, options = MODELS[name]
    reference = torch_model(family, **options)
    tokens = random_tokens(2, 30)
    expected = torch_logits(reference, tokens)
    model = jax_model(reference)
    logits, cache = prefill(model, jnp.asarray(tokens[:, :12]), jnp.zeros(2, jnp.int32))
    for position in range(12, 30):
        assert np.abs(logits - expected[:, position - 1]).max() <= 2e-4
        logits, cache = step(model, jnp.asarray(tokens[:, position]), cache)
    assert np.abs(logits - expected[:, -1]).max() <= 2e-4


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name):
    family, options = MODELS[name]
    model = random_model(family, **options)
    rows = [random_tokens(length + 6, seed=length) for length in (3, 12, 7)]
    width = 14
    prompts = np.zeros((3, width), np.int32)
    start = np.array([width - (len(row) - 6) for row in rows])
    for row, first, tokens in zip(prompts, start, rows, strict=True):
        row[first:] = tokens[:-6]
    expected = [model(jnp.pad(tokens[None], ((0, 0), (0, 18 - len(tokens))))) for tokens in rows]
    logits, cache = prefill(model, jnp.asarray(prompts), jnp.asarray(start))
    for count in range(6):
        places = [len(tokens) - 6 + count for tokens in rows]
        for row, place in enumerate(places):
            np.testing.assert_allclose(logits[row], expected[row][0, place - 1], atol=1e-4)
        following = [tokens[place] for tokens, place in zip(rows, places, strict=True)]
        logits, cache = step(model, jnp.asarray(following), cache)


def test_a_window_bounds_the_cache():
    model = random_model("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    _, cache = prefill(model, jnp.asarray(random_tokens(2, 12)), jnp.zeros(2, jnp.int32))
    assert [keys.shape[2] for keys in cache.keys] == [30, 5, 5]
    assert cache.nbytes == 2 * 2 * 4 * 2 * 8 * (30 + 5 + 5)  # keys and values, rows, bytes, heads, head_dim, slots


@settings(max_examples=12)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(0, 4))
def test_ring_holds_the_last_slots_at_their_positions(size, prompt, steps, start):
    # Every key holds its own slot number, so the ring can be read off.
    def slots(first: int, count: int):
        return jnp.arange(first, first + count, dtype=jnp.float32).reshape(1, 1, count, 1)

    cache = LayerCache.from_prompt(slots(0, prompt), slots(0, prompt), jnp.array([start]), size)
    for step in range(steps):
        cache, positions = cache.append(slots(prompt + step, 1), slots(prompt + step, 1))
    if not steps:
        return
    last = prompt + steps - 1
    held = np.asarray(cache.keys)[0, 0, :, 0]
    filled = np.asarray(positions)[0] + start >= 0
    np.testing.assert_array_equal(held[filled], np.asarray(positions)[0][filled] + start)
    assert sorted(held[filled]) == list(range(max(0, last - size + 1), last + 1))
