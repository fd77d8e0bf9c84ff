"""The real SmolLM2-135M against transformers' PyTorch: logits, and greedy text token for token."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import transformers

from vptq_jax.convert.loading import load
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.generation import generate
from vptq_jax.lm.language_model import LanguageModel

torch = pytest.importorskip("torch")

PROMPTS = [
    "The capital of France is",
    "Water boils when",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village at the foot of a mountain, there lived an old clockmaker who",
    "The three most important things about writing clear English prose are: first, that every sentence should",
]


@pytest.fixture(scope="module")
def lm(smollm2_gguf) -> LanguageModel:
    return load(smollm2_gguf)


@pytest.fixture(scope="module")
def model(lm) -> Decoder:
    return lm.module


@pytest.fixture(scope="module")
def reference(model):
    """The same parameters in PyTorch; that they are read rightly is the converter's test."""
    tensors = {f"{path}.weight": layer.weight for path, layer in model.linears().items()}
    tensors |= {"model.embed_tokens.weight": model.embed_tokens.weight, "model.norm.weight": model.norm.weight}
    for index, block in enumerate(model.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{norm}.weight"] = getattr(block, norm).weight
    config = transformers.LlamaConfig(**model.config.to_hf())
    config._attn_implementation = "eager"
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(config)
    reference.load_state_dict(
        {name: torch.tensor(np.asarray(tensor[...])) for name, tensor in tensors.items()}, strict=False, assign=True
    )
    reference.tie_weights()
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)  # Its buffers are in no state dict.
    assert not [name for name, parameter in reference.named_parameters() if parameter.is_meta]
    return reference.eval()


def test_logits(lm, model, reference):
    tokens = np.array([lm.tokenizer(" ".join(PROMPTS))["input_ids"]])
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    assert np.abs(model(tokens) - expected).max() <= 2e-4


@pytest.fixture(scope="module")
def single(lm) -> list[list[int]]:
    """64 greedy tokens of each prompt, one prompt at a time."""
    options = {"max_new_tokens": 64, "stop_tokens": (), "return_result": True}
    return [generate(lm, prompt, **options).tokens[0] for prompt in PROMPTS]


def test_greedy_equals_transformers(lm, reference, single):
    # Every token is the one that PyTorch finds most likely after those before it, so by induction
    # PyTorch's greedy text is the same; one forward pass per prompt tells.
    for prompt, tokens in zip(PROMPTS, single, strict=True):
        ids = lm.tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = reference(torch.tensor([[*ids, *tokens]])).logits[0]
        assert len(tokens) == 64
        assert logits.argmax(-1)[len(ids) - 1 : -1].tolist() == tokens


def test_padded_batch_equals_single_prompts(lm, single):
    assert generate(lm, PROMPTS, max_new_tokens=64, stop_tokens=(), return_result=True).tokens == single


def test_loading_keeps_float32(model):
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {np.dtype(np.float32)}
