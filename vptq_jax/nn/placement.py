"""Placing a module on a mesh: output features of its linear layers divided among devices, all else on each of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vptq_jax.array import VQArray
from vptq_jax.meshes import check_axis
from vptq_jax.nn.forms import unpack
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.nn.surgery import modules
from vptq_jax.problems import raise_problems

Model = TypeVar("Model", bound=nnx.Module)


def place(module: Model, mesh: Mesh, axis: str | None = None) -> Model:
    """A module whose arrays lie on a mesh; divided layers are unpacked, since a packed weight lies whole on a device.

    Args:
        module: any module with `Linear` and `VQLinear` layers.
        mesh: with explicit or automatic axes.
        axis: of the mesh, among whose devices output features are divided (`VQArray.partition_specs`); None puts
            everything on every device.

    Raises:
        ValueError: the mesh has no such axis, or layers do not divide among its devices (all are listed).
    """
    check_axis(mesh, axis)
    specs: dict[int, PartitionSpec] = {}
    if axis is not None:
        module = unpack(module)
        size, problems = mesh.shape[axis], []
        for path, part in modules(module).items():
            if isinstance(part, Linear | VQLinear):
                problems += [f"{path}: {problem}" for problem in _problems(part, size)]
                specs |= _specs(part, axis)
        raise_problems(f"the layers do not divide among the {size} devices of mesh axis {axis!r}", problems)
    graph, state = nnx.split(module)

    def put(leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(mesh, specs.get(id(leaf), PartitionSpec())))

    return nnx.merge(graph, jax.tree.map(put, state), copy=True)


def _problems(layer: Linear | VQLinear, devices: int) -> Iterator[str]:
    if isinstance(layer, VQLinear):
        yield from layer.format.division_problems(devices)
    elif layer.shape[0] % devices:
        yield f"{layer.shape[0]} output features do not divide among {devices} devices"


def _specs(layer: Linear | VQLinear, axis: str) -> dict[int, PartitionSpec]:
    """Partition specs by identity of an array; what is not there is on every device."""
    bias = {} if layer.bias is None else {id(layer.bias.get_value()): PartitionSpec(axis)}
    if isinstance(layer, Linear):
        return {id(layer.weight.get_value()): PartitionSpec(axis)} | bias
    weight: Any = layer.weight
    assert isinstance(weight, VQArray)
    specs = jax.tree.leaves(weight.partition_specs(axis), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return {id(array): spec for array, spec in zip(jax.tree.leaves(weight), specs, strict=True)} | bias
