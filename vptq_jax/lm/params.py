"""Where a model's parameters come from: one small protocol for random, abstract and stored weights.

A model builds itself by asking a source for every tensor under its Hugging Face name, so that
each architecture is written once and each file format is written once.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vptq_jax.nn.linear import Linear, VQLinear


@runtime_checkable
class ParamSource(Protocol):
    """What a model needs to build itself; names are those of Hugging Face checkpoints."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        """An array for a tensor such as `model.norm.weight`."""
        ...

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool) -> Linear | VQLinear:
        """A linear layer for a module path such as `model.layers.0.self_attn.q_proj`."""
        ...


class DenseSource:
    """Shared `linear` of the sources that hold plain tensors."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        """See `ParamSource.tensor`."""
        raise NotImplementedError

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool) -> Linear | VQLinear:
        """A dense layer from `<name>.weight` and, if asked for, `<name>.bias`."""
        weight = self.tensor(f"{name}.weight", (out_features, in_features))
        return Linear(weight, self.tensor(f"{name}.bias", (out_features,)) if bias else None)


class AbstractSource(DenseSource):
    """Shapes only (`jax.ShapeDtypeStruct`); remembers every tensor asked for in `shapes`."""

    def __init__(self, dtype: Any = jnp.float32):
        self.dtype = dtype
        self.shapes: dict[str, tuple[int, ...]] = {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        self.shapes[name] = shape
        return jax.ShapeDtypeStruct(shape, self.dtype)


class RandomSource(DenseSource):
    """Normal weights (standard deviation `std`), ones for norms, zeros for biases; one key per name."""

    def __init__(self, key: Array, dtype: Any = jnp.float32, std: float = 0.02):
        self.key, self.dtype, self.std = key, dtype, std
        self._count = 0

    def tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        self._count += 1
        if name.endswith("norm.weight"):
            return jnp.ones(shape, self.dtype)
        if name.endswith(".bias"):
            return jnp.zeros(shape, self.dtype)
        return self.std * jax.random.normal(jax.random.fold_in(self.key, self._count), shape, self.dtype)
