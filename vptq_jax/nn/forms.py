"""The forms of a quantized weight, for one array or for every layer of a module: packed for kernels, or trainable.

Each function returns something new and leaves what it was given as it is. Arrays that both have in common are shared.
A frozen dataclass with a field `module`, such as a language model, stands for its module and keeps its other fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vptq_jax.array import VQArray
from vptq_jax.format import FLOATS
from vptq_jax.meshes import is_divided
from vptq_jax.nn.linear import VQLinear
from vptq_jax.nn.surgery import modules, replace
from vptq_jax.pallas import dispatch
from vptq_jax.pallas.vq_matmul import Packed, choose_order
from vptq_jax.pallas.vq_matmul import pack as pack_array
from vptq_jax.pallas.vq_matmul import unpack as unpack_array
from vptq_jax.pallas.vq_matmul.packed import unsupported

Model = TypeVar("Model", bound=nnx.Module)


def pack(weight: Any, *, dtype: Any = None, target: str | None = None, donate: bool = False) -> Any:
    """Lays quantized weights out for the GPU kernels: frozen, without a gradient; `unpack` gives them back bit for bit.

    Args:
        weight: a `VQArray`, or a module, whose `VQLinear`s that a kernel can run are packed; others stay as they
            are. Layers that read one input, as their owner says in `shared_inputs`, get one order to share a launch.
        dtype: dtype of the activations, bfloat16 or float16; None is bfloat16, or float16 for a module whose
            floating-point parameters are. Kernels read float32 activations as bfloat16.
        target: the GPU to pack for, such as `sm_90`, on any machine; None is the one on which the weight lies.
        donate: delete the packed indices of what was given, which is of no use afterwards; spares their memory.

    Raises:
        NotImplementedError: there is no kernel for the target, or for this weight (the message says why).
        TypeError: neither a `VQArray` nor a module.

    Example:
        >>> from vptq_jax.format import Format
        >>> weight = VQArray.random(jax.random.key(0), Format.of("v8-k256", (64, 32)))
        >>> packed = pack(weight, target="sm_90")
        >>> type(packed).__name__, packed.shape, packed.dtype, bool((unpack(packed).indices == weight.indices).all())
        ('Packed', (64, 32), dtype(bfloat16), True)
    """
    if target is not None and target not in dispatch.TARGETS:
        known = ", ".join(dispatch.TARGETS)
        raise NotImplementedError(f"target {target!r} has no kernels; expected one of {known}")
    if isinstance(weight, Packed):
        return weight
    if not isinstance(weight, VQArray | nnx.Module):
        return _in_holder(weight, "a VQArray or a module", lambda m: pack(m, dtype=dtype, target=target, donate=donate))
    leaves = weight if isinstance(weight, VQArray) else nnx.state(weight)
    if target is None and (reason := dispatch.why_no_mosaic(dispatch.devices_of(leaves))):
        raise NotImplementedError(f"no kernel runs here: {reason}; target='sm_90' packs for another machine")
    if isinstance(weight, VQArray):
        return _packed([weight], dtype or jnp.bfloat16, donate)[0]
    dtype = jnp.dtype(dtype or _activations(weight))
    groups: dict[Any, list[tuple[str, VQLinear]]] = {}
    same_input = _same_input(weight)
    for path, layer in quantized(weight).items():
        if layer.order is not None or layer.stacked:
            continue
        if not unsupported(layer.format, dtype) and not is_divided(layer.array):
            alike = dataclasses.replace(layer.format, out_features=1)
            groups.setdefault((same_input.get(path, path), alike), []).append((path, layer))
    found: dict[str, VQLinear] = {}
    for group in groups.values():
        arrays = _packed([layer.array for _, layer in group], dtype, donate)
        found |= {path: layer.with_weight(array) for (path, layer), array in zip(group, arrays, strict=True)}
    return replace(weight, found)


def unpack(weight: Any, *, donate: bool = False) -> Any:
    """Inverse of `pack`: a `VQArray` of a `Packed`, or a module whose layers can be trained and stored.

    Args:
        weight: a `Packed`, or a module.
        donate: delete the words of what was given, which is of no use afterwards.
    """
    if isinstance(weight, Packed):
        array = unpack_array(weight)
        if donate:
            _delete(weight.words, array.indices)
        return array
    if isinstance(weight, VQArray):
        return weight
    if not isinstance(weight, nnx.Module):
        return _in_holder(weight, "a Packed or a module", lambda module: unpack(module, donate=donate))
    layers = {path: layer for path, layer in quantized(weight).items() if layer.order is not None}
    return replace(
        weight, {path: layer.with_weight(unpack(layer.weight, donate=donate)) for path, layer in layers.items()}
    )


def trainable(weight: Any, dtype: Any = jnp.float32) -> Any:
    """Codebooks, scales and offsets in a dtype that an optimizer can work in, indices as they are.

    float16 holds neither Adam's small numbers nor its updates. A file takes them in the dtype that they had before
    where they fit in it (`checkpoint.save`).

    Args:
        weight: a `VQArray` or `Packed`, or a module, whose packed layers are unpacked.
        dtype: a floating-point dtype.

    Raises:
        TypeError: neither of them; or the dtype is not floating point.

    Example:
        >>> from vptq_jax.format import Format
        >>> weight = VQArray.random(jax.random.key(0), Format.of("v8-k256", (64, 32)))
        >>> student = trainable(weight)
        >>> weight.codebook.dtype, student.codebook.dtype, student.indices is weight.indices
        (dtype('float16'), dtype('float32'), True)
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype is {dtype}; expected a floating-point dtype")
    if isinstance(weight, VQArray | Packed):
        return unpack(weight).astype(dtype)
    if not isinstance(weight, nnx.Module):
        return _in_holder(weight, "a VQArray, a Packed or a module", lambda module: trainable(module, dtype))
    found = {}
    for path, layer in _all_quantized(weight).items():
        before = {field: str(value.dtype) for field in FLOATS if (value := getattr(layer.array, field)) is not None}
        found[path] = layer.with_weight(trainable(layer.array, dtype), before | dict(layer.stored))
    return replace(weight, found)


