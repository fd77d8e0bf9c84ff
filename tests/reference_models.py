"""Tiny random models: here alone, or of transformers' PyTorch with the same parameters here."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from random_models import NumpySource

from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.params import DenseSource
from vptq_jax.lm.registry import build

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Large enough weights that every part of the model matters to the logits.
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

FAMILIES = {
    "llama": (transformers.LlamaConfig, "LlamaForCausalLM"),
    "mistral": (transformers.MistralConfig, "MistralForCausalLM"),
    "qwen2": (transformers.Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (transformers.Qwen3Config, "Qwen3ForCausalLM"),
    "gemma3_text": (transformers.Gemma3TextConfig, "Gemma3ForCausalLM"),
}


def random_model(family: str, **options: Any) -> Decoder:
    """A random model in float32 that needs no PyTorch."""
    config = ModelConfig.from_hf(FAMILIES[family][0](**(SHAPE | options)).to_dict())
    return build(config, NumpySource(0, np.float32, config.initializer_range))


class StateDictSource(DenseSource):
    """Parameters from a PyTorch state dict."""

    def __init__(self, tensors: dict[str, Any], dtype: Any):
        self.tensors, self.dtype = tensors, dtype

    def tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        array = jnp.array(self.tensors[name].float().numpy(), self.dtype)  # a copy: PyTorch writes in place
        assert array.shape == shape, name
        return array


def torch_model(family: str, *, seed: int = 0, **options: Any) -> Any:
    """A random model in float32, biases and norm weights included."""
    torch = pytest.importorskip("torch")
    config_class, name = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(**(SHAPE | options))
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def jax_model(model: Any, dtype: Any = jnp.float32) -> Decoder:
    """The same model here."""
    config = ModelConfig.from_hf(model.config.to_dict())
    return build(config, StateDictSource(model.state_dict(), dtype))


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of PyTorch."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = SHAPE["vocab_size"]) -> np.ndarray:
    """Uniform token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, shape)
