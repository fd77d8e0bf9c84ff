"""Kernels on meshes: how a kernel's work is divided among devices, which XLA knows of its own operations alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vptq_jax.meshes import automatic, spec_of


def over_rows(function: Callable[[Any, Any], Any], rows: Any, whole: Any) -> Any:
    """`function(rows, whole)`, each device with those rows that lie on it.

    Args:
        function: of pytrees of arrays. The first axis of every result is that of the rows, and a row of it is made of
            that row and of `whole` alone.
        rows: arrays with the same first axis; other axes are gathered where they are divided.
        whole: arrays that each device takes all of; they are gathered where they are divided.
    """
    leaves = jax.tree.leaves(rows)
    run = custom_partitioning(function)

    def partition(mesh: Mesh, arguments: tuple[Any, Any], results: Any) -> tuple[Mesh, Any, Any, tuple[Any, Any]]:
        """The mesh, what every device runs, and where its results and arguments lie."""
        first = jax.tree.leaves(arguments[0])[0]
        divided = NamedSharding(mesh, PartitionSpec(*first.sharding.spec[:1]))
        everywhere = NamedSharding(mesh, PartitionSpec())

        def all_of(tree: Any, sharding: NamedSharding) -> Any:
            return jax.tree.map(lambda _: sharding, tree)

        return mesh, function, all_of(results, divided), (all_of(rows, divided), all_of(whole, everywhere))

    def rule(_: Mesh, operands: Sequence[Any], results: Sequence[Any]) -> SdyShardingRule:
        return _rule([x.rank for x in operands], [y.rank for y in results], len(leaves))

    run.def_partition(partition, sharding_rule=rule)
    return automatic(run, PartitionSpec(spec_of(leaves[0])[0]), rows, whole)


def _rule(operands: Sequence[int], results: Sequence[int], rows: int) -> SdyShardingRule:
    """Of operands and results with so many axes: the first axis of all results and `rows` operands may be divided."""
    fixed: list[str] = []

    def mapping(axes: int, *leading: str) -> ArrayMapping:
        rest = [f"n{len(fixed) + i}" for i in range(axes - len(leading))]
        fixed.extend(rest)
        return ArrayMapping(*leading, *rest)

    arguments = [mapping(axes, *["rows"] * (i < rows)) for i, axes in enumerate(operands)]
    outputs = [mapping(axes, "rows") for axes in results]
    return SdyShardingRule(tuple(arguments), tuple(outputs), need_replication_factors=tuple(fixed))
