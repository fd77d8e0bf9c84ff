"""`StreamedModel`: a stored model that is never in memory as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.decoder import Block, Decoder
from vptq_jax.lm.params import AbstractSource, ParamSource
from vptq_jax.lm.registry import build
from vptq_jax.nn.linear import Linear, VQLinear


@dataclasses.dataclass(frozen=True)
class StreamedModel:
    """A model whose weights stay in storage until they are asked for; `load.open_streamed` makes one.

    Attributes:
        config: the model's facts.
        source: reads one tensor at a time; may be asked for any of them, in any order, repeatedly.
        tokenizer: a transformers tokenizer or None.
        generation_config: the checkpoint's generation defaults or None.
    """

    config: ModelConfig
    source: ParamSource
    tokenizer: Any = None
    generation_config: Mapping[str, Any] | None = None

    def shell(self) -> Decoder:
        """The model with embedding, norm and output projection read, and with shapes for blocks."""
        return build(self.config, _WithoutBlocks(self.source))

    def block(self, layer: int) -> Block:
        """One block, read now."""
        return Block(self.config, layer, self.source)


class _WithoutBlocks(AbstractSource):
    """A source that leaves decoder blocks abstract, so that building a model does not read them."""

    def __init__(self, source: ParamSource):
        super().__init__()
        self._source = source

    def tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        """See `ParamSource.tensor`."""
        if name.startswith("model.layers."):
            return super().tensor(name, shape)
        return self._source.tensor(name, shape)

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool) -> Linear | VQLinear:
        """See `ParamSource.linear`."""
        if name.startswith("model.layers."):
            return super().linear(name, out_features, in_features, bias=bias)
        return self._source.linear(name, out_features, in_features, bias=bias)