def cast(module: Model, dtype: Any) -> Model:
    """A module with other parameters in a dtype than those of quantized weights, which keep theirs."""
    graph, *states = nnx.split(module, lambda path, part: type(part) is nnx.Param, ...)
    dense, rest = states
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(dtype), dense), rest, copy=True)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What became of parts that were trained in a wider dtype than a file takes.

    Attributes:
        error: largest relative error (Frobenius norms) that rounding made in any of them; 0 where nothing was rounded.
        wide: paths of those that keep their dtype, since they do not fit the narrow one.
    """

    error: float
    wide: tuple[str, ...]


def stored(module: Model) -> tuple[Model, Rounding]:
    """The module as a file takes it: unpacked, and what `trainable` made wide in its earlier dtype where it fits.

    A part fits if rounding changes it by less than a thousandth: float16 rounds to 0.03 %, and what overflows or
    vanishes in it shows.
    """
    layers, errors, wide = {}, [0.0], []
    for path, layer in _all_quantized(module).items():
        parts = {}
        for field, dtype in layer.stored:
            value = getattr(layer.array, field)
            narrow = value.astype(dtype)
            error = float(_relative_error(narrow, value))
            if error < _FITS:
                parts[field] = narrow
                errors.append(error)
            else:
                wide.append(f"{path}.{field}")
        if parts or layer.order is not None:
            layers[path] = layer.with_weight(dataclasses.replace(layer.array, **parts), {})
    return replace(module, layers), Rounding(max(errors), tuple(wide))


_FITS = 1e-3


@jax.jit
def _relative_error(narrow: jax.Array, wide: jax.Array) -> jax.Array:
    wide = wide.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide))  # squares of large values must not overflow
    difference = jnp.where(narrow.astype(jnp.float32) == wide, 0, (narrow.astype(jnp.float32) - wide) / scale)
    return jnp.linalg.norm(difference.ravel()) / jnp.maximum(jnp.linalg.norm((wide / scale).ravel()), 1e-30)


def quantized(module: nnx.Module) -> dict[str, VQLinear]:
    """Every quantized layer that multiplies, by path; not what its owner reads by rows and names in `tables`."""
    parts = modules(module)
    tables = {_below(path, name) for path, part in parts.items() for name in getattr(part, "tables", ())}
    return {path: part for path, part in parts.items() if isinstance(part, VQLinear) and path not in tables}


def _all_quantized(module: nnx.Module) -> dict[str, VQLinear]:
    return {path: part for path, part in modules(module).items() if isinstance(part, VQLinear)}


def _same_input(module: nnx.Module) -> dict[str, str]:
    """For every layer that its owner names in `shared_inputs`: the path of the first that reads the same input."""
    return {
        _below(path, name): _below(path, names[0])
        for path, part in modules(module).items()
        for names in getattr(part, "shared_inputs", ())
        for name in names
    }


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _packed(weights: list[VQArray], dtype: Any, donate: bool) -> list[Packed]:
    order = choose_order([weight.format for weight in weights])
    packed = []
    for weight in weights:
        packed.append(pack_array(weight, order, dtype=dtype))
        if donate:
            _delete(weight.indices, packed[-1].words)
    return packed


def _delete(old: jax.Array, new: jax.Array) -> None:
    new.block_until_ready()
    old.delete()


def _activations(module: nnx.Module) -> np.dtype:
    """float16 for a module whose dense parameters are, else bfloat16."""
    dense = nnx.state(module, lambda path, part: type(part) is nnx.Param)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(dense) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return np.dtype(jnp.float16 if dtypes == {np.dtype(jnp.float16)} else jnp.bfloat16)


def _in_holder(holder: Any, expected: str, change: Callable[[nnx.Module], nnx.Module]) -> Any:
    module = getattr(holder, "module", None)
    if not dataclasses.is_dataclass(holder) or isinstance(holder, type) or not isinstance(module, nnx.Module):
        raise TypeError(f"found a {type(holder).__name__}; expected {expected}")
    return dataclasses.replace(holder, **{"module": change(module)})
