"""The form of a module that products run fastest in, made once and kept while the module stays as it is."""

from __future__ import annotations

import threading
import weakref
from typing import TypeVar

import jax
from flax import nnx

from vptq_jax.nn.forms import pack, quantized
from vptq_jax.nn.linear import VQLinear
from vptq_jax.pallas import dispatch

Model = TypeVar("Model", bound=nnx.Module)

_lock = threading.Lock()
_kept: dict[int, tuple[list[weakref.ref], nnx.Module]] = {}  # by id; some modules have no hash


def inference_form(module: Model, *, donate: bool = False) -> Model:
    """The module itself, or a packed twin of it where kernels can run layers that are not packed.

    A twin is kept as long as the module lives and holds the very arrays that it held; one that has been trained is
    packed anew. Where kernels run but not for a layer of this module, a warning says why, once.

    Args:
        module: any module with quantized layers.
        donate: see `pack`; the module is of no use afterwards, and no twin is kept.
    """
    layers = [layer for _, layer in quantized(module) if not layer.stacked]
    if all(layer.order is not None for layer in layers):
        return module
    devices = dispatch.devices_of(*(layer.weight for layer in layers if layer.order is None))
    if reason := dispatch.why_no_mosaic(devices):
        if all(dispatch.target_of(device) for device in devices):
            dispatch.warn_fallback("a quantized layer", reason, "put the model on one of them")
        return module
    if donate:
        twin = pack(module, donate=True)
        _warn_of_unpacked([layer for _, layer in quantized(twin) if not layer.stacked])
        return twin
    arrays = jax.tree.leaves(nnx.state(module))
    with _lock:
        known, twin = _kept.get(id(module), ([], module))
        if len(known) != len(arrays) or any(ref() is not array for ref, array in zip(known, arrays, strict=True)):
            twin = pack(module)
            if id(module) not in _kept:
                weakref.finalize(module, _kept.pop, id(module), None)
            _kept[id(module)] = ([weakref.ref(array) for array in arrays], twin)
        _warn_of_unpacked([layer for _, layer in quantized(twin) if not layer.stacked])
        return twin


def _warn_of_unpacked(layers: list[VQLinear]) -> None:
    for layer in layers:
        if layer.order is None:
            dispatch.warn_fallback(
                "a quantized layer", f"its vectors have {layer.layout.vector_len} components", "choose at most 16"
            )
