"""The one entry point of the op: checks, and the choice of an implementation."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from vptq_jax.array import VQArray
from vptq_jax.pallas.vq_matmul import reference

Implementation = Literal["xla"]


def vq_matmul(
    x: Float[Array, "*batch in"], weight: VQArray, *, implementation: Implementation | None = None
) -> Float[Array, "*batch out"]:
    """`x @ weight.dequantize().T`, differentiable in x, codebooks, scale and offset.

    Args:
        x: activations [..., in_features], any float dtype.
        weight: the quantized weight.
        implementation: None picks by device and layout; "xla" dequantizes one layer and multiplies.

    Returns:
        [..., out_features] in the dtype of x; products accumulate in float32.

    Raises:
        ValueError: x does not fit the weight, or is not floating point.
        NotImplementedError: the implementation asked for cannot run here.
    """
    if x.ndim < 1 or x.shape[-1] != weight.layout.in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its last axis must be in_features = {weight.layout.in_features}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; expected a floating-point dtype")
    if implementation not in (None, "xla"):
        raise NotImplementedError(f"implementation {implementation!r} does not exist; choose None or 'xla'")
    return reference.vq_matmul(x, weight)
