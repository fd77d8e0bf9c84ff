"""Root-mean-square normalization ahead of a product (arXiv 1910.07467)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RMS:
    """`x / rms(x) * weight` with `rms(x) = sqrt(mean(x^2) + eps)`.

    Attributes:
        weight: [in].
        eps: static.
    """

    weight: Float[Array, " in"]
    eps: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        """Computed in float32, returned in the dtype of x."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight.astype(jnp.float32)).astype(x.dtype)
