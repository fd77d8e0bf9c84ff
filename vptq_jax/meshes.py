"""Device meshes: where arrays may go, and programs on meshes whose axes are explicit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


def explicit_mesh(*arguments: Any) -> AbstractMesh | None:
    """The mesh with explicit axes on which an array among the arguments lies, or None."""
    for leaf in jax.tree.leaves(arguments):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if mesh.explicit_axes:
                return mesh
    return None


def spec_of(x: jax.Array) -> tuple[Any, ...]:
    """The mesh axis of every axis of an array, as its type says; None where it is not divided, or JAX decides."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def automatic(function: Callable[..., Any], out_spec: PartitionSpec, *arguments: Any) -> Any:
    """`function(*arguments)`, divided among devices by XLA inside where a mesh has explicit axes.

    Gathers by index have no sharding that follows from their operands alone, which explicit axes ask for.

    Args:
        function: of pytrees of arrays.
        out_spec: of every result, used on explicit axes only.
        arguments: of the function.
    """
    mesh = explicit_mesh(*arguments)
    if mesh is None:
        return function(*arguments)
    sharding = NamedSharding(mesh, out_spec)
    return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=sharding)(*arguments)


def is_divided(tree: Any) -> bool:
    """Whether an array of a tree is known to lie in parts on several devices."""
    return any(
        any(spec_of(leaf)) if isinstance(leaf, jax.core.Tracer) else not leaf.sharding.is_fully_replicated
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
    )


def as_automatic(tree: Any) -> Any:
    """The same buffers, on a mesh with automatic axes where one with explicit axes was: for programs that say nothing
    of how their inside is divided. Tracers stay as they are."""

    def retyped(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return leaf
        old = leaf.sharding
        if not isinstance(old, NamedSharding) or AxisType.Explicit not in old.mesh.axis_types:
            return leaf
        mesh = Mesh(old.mesh.devices, old.mesh.axis_names, axis_types=(AxisType.Auto,) * len(old.mesh.axis_names))
        sharding = NamedSharding(mesh, old.spec, memory_kind=old.memory_kind)
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    return jax.tree.map(retyped, tree)


def check_axis(mesh: Mesh, axis: str | None) -> None:
    """Raises ValueError unless a mesh has this axis, or none is asked for."""
    if axis is not None and axis not in mesh.axis_names:
        raise ValueError(f"the mesh has no axis {axis!r}; expected one of {', '.join(map(repr, mesh.axis_names))}")
