"""Keys and values of past tokens, in arrays of fixed size that a decode loop updates in place.

All rows of a batch share one count of slots: prompts are padded on the left, so that their last
tokens share a slot and every step writes one slice. A layer with a sliding window keeps a ring
of that many slots.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's part of a `KVCache`.

    Attributes:
        keys, values: [B, K, S, D]; slot s of the text lies at index s % S.
        slot: slots filled so far.
        start: the first slot of each row that holds a token (those before are padding).
    """

    keys: Float[Array, "B K S D"]
    values: Float[Array, "B K S D"]
    slot: Int[Array, ""]
    start: Int[Array, "B"]

    def append(
        self, keys: Float[Array, "B K 1 D"], values: Float[Array, "B K 1 D"]
    ) -> tuple[LayerCache, Int[Array, "B S"]]:
        """Writes the next slot; returns the cache and the position of every key in it (negative: none)."""
        size = self.keys.shape[2]
        index = (0, 0, self.slot % size, 0)
        # Without the barrier XLA computes the update twice, for the cache and for its reader, and copies the cache.
        keys, values = jax.lax.optimization_barrier(
            (
                jax.lax.dynamic_update_slice(self.keys, keys.astype(self.keys.dtype), index),
                jax.lax.dynamic_update_slice(self.values, values.astype(self.values.dtype), index),
            )
        )
        updated = LayerCache(keys, values, self.slot + 1, self.start)
        # Index i holds the latest slot that is i modulo the size.
        slots = self.slot - (self.slot - jnp.arange(size)) % size
        return updated, slots[None, :] - self.start[:, None]

    @classmethod
    def from_prompt(
        cls,
        keys: Float[Array, "B K T D"],
        values: Float[Array, "B K T D"],
        start: Int[Array, "B"],
        size: int,
    ) -> LayerCache:
        """A cache of `size` slots that holds the last `size` of T slots."""
        count = keys.shape[2]

        def place(x: Float[Array, "B K T D"]) -> Float[Array, "B K S D"]:
            if count <= size:
                return jnp.pad(x, ((0, 0), (0, 0), (0, size - count), (0, 0)))
            return jnp.roll(x[:, :, count - size :], count % size, axis=2)

        return cls(place(keys), place(values), jnp.int32(count), start)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The caches of all layers; `slot` and `start` as in `LayerCache`."""

    keys: tuple[Float[Array, "B K S D"], ...]
    values: tuple[Float[Array, "B K S D"], ...]
    slot: Int[Array, ""]
    start: Int[Array, "B"]

    @classmethod
    def of(cls, layers: list[LayerCache]) -> KVCache:
        """Collects the caches of all layers after the same step."""
        keys, values = tuple(c.keys for c in layers), tuple(c.values for c in layers)
        return cls(keys, values, layers[0].slot, layers[0].start)

    def layer(self, index: int) -> LayerCache:
        """One layer's part."""
        return LayerCache(self.keys[index], self.values[index], self.slot, self.start)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.size * x.dtype.itemsize for x in (*self.keys, *self.values))
