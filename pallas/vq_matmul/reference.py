"""The oracle: the truth that every other implementation is tested against, slow and obvious."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vptq_jax.array import VQArray


def vq_matmul(x: Float[Array, "*batch in"], weight: VQArray, *, out_dtype: Any = None) -> Float[Array, "*batch out"]:
    """Dequantizes the one layer and multiplies, accumulating in float32; the result is in `out_dtype`, or that of x."""
    return _product(x, weight).astype(out_dtype or x.dtype)


@jax.checkpoint  # Saving the packed weight instead of the dense one for the backward pass.
def _product(x: Float[Array, "*batch in"], weight: VQArray) -> Float[Array, "*batch out"]:
    # Without the barrier XLA moves the decoding of every weight out of a loop around it (decode), and keeps them all.
    x, weight = jax.lax.optimization_barrier((x, weight))
    dense = weight.dequantize(x.dtype)
    return jnp.einsum("...i,oi->...o", x, dense, preferred_element_type=jnp.float32)
