"""Linear layers with weights as Hugging Face stores them, [out_features, in_features], dense or quantized."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vptq_jax.array import VQArray
from vptq_jax.pallas import device
from vptq_jax.pallas.vq_matmul import RMS, KernelArray, choose_order, relayout, restore, vq_matmul, vq_matmuls
from vptq_jax.pallas.vq_matmul.layout import KERNEL_FIELDS, Order, unsupported

_SHARED_INPUT = re.compile(r"(?<=\.)([qkv]|gate|up)_proj$")  # What is left of the path names their input.


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
        weight: Any = self.weight.get_value()  # an array, or its shape alone
        out_features, in_features = weight.shape
        return out_features, in_features


_INTEGERS = ("indices", "outlier_indices", "perm")
_FLOATS = ("codebook", "res_codebook", "outlier_codebook", "scale", "offset")


class VQKernelPart(nnx.Variable):
    """A part of a weight in kernel order: not trainable."""


class VQLinear(nnx.Module):
    """`y = vq_matmul(x, weight) + bias`.

    Codebooks, scale, offset and bias are `nnx.Param` (trainable); indices and permutation are
    `VQIndices`. `layer.weight` is the `VQArray` made of them. After `prepare()` the layer holds
    the weight in kernel order instead, for inference on a GPU, and only the bias is a parameter.
    """

    indices: VQIndices
    outlier_indices: VQIndices | None
    perm: VQIndices | None
    codebook: nnx.Param
    res_codebook: nnx.Param | None
    outlier_codebook: nnx.Param | None
    scale: nnx.Param | None
    offset: nnx.Param | None

    def __init__(self, weight: VQArray, bias: Array | jax.ShapeDtypeStruct | None = None):
        self.layout = weight.layout
        self.order: Order | None = None
        self._hold(weight)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))

    def _hold(self, weight: VQArray) -> None:
        for fields, kind in ((_INTEGERS, VQIndices), (_FLOATS, nnx.Param)):
            for field in fields:
                value = getattr(weight, field)
                setattr(self, field, nnx.data(None if value is None else kind(value)))

    @property
    def weight(self) -> VQArray:
        """The quantized weight as one pytree, in checkpoint order."""
        if self.order is not None:
            return restore(self.kernel_weight)
        return VQArray(**{field: self._value(field) for field in (*_INTEGERS, *_FLOATS)}, layout=self.layout)

    @property
    def kernel_weight(self) -> KernelArray:
        """The quantized weight in kernel order, of a prepared layer."""
        if self.order is None:
            raise ValueError("the layer is in checkpoint order; call prepare() first")
        parts = {field: self._value(field) for field in KERNEL_FIELDS}
        return KernelArray(**parts, layout=self.layout, order=self.order)

    def _value(self, field: str) -> Any:
        variable = getattr(self, field)
        return None if variable is None else variable.get_value()  # works for shapes too

    @property
    def distributed(self) -> bool:
        """Whether the weight lies on several devices; XLA divides its own operations among them, but no kernel."""
        words: nnx.Variable = getattr(self, "indices" if self.order is None else "words")
        return len(words[...].sharding.device_set) > 1

    def prepare(self, order: Order | None = None, *, dtype: Any = None) -> None:
        """Changes to kernel order for activations of `dtype`; a layer that is in it stays as it is.

        Arguments are those of `relayout`.

        Raises:
            NotImplementedError: the kernels cannot hold this weight (the message says why).
        """
        if self.order is not None:
            return
        kernel = relayout(self.weight, order, dtype=dtype)
        for field in (*_INTEGERS, *_FLOATS):
            delattr(self, field)
        for field in KERNEL_FIELDS:
            value = getattr(kernel, field)
            setattr(self, field, nnx.data(None if value is None else VQKernelPart(value)))
        self.order = kernel.order

    def unprepare(self) -> None:
        """Changes back to checkpoint order, bit for bit."""
        if self.order is None:
            return
        weight = self.weight
        for field in KERNEL_FIELDS:
            delattr(self, field)
        self.order = None
        self._hold(weight)

    def __call__(self, x: Float[Array, "*batch in"], *, dtype: Any = None) -> Float[Array, "*batch out"]:
        """The result is in `dtype`, by default that of x."""
        weight = self.weight if self.order is None else self.kernel_weight
        dtype = dtype or x.dtype
        y = vq_matmul(x, weight, out_dtype=dtype if self.bias is None else jnp.float32)
        return _add_bias(y, self.bias).astype(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.layout.out_features, self.layout.in_features


class Unnormalized(NamedTuple):
    """An input whose normalization is left to the layers that read it, since their kernel can do it in passing."""

    x: Float[Array, "*batch in"]
    norm: RMS


def project(
    x: Float[Array, "*batch in"] | Unnormalized, *layers: Linear | VQLinear
) -> tuple[Float[Array, "*batch out"], ...]:
    """Applies several layers to the same input (q/k/v, gate/up); prepared layers share one kernel launch."""
    x, norm = x if isinstance(x, Unnormalized) else (x, None)
    prepared = [layer for layer in layers if isinstance(layer, VQLinear) and layer.order is not None]
    if len(prepared) < max(2, len(layers)):
        x = x if norm is None else norm(x)
        return tuple(layer(x) for layer in layers)
    biased = any(layer.bias is not None for layer in prepared)
    out_dtype = jnp.float32 if biased else x.dtype
    products = vq_matmuls(x, [layer.kernel_weight for layer in prepared], norm=norm, out_dtype=out_dtype)
    return tuple(_add_bias(y, layer.bias).astype(x.dtype) for y, layer in zip(products, prepared, strict=True))


def prepare(layers: Mapping[str, Linear | VQLinear], dtype: Any) -> int:
    """Lays out every quantized layer that the GPU kernels can run; returns how many. Without such a GPU, none.

    The model is changed in place, so that no weight is there twice; `unprepare` takes it back.

    Args:
        layers: by module path, as `Decoder.linears()` gives them. Layers that read one input
            (q/k/v, gate/up) get one order, so that `project` can launch them together.
        dtype: dtype of the activations, `Decoder.dtype`.
    """
    if device.why_no_mosaic():
        return 0
    groups: dict[Any, list[VQLinear]] = {}
    for path, layer in layers.items():
        if isinstance(layer, VQLinear) and not unsupported(layer.layout, dtype) and not layer.distributed:
            alike = dataclasses.replace(layer.layout, out_features=1)
            groups.setdefault((_SHARED_INPUT.sub("", path), alike), []).append(layer)
    for group in groups.values():
        order = choose_order([layer.layout for layer in group])
        for layer in group:
            layer.prepare(order, dtype=dtype)
    return sum(map(len, groups.values()))


def unprepare(layers: Mapping[str, Linear | VQLinear]) -> None:
    """Gives every layer its checkpoint order back, the form in which weights are stored and trained."""
    for layer in layers.values():
        if isinstance(layer, VQLinear):
            layer.unprepare()


def _add_bias(y: Float[Array, "*batch out"], bias: nnx.Param | None) -> Float[Array, "*batch out"]:
    return y if bias is None else y + bias[...].astype(y.dtype)
