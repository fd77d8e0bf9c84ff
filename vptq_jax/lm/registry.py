"""From a config to its model, and to what that model needs."""

from __future__ import annotations

from vptq_jax.lm.arch import ARCHITECTURES
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.params import AbstractSource, ParamSource
from vptq_jax.nn.linear import Linear, VQLinear


def model_types() -> tuple[str, ...]:
    """The supported values of `model_type`."""
    return tuple(ARCHITECTURES)


def build(config: ModelConfig, source: ParamSource) -> Decoder:
    """The model of a config, with its parameters from the source."""
    return Decoder(config, source)


class Requirements(AbstractSource):
    """Everything a model asks for, and nothing allocated.

    Attributes:
        shapes: shape of every dense tensor, by Hugging Face name, as if no layer were quantized.
        linears: (out_features, in_features, bias) of every linear layer, by module path; the
            embedding table and `lm_head` are among them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.linears: dict[str, tuple[int, int, bool]] = {}
        build(config, self)

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool) -> Linear | VQLinear:
        """See `ParamSource.linear`."""
        self.linears[name] = (out_features, in_features, bias)
        return super().linear(name, out_features, in_features, bias=bias)
