"""The XLA implementation: the truth that every kernel is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vptq_jax.array import VQArray


@jax.checkpoint  # Saving the packed weight instead of the dense one for the backward pass.
def vq_matmul(x: Float[Array, "*batch in"], weight: VQArray) -> Float[Array, "*batch out"]:
    """Dequantizes the one layer and multiplies, accumulating in float32."""
    # Without the barrier XLA moves the decoding of every weight out of a loop around it (decode), and keeps them all.
    x, weight = jax.lax.optimization_barrier((x, weight))
    dense = weight.dequantize(x.dtype)
    return jnp.einsum("...i,oi->...o", x, dense, preferred_element_type=jnp.float32).astype(x.dtype)
