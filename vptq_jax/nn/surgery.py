"""Linear layers of any module: finding them by path, and putting others in their places."""

from __future__ import annotations

from typing import Any, TypeVar

from flax import nnx

from vptq_jax.nn.contraction import Contraction
from vptq_jax.nn.linear import Linear, VQLinear

Model = TypeVar("Model", bound=nnx.Module)


def modules(module: nnx.Module) -> dict[str, nnx.Module]:
    """A module and everything in it, by path: names and list positions joined by dots."""
    return {".".join(map(str, path)): part for path, part in nnx.iter_modules(module)}


def linears(module: nnx.Module) -> dict[str, Any]:
    """Every `Linear`, `nnx.Linear`, `nnx.Einsum` with one contracted axis, and `VQLinear`, by path."""
    parts = modules(module).items()
    return {path: part for path, part in parts if isinstance(part, VQLinear) or contraction_of(part) is not None}


def contraction_of(layer: Any) -> Contraction | None:
    """What a dense layer computes, or None if it is no linear layer."""
    if isinstance(layer, Linear):
        return Contraction("...i", "oi", "...o")
    if isinstance(layer, nnx.Linear):
        return Contraction("...i", "io", "...o")
    if isinstance(layer, nnx.Einsum) and isinstance(layer.einsum_str, str):
        try:
            return Contraction.parse(layer.einsum_str)
        except NotImplementedError:
            return None
    return None


def kernel_of(layer: Any) -> Any:
    """A dense layer's weight, with the axes of its contraction's kernel."""
    return (layer.weight if isinstance(layer, Linear) else layer.kernel).get_value()


def replace(module: Model, layers: dict[str, Any]) -> Model:
    """A new module with other layers at some paths; it shares all other arrays with the old one."""
    new = nnx.merge(*nnx.split(module), copy=True)
    for path, layer in layers.items():
        *owners, name = path.split(".")
        owner: Any = new
        for part in owners:
            owner = owner[int(part)] if part.isdigit() else _attribute(owner, part)
        if name.isdigit():
            owner[int(name)] = layer
        elif isinstance(owner, nnx.Dict):
            owner[name] = layer
        else:
            setattr(owner, name, layer)
    return new


def _attribute(owner: Any, name: str) -> Any:
    return owner[name] if isinstance(owner, nnx.Dict) else getattr(owner, name)
