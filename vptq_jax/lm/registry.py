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
    """The model of a config, with its parameters from the source.

    Example:
        >>> import jax
        >>> from vptq_jax.lm.params import RandomSource
        >>> config = ModelConfig("llama", 32, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
        >>> model = build(config, RandomSource(jax.random.key(0)))
        >>> tokens = jax.numpy.array([[1, 2, 3]])
        >>> model(tokens).shape, list(model.linears())[0]
        ((1, 3, 32), 'model.layers.0.self_attn.q_proj')
    """
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
