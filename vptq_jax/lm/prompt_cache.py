"""What a model has read of a conversation, kept for the next turn."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from vptq_jax.lm.cache import KVCache
from vptq_jax.lm.config import ModelConfig

RING_SPARE = 64
"""Tokens of a long conversation that layers with a sliding window can take back: a template may trim an answer."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """Tokens that were read, and what is kept of them.

    Attributes:
        tokens: those in the cache, from slot `start` on.
        cache: of one row.
        start: the first slot with a token, those before are padding.
        capacity: slots of the layers that keep everything.
    """

    tokens: list[int]
    cache: KVCache
    start: int
    capacity: int

    def toward(self, prompt: list[int], config: ModelConfig) -> Reading | None:
        """What of it serves to read a prompt: their common beginning, the prompt's last token left out; None: nothing.

        A layer with a sliding window may have lost what is seen from there, and with a dynamic rope the keys of a long
        text depend on its length: then nothing serves.
        """
        kept = _common(self.tokens, prompt[:-1])
        if kept == 0 or _rotation_varies(config, max(len(self.tokens), len(prompt))):
            return None
        for layer, keys in enumerate(self.cache.keys):
            window, size = config.window(layer), keys.shape[2]
            # A ring that has gone round has lost what is `size` behind; from `kept` on `window - 1` behind are seen.
            if window is not None and len(self.tokens) > size and len(self.tokens) - kept > size - window + 1:
                return None
        return dataclasses.replace(self, tokens=prompt[:kept], cache=self.cache.back_to(self.start + kept))


class PromptCache:
    """Spares the turns of a conversation from reading again what earlier turns have read.

    Give the same object to each `generate` or `stream` of one conversation. It holds keys and values of the prompt and
    of what was generated; the next call keeps those of the beginning that its prompt shares with them and reads the
    rest. Any prompt and any model will do: without a common beginning, or with another model (or other arrays in the
    same one), all is read. The tokens generated are those without a cache, up to rounding. A call that fails or is
    interrupted leaves the object with what was read before or empty; a stream that is given up leaves what it had read.

    The object is one conversation's. A call takes it over from one that is still going on, in another thread or as a
    stream that is not at its end; that one ends with a RuntimeError.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for every step of a call
        self._ticket: object = None  # of the latest call
        self._held: tuple[_Identity, Reading] | None = None

    @property
    def tokens(self) -> list[int]:
        """Ids of the tokens that it holds, in order."""
        held = self._held
        return [] if held is None else list(held[1].tokens)


class Call:
    """The use of a prompt cache by one call of `generate` or `stream`, until another call begins."""

    def __init__(self, prompt_cache: PromptCache, structure: Any, arrays: Sequence[Array]):
        self._prompt_cache, self._identity = prompt_cache, _Identity(structure, arrays)
        self._ticket = prompt_cache._ticket = object()

    @contextlib.contextmanager
    def step(self, left: Callable[[], Reading]) -> Iterator[Reading | None]:
        """Surrounds a step that may use up what was read before, and leaves there what `left` gives after it.

        The step gets what an earlier one has left, None if that was nothing or another model's. Until it has ended, and
        if it fails, the prompt cache is empty.

        Raises:
            RuntimeError: another call has begun.
        """
        with self._prompt_cache._lock:
            yield self._take()
            self._prompt_cache._held = self._identity, left()

    def _take(self) -> Reading | None:
        if self._prompt_cache._ticket is not self._ticket:
            raise RuntimeError(
                "another call has taken this prompt cache over, so this one cannot go on; "
                "give every conversation a PromptCache of its own"
            )
        held, self._prompt_cache._held = self._prompt_cache._held, None
        return held[1] if held is not None and held[0] == self._identity else None


class _Identity:
    """The very model that a cache is of: its structure, and its arrays, none of which is kept alive."""

    def __init__(self, structure: Any, arrays: Sequence[Array]):
        self._structure, self._arrays = structure, [weakref.ref(array) for array in arrays]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Identity) or len(self._arrays) != len(other._arrays):
            return False
        pairs = zip(self._arrays, other._arrays, strict=True)
        return self._structure == other._structure and all(mine() is theirs() is not None for mine, theirs in pairs)


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    size = min(len(left), len(right))
    different = np.flatnonzero(np.array(left[:size]) != np.array(right[:size]))
    return int(different[0]) if different.size else size


def _rotation_varies(config: ModelConfig, length: int) -> bool:
    """Whether keys of a text of this length are rotated otherwise than those of a shorter one."""
    ropes = [rope for rope in (config.rope, config.local_rope) if rope is not None]
    return any(rope.type == "dynamic" for rope in ropes) and length > config.max_position_embeddings
