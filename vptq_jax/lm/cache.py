"""Keys and values of past tokens, in arrays of fixed size that a decode loop updates in place.

All rows of a batch share one count of slots: prompts are padded on the left, so that their last
tokens share a slot and every step writes one slice. A layer with a sliding window keeps a ring
of that many slots, or of more where tokens are to be taken back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vptq_jax.lm.config import ModelConfig


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
        return updated, _held(self.slot, size)[None, :] - self.start[:, None]

    def positions(self) -> Int[Array, "B S"]:
        """The position of every key (negative: none)."""
        return _held(self.slot - 1, self.keys.shape[2])[None, :] - self.start[:, None]

    def extend(
        self, keys: Float[Array, "B K T D"], values: Float[Array, "B K T D"], length: Int[Array, ""]
    ) -> LayerCache:
        """Writes the next `length` slots, at least one; keys and values beyond them are padding and go nowhere."""
        size = self.keys.shape[2]
        source = _held(self.slot + length - 1, size) - self.slot
        new = (source >= 0)[:, None]

        def place(held: Float[Array, "B K S D"], x: Float[Array, "B K T D"]) -> Float[Array, "B K S D"]:
            # What is gathered for an index that stays as it is does not matter.
            return jnp.where(new, jnp.take(x, source, axis=2, mode="clip").astype(held.dtype), held)

        return LayerCache(place(self.keys, keys), place(self.values, values), self.slot + length, self.start)

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

    keys: tuple[Float[Array, "B K _ D"], ...]
    values: tuple[Float[Array, "B K _ D"], ...]
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

    def back_to(self, slot: int) -> KVCache:
        """The cache as of an earlier slot, where its rings still hold what is seen from there."""
        return dataclasses.replace(self, slot=jnp.int32(slot))

    def grown(self, sizes: Sequence[int]) -> KVCache:
        """The cache with more slots, `sizes` by layer; a ring that has gone round must keep its size."""

        def pad(x: Float[Array, "B K S D"], size: int) -> Float[Array, "B K size D"]:
            return jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), (0, 0))) if size > x.shape[2] else x

        keys, values = (tuple(map(pad, arrays, sizes)) for arrays in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.size * x.dtype.itemsize for x in (*self.keys, *self.values))


def cache_sizes(config: ModelConfig, capacity: int, spare: int = 0) -> list[int]:
    """Slots of every layer's cache for a text of `capacity` slots; `spare` more than its window for a ring."""
    windows = map(config.window, range(config.num_layers))
    return [capacity if window is None else min(capacity, window + spare) for window in windows]


def _held(last: Int[Array, ""], size: int) -> Int[Array, "S"]:
    """Which slot each index holds once `last` is written: the latest that is congruent to it (negative: none)."""
    return last - (last - jnp.arange(size)) % size
