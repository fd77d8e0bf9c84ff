"""Root-mean-square normalization, of hidden states and of heads (arXiv 1910.07467)."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.params import ParamSource
from vptq_jax.nn.linear import Unnormalized
from vptq_jax.pallas.vq_matmul import RMS


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight`, computed in float32, returned in the dtype of x."""

    def __init__(self, weight: Array | jax.ShapeDtypeStruct, eps: float):
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return self._rms()(x)

    def defer(self, x: Float[Array, "*batch dim"]) -> Unnormalized:
        """The same for layers that `project` applies."""
        return Unnormalized(x, self._rms())

    def _rms(self) -> RMS:
        return RMS(self.weight[...], self.eps)


def make_norm(config: ModelConfig, source: ParamSource, name: str, features: int) -> RMSNorm:
    """The norm whose weight has this Hugging Face name (without `.weight`) and this many entries."""
    return RMSNorm(source.tensor(f"{name}.weight", (features,)), config.rms_norm_eps)
