"""Root-mean-square normalization, of hidden states and of heads (arXiv 1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.params import ParamSource
from vptq_jax.nn.linear import Unnormalized
from vptq_jax.pallas.vq_matmul import RMS


class RMSNorm(nnx.Module):
    """`x / rms(x) * (offset + weight)`, computed in float32, returned in the dtype of x."""

    def __init__(self, weight: Array | jax.ShapeDtypeStruct, eps: float, offset: float = 0.0):
        self.weight = nnx.Param(weight)
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return self._rms()(x)

    def defer(self, x: Float[Array, "*batch dim"]) -> Unnormalized:
        """The same for layers that `project` applies."""
        return Unnormalized(x, self._rms())

    def _rms(self) -> RMS:
        weight = self.weight[...]
        # The sum is not rounded to a narrow dtype of the weight (which kernels would need to normalize in passing).
        return RMS(self.offset + weight.astype(jnp.float32) if self.offset else weight, self.eps)


def make_norm(config: ModelConfig, source: ParamSource, name: str, features: int) -> RMSNorm:
    """The norm whose weight has this Hugging Face name (without `.weight`) and this many entries."""
    weight = source.tensor(f"{name}.weight", (features,))
    return RMSNorm(weight, config.rms_norm_eps, config.architecture.norm_offset)
