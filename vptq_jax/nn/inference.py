"""The form of a module that products run fastest in, made once and kept while the module stays as it is."""

from __future__ import annotations

import threading
import weakref
from typing import Any, TypeVar

import jax
from flax import nnx

from vptq_jax.meshes import is_divided
from vptq_jax.nn.forms import pack, quantized
from vptq_jax.pallas import dispatch

Model = TypeVar("Model", bound=nnx.Module)

_lock = threading.Lock()
_kept: dict[int, tuple[list[weakref.ref], Any]] = {}  # by id; some modules have no hash


def inference_form(module: Model, *, donate: bool = False) -> Model:
    """The module itself, or a packed twin of it where kernels can run layers that are not packed.

    A twin is kept as long as the module lives and holds the very arrays that it held; one that has been trained is
    packed anew. Where kernels run but not for a layer of this module, a warning says why, once.

    Args:
        module: any module with quantized layers.
        donate: see `pack`; the module is of no use afterwards, and no twin is kept.
    """
    layers = [layer for layer in quantized(module).values() if not layer.stacked]
    if all(layer.order is not None for layer in layers):
        return module
    if dispatch.why_no_mosaic(dispatch.devices_of(*(layer.weight for layer in layers if layer.order is None))):
        return module
    if donate:
        return _packed(module, donate=True)
    arrays = jax.tree.leaves(nnx.state(module))
    with _lock:
        known, twin = _kept.get(id(module), ([], module))
        if len(known) != len(arrays) or any(ref() is not array for ref, array in zip(known, arrays, strict=True)):
            twin = _packed(module, donate=False)
            if id(module) not in _kept:
                weakref.finalize(module, _kept.pop, id(module), None)
            _kept[id(module)] = ([weakref.ref(array) for array in arrays], twin)
        return twin


def _packed(module: Model, donate: bool) -> Model:
    """The packed module; warns of layers that no kernel takes."""
    twin = pack(module, donate=donate)
    for layer in quantized(twin).values():
        if layer.order is None and not layer.stacked:
            if is_divided(layer.array):
                reason, remedy = "it is divided among devices", "place it without axis, which puts it whole on each"
            else:
                reason, remedy = f"its vectors have {layer.format.vector_len} components", "choose at most 16"
            dispatch.warn_fallback("a quantized layer", reason, remedy)
    return twin
