"""Perplexity against PyTorch, window by window."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from vptq_jax.convert.hf import load_hf
from vptq_jax.lm import data, evaluation
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.evaluation import perplexity


@pytest.fixture(scope="module")
def tiny(tiny_hf):
    return load_hf(tiny_hf)


@pytest.fixture(scope="module")
def tokens(tiny):
    return np.random.default_rng(0).integers(0, tiny.config.vocab_size, 250)


@pytest.fixture(scope="module")
def tiny_torch(tiny_hf):
    return torch_model(tiny_hf)


def torch_model(path, **options):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def reference(model, tokens: np.ndarray, context: int, windows: int) -> float:
    """The protocol written down a second time, in PyTorch and float64."""
    import torch

    losses = []
    with torch.no_grad():
        for index in range(windows):
            row = torch.tensor(tokens[index * context : (index + 1) * context].astype(np.int64))
            logits = model(row[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, row[1:]).item())
    return float(np.exp(np.mean(losses)))


@pytest.mark.parametrize("context", [2, 33, 64])
def test_equals_pytorch(tiny, tiny_torch, tokens, context):
    result = perplexity(tiny, tokens, context=context, max_windows=3)
    assert result.windows == 3
    assert result.tokens == 3 * (context - 1)
    assert result.value == pytest.approx(reference(tiny_torch, tokens, context, 3), rel=1e-5)


def test_all_full_windows_count(tiny, tiny_torch, tokens):
    result = perplexity(tiny, tokens, context=64)
    assert result.windows == 3  # 250 tokens
    assert result.value == pytest.approx(reference(tiny_torch, tokens, 64, 3), rel=1e-5)


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_batches_change_nothing(tiny, tokens, batch_size):
    one = perplexity(tiny, tokens, context=40)
    many = perplexity(tiny, tokens, context=40, batch_size=batch_size)
    assert many.windows == one.windows == 6
    assert many.value == pytest.approx(one.value, rel=1e-6)


def test_chunks_of_the_head_change_nothing(tiny, tokens, monkeypatch):
    whole = perplexity(tiny, tokens, context=64, max_windows=2)
    monkeypatch.setattr(evaluation, "HEAD_TOKENS", 7)
    chunks = perplexity(tiny, tokens, context=64, max_windows=2)
    assert chunks.value == pytest.approx(whole.value, rel=1e-6)


def test_no_more_logits_than_promised(tiny, tokens, monkeypatch):
    seen = []
    head = Decoder.head
    monkeypatch.setattr(Decoder, "head", lambda self, h: seen.append(h.shape) or head(self, h))
    monkeypatch.setattr(evaluation, "HEAD_TOKENS", 32)
    perplexity(tiny, tokens, context=64, max_windows=2, batch_size=2)
    assert {shape[0] * shape[1] for shape in seen} == {32}


def test_text_shorter_than_a_window(tiny):
    with pytest.raises(ValueError, match="9 tokens, fewer than one window of 10"):
        perplexity(tiny, np.arange(9), context=10)


@pytest.mark.parametrize("context", [0, 1, 257])
def test_context_out_of_range(tiny, tokens, context):
    with pytest.raises(ValueError, match=f"context is {context}; expected 2 to 256"):
        perplexity(tiny, tokens, context=context)


def test_token_outside_the_vocabulary(tiny, tokens):
    bad = tokens.copy()
    bad[70] = tiny.config.vocab_size
    with pytest.raises(ValueError, match=f"text: token id {tiny.config.vocab_size} .* outside the vocabulary"):
        perplexity(tiny, bad, context=64)


def test_model_with_nan(tiny_hf, tokens):
    broken = load_hf(tiny_hf).module
    weight = broken.norm.weight
    weight[...] = jnp.full(weight.shape, jnp.nan)
    with pytest.raises(ValueError, match="logits that are not finite on window 0"):
        perplexity(broken, tokens, context=64)


@pytest.mark.slow
def test_smollm2_equals_pytorch(smollm2_gguf, shared, tmp_path):
    from vptq_jax.convert.api import convert
    from vptq_jax.convert.loading import load

    model = load(smollm2_gguf)
    tokens = data.tokenize(model.tokenizer, data.load_text(shared / "data" / "eval.txt"))
    assert len(tokens) == 82_458
    # transformers reads GGUF files with another package alone; our weights equal its own (test_convert_gguf.py).
    convert(smollm2_gguf, tmp_path / "hf", to="hf")
    expected = reference(torch_model(tmp_path / "hf"), tokens, 1024, 2)
    assert perplexity(model, tokens, context=1024, max_windows=2).value == pytest.approx(expected, rel=1e-4)
