"""Linear layers with weights as Hugging Face stores them, [out_features, in_features], dense or quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vptq_jax.array import VQArray
from vptq_jax.format import FLOATS, INTEGERS
from vptq_jax.pallas.vq_matmul import RMS, Packed, unpack, vq_matmul, vq_matmuls
from vptq_jax.pallas.vq_matmul.packed import PACKED_FIELDS, Order


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

    def __call__(self, x: Float[Array | np.ndarray, "*batch in"], *, dtype: Any = None) -> Float[Array, "*batch out"]:
        """The result is in `dtype`, by default that of x."""
        dtype = dtype or x.dtype
        # Whatever dtype a product has, sums are float32; asked for in bfloat16, its gradient takes no float32 product.
        found = dtype if self.bias is None else jnp.float32
        y = jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype), preferred_element_type=found)
        return _add_bias(y, self.bias).astype(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        weight: Any = self.weight.get_value()  # an array, or its shape alone
        out_features, in_features = weight.shape
        return out_features, in_features


class VQParam(nnx.Param):
    """A trainable part of a quantized weight: codebooks, scale, offset (`nnx.Optimizer(..., wrt=VQParam)`)."""


class PackedPart(nnx.Variable):
    """A part of a weight in kernel order: not trainable."""


class VQLinear(nnx.Module):
    """`y = vq_matmul(x, weight) + bias`, for life with the weight that it was made of.

    Of a `VQArray`, codebooks, scale and offset are `VQParam` and indices and permutation are `VQIndices`; XLA runs the
    product. Of a `Packed`, all parts are `PackedPart`, and the kernel runs it. `layer.weight` is the array again.

    Args:
        weight: the quantized weight.
        bias: float [out_features], or None.
        stored: dtype by field of `FLOATS` in which a file holds a part that is trained in another one
            (`forms.trainable` says so); others are stored as they are.
    """

    codebook: nnx.Variable  # these three are there in both forms
    scale: nnx.Variable | None
    perm: nnx.Variable | None

    def __init__(
        self,
        weight: VQArray | Packed,
        bias: Array | jax.ShapeDtypeStruct | None = None,
        *,
        stored: Mapping[str, str] | None = None,
    ):
        self.format = weight.format
        self.order = weight.order if isinstance(weight, Packed) else None
        self.stored = tuple(sorted((stored or {}).items()))
        for field, kind in _kinds(self.order).items():
            value = getattr(weight, field)
            setattr(self, field, nnx.data(None if value is None else kind(value)))
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))

    def with_weight(self, weight: VQArray | Packed, stored: Mapping[str, str] | None = None) -> VQLinear:
        """The same layer with its weight in another form; `stored` is as it was where it is None."""
        bias: Any = None if self.bias is None else self.bias.get_value()
        return VQLinear(weight, bias, stored=dict(self.stored) if stored is None else stored)

    @property
    def stacked(self) -> bool:
        """Whether the weight is a stack of matrices, see `VQEinsum`."""
        return False

    @property
    def weight(self) -> VQArray | Packed:
        """The quantized weight as one pytree."""
        # get_value works for shapes too.
        parts = {field: getattr(self, field) for field in _kinds(self.order)}
        values: dict[str, Any] = {field: None if part is None else part.get_value() for field, part in parts.items()}
        if self.order is None:
            return VQArray(**values, format=self.format)
        return Packed(**values, format=self.format, order=self.order)

    @property
    def array(self) -> VQArray:
        """The quantized weight in checkpoint order."""
        return unpack(weight) if isinstance(weight := self.weight, Packed) else weight

    def __call__(self, x: Float[Array | np.ndarray, "*batch in"], *, dtype: Any = None) -> Float[Array, "*batch out"]:
        """The result is in `dtype`, by default that of x."""
        dtype = dtype or x.dtype
        # A layer that may be trained runs on XLA by intention, which is nothing to warn of.
        implementation: Literal["xla"] | None = "xla" if self.order is None else None
        out_dtype = dtype if self.bias is None else jnp.float32
        y = vq_matmul(x, self.weight, implementation=implementation, out_dtype=out_dtype)
        return _add_bias(y, self.bias).astype(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.format.out_features, self.format.in_features


def _kinds(order: Order | None) -> dict[str, type[nnx.Variable]]:
    """The variables of a quantized layer, by field."""
    if order is not None:
        return dict.fromkeys(PACKED_FIELDS, PackedPart)
    return dict.fromkeys(INTEGERS, VQIndices) | dict.fromkeys(FLOATS, VQParam)


class Unnormalized(NamedTuple):
    """An input whose normalization is left to the layers that read it, since their kernel can do it in passing."""

    x: Float[Array, "*batch in"]
    norm: RMS


def project(
    x: Float[Array, "*batch in"] | Unnormalized, *layers: Callable[..., Array]
) -> tuple[Float[Array, "*batch _out"], ...]:
    """Applies several layers, or what stands in for them, to one input (q/k/v, gate/up); packed ones share a launch."""
    x, norm = x if isinstance(x, Unnormalized) else (x, None)
    packed = [layer for layer in layers if isinstance(layer, VQLinear) and layer.order is not None]
    if len(packed) < max(2, len(layers)):
        x = x if norm is None else norm(x)
        return tuple(layer(x) for layer in layers)
    biased = any(layer.bias is not None for layer in packed)
    out_dtype = jnp.float32 if biased else x.dtype
    products = vq_matmuls(x, [layer.weight for layer in packed], norm=norm, out_dtype=out_dtype)
    return tuple(_add_bias(y, layer.bias).astype(x.dtype) for y, layer in zip(products, packed, strict=True))


def _add_bias(y: Float[Array, "*batch out"], bias: nnx.Param | None) -> Float[Array, "*batch out"]:
    return y if bias is None else y + bias[...].astype(y.dtype)
