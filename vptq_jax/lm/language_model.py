"""`LanguageModel`: a decoder together with what turns text into its tokens and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Integer

from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What `load` returns: weights, tokenizer and settings. Training stacks take `module` alone.

    Functions that need no text (`quantize`, `perplexity`, `save`, ...) take a bare `Decoder` as well; those that return
    a model return what they were given, a `LanguageModel` or a module.

    Attributes:
        module: the decoder, the only part with arrays.
        tokenizer: a transformers tokenizer, or None.
        generation_config: what the checkpoint's `generation_config.json` held, or None.
    """

    module: Decoder
    tokenizer: Any = None
    generation_config: Mapping[str, Any] | None = None

    @staticmethod
    def of(model: LanguageModel | Decoder) -> LanguageModel:
        """The model itself, or one without a tokenizer around a bare decoder.

        Raises:
            TypeError: neither of them.
        """
        if isinstance(model, LanguageModel):
            return model
        if isinstance(model, Decoder):
            return LanguageModel(model)
        raise TypeError(f"found a {type(model).__name__}; expected a LanguageModel or its module, a Decoder")

    @property
    def config(self) -> ModelConfig:
        """The module's config."""
        return self.module.config

    def __call__(self, tokens: Integer[Array | np.ndarray, "B T"]) -> Float[Array, "B T V"]:
        """Float32 logits of every position; raises as `Decoder` does."""
        return self.module(tokens)
