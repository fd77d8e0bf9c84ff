"""A module without its arrays, as a static argument of jitted functions that costs nothing to compare."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array


class Structure:
    """The tree structure of a module, which `jax.jit` compares by identity before all else.

    Flattening a module takes Python's time at every call, which a loop of short programs feels: it is done once.
    """

    def __init__(self, structure: Any):
        self.structure, self._hash = structure, hash(structure)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.structure == other.structure)

    @staticmethod
    def of(module: Any) -> tuple[list[Array], Structure]:
        """A module's arrays, and its structure."""
        arrays, structure = jax.tree.flatten(module)
        return arrays, Structure(structure)

    def module(self, arrays: list[Array]) -> Any:
        """The module with arrays in it."""
        return jax.tree.unflatten(self.structure, arrays)
