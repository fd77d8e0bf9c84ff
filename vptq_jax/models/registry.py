"""From a config to the model class that implements it."""

from __future__ import annotations

from vptq_jax.models.config import ModelConfig
from vptq_jax.models.decoder import Decoder
from vptq_jax.models.llama import Llama
from vptq_jax.models.mistral import Mistral
from vptq_jax.models.params import ParamSource
from vptq_jax.models.qwen2 import Qwen2

_MODELS: dict[str, type[Decoder]] = {"llama": Llama, "mistral": Mistral, "qwen2": Qwen2}


def model_types() -> tuple[str, ...]:
    """The supported values of `model_type`."""
    return tuple(_MODELS)


def build(config: ModelConfig, source: ParamSource) -> Decoder:
    """The model of a config, with its parameters from the source."""
    return _MODELS[config.model_type](config, source)
