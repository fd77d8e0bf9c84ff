"""Linear layers with weights as Hugging Face stores them, [out_features, in_features], dense or quantized."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vptq_jax.array import VQArray
from vptq_jax.pallas.vq_matmul import vq_matmul


class VQIndices(nnx.Variable):
    """Integer parts of a quantized weight (packed indices, outlier indices, permutation): not trainable."""


class Linear(nnx.Module):
    """`y = x @ weight.T + bias`, accumulated in float32.

    Args:
        weight: float [out_features, in_features].
        bias: float [out_features], or None.
    """

    def __init__(self, weight: Array | jax.ShapeDtypeStruct, bias: Array | jax.ShapeDtypeStruct | None = None):
        self.weight = nnx.Param(weight)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))

    def __call__(self, x: Float[Array, "*batch in"], *, dtype: Any = None) -> Float[Array, "*batch out"]:
        """The result is in `dtype`, by default that of x."""
        y = jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype), preferred_element_type=jnp.float32)
        return _add_bias(y, self.bias).astype(dtype or x.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        out_features, in_features = self.weight[...].shape
        return out_features, in_features


class VQLinear(nnx.Module):
    """`y = vq_matmul(x, weight) + bias`.

    Codebooks, scale, offset and bias are `nnx.Param` (trainable); indices and permutation are
    `VQIndices`. `layer.weight` is the `VQArray` made of them.
    """

    def __init__(self, weight: VQArray, bias: Array | jax.ShapeDtypeStruct | None = None):
        self.layout = weight.layout
        for field in ("indices", "outlier_indices", "perm"):
            value = getattr(weight, field)
            setattr(self, field, nnx.data(None if value is None else VQIndices(value)))
        for field in ("codebook", "res_codebook", "outlier_codebook", "scale", "offset"):
            value = getattr(weight, field)
            setattr(self, field, nnx.data(None if value is None else nnx.Param(value)))
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))

    @property
    def weight(self) -> VQArray:
        """The quantized weight as one pytree."""

        def value(field: str) -> Any:
            variable = getattr(self, field)
            return None if variable is None else variable[...]

        fields = (
            "indices", "codebook", "res_codebook", "outlier_indices", "outlier_codebook", "scale", "offset", "perm",
        )  # fmt: skip
        return VQArray(**{field: value(field) for field in fields}, layout=self.layout)

    def __call__(self, x: Float[Array, "*batch in"], *, dtype: Any = None) -> Float[Array, "*batch out"]:
        """The result is in `dtype`, by default that of x."""
        return _add_bias(vq_matmul(x, self.weight), self.bias).astype(dtype or x.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.layout.out_features, self.layout.in_features


def project(x: Float[Array, "*batch in"], *layers: Linear | VQLinear) -> tuple[Float[Array, "*batch out"], ...]:
    """Applies several layers to the same input (q/k/v, gate/up), the place where kernels may fuse them."""
    return tuple(layer(x) for layer in layers)


def _add_bias(y: Float[Array, "*batch out"], bias: nnx.Param | None) -> Float[Array, "*batch out"]:
    return y if bias is None else y + bias[...].astype(y.dtype)
