"""Calibration batches on their way through a decoder, block by block, and the second moments they leave."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from vptq_jax.lm.arch import SAME_INPUT
from vptq_jax.lm.decoder import Block, Decoder, RMSNorm, check_tokens
from vptq_jax.lm.rope import Rotary
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.nn.moments import Moment
from vptq_jax.pallas import dispatch

Tokens: TypeAlias = Integer[Array | np.ndarray, "_B _T"]
"""Token ids of one batch; others may be of other shapes."""


def hessian_key(path: str) -> str:
    """The module path under which the H of a module is kept: that of the first layer that reads the same input."""
    parent, _, name = path.rpartition(".")
    name = SAME_INPUT.get(name, name)
    return f"{parent}.{name}" if parent else name


class Activations:
    """Hidden states of every calibration batch in front of one block.

    They lie on the device where they take a small part of what is free there, and on the host otherwise.

    Args:
        model: gives embedding, rotary positions and final norm; its blocks are passed in one by one.
        batches: int32 [B, T] each, checked.
    """

    def __init__(self, model: Decoder, batches: Sequence[Int[np.ndarray, "_B _T"]]):
        self.tokens = sum(batch.size for batch in batches)
        self._norm = model.norm
        lengths = {batch.shape[1] for batch in batches}
        self._at = {length: model.rotary(jnp.arange(length)[None]) for length in lengths}
        width = model.config.hidden_size * jnp.dtype(model.dtype).itemsize
        self._on_host = self.tokens * width > _free_bytes() // 4
        self._hidden = self._kept(model.embed(jnp.asarray(batch)) for batch in batches)

    def advance(self, block: Block) -> None:
        """Replaces the hidden states by the outputs of a block."""
        self._hidden = self._kept(_run(block, jnp.asarray(h), self._at[h.shape[1]]) for h in self._hidden)

    def observe(self, block: Block, name: str) -> dict[str, Float[np.ndarray, "in in"]]:
        """H of the inputs of a block's linear layers, by module path; the hidden states advance.

        Args:
            block: the block that these hidden states enter.
            name: its module path, such as `model.layers.0`.

        Raises:
            ValueError: an input is not finite; names the layer.
        """
        moments = _zero_moments(block)

        def outputs() -> Iterator[Array]:
            nonlocal moments
            for h in self._hidden:
                out, moments = _observe(block, jnp.asarray(h), self._at[h.shape[1]], moments)
                yield out

        self._hidden = self._kept(outputs())
        return self._means(_in_forward_order(moments, block), name)

    def observe_layer(self, block: Block, name: str, key: str) -> Float[np.ndarray, "in in"]:
        """H of one input of a block; the hidden states stay, and what lies behind that input is not computed.

        Args:
            block: the block that these hidden states enter.
            name: its module path, such as `model.layers.0`.
            key: the input, as `hessian_key` names it.

        Raises:
            ValueError: an input is not finite; names the layer.
        """
        path = key.removeprefix(f"{name}.")
        moment = _zero_moments(block)[path]
        for h in self._hidden:
            moment = _observe_layer(block, jnp.asarray(h), self._at[h.shape[1]], moment, path)
        return self._means({path: moment}, name)[key]

    def observe_head(self) -> Float[np.ndarray, "in in"]:
        """H of the output projection's input: the hidden states behind the last block, normalized."""
        moment = Moment.zeros(self._hidden[0].shape[-1])
        for h in self._hidden:
            moment = _observe_norm(self._norm, jnp.asarray(h), moment)
        return self._means({"norm": moment}, "model")["model.norm"]

    def _means(self, moments: dict[str, Moment], name: str) -> dict[str, Float[np.ndarray, "in in"]]:
        for path, moment in moments.items():
            if not bool(moment.finite()):
                raise ValueError(
                    f"the calibration data gives {name}.{path} values that are NaN, infinite or have squares beyond "
                    "float32, expected finite ones; check the weights before it, or load the model in float32"
                )
        return {f"{name}.{path}": moment.mean(self.tokens) for path, moment in moments.items()}

    def _kept(self, outputs: Iterable[Array]) -> Sequence[Array | np.ndarray]:
        """Outputs where they are kept; one for the host is fetched while the device works on the next."""
        if not self._on_host:
            return list(outputs)
        fetched: list[np.ndarray] = []
        waiting = None
        for output in outputs:
            if waiting is not None:
                fetched.append(np.asarray(waiting))
            waiting = output
        return fetched if waiting is None else [*fetched, np.asarray(waiting)]


def check_batches(batches: Iterable[Tokens], vocab_size: int) -> Iterator[Int[np.ndarray, "_B _T"]]:
    """Yields calibration batches as int32 on the host.

    Raises:
        ValueError: a batch is not an integer [B, T], holds ids outside the vocabulary, or there is none.
    """
    count = 0
    for count, batch in enumerate(batches, 1):
        check_tokens(batch, vocab_size, f"calibration batch {count - 1}")
        tokens = np.asarray(batch, np.int32)
        if not tokens.size:
            raise ValueError(f"calibration batch {count - 1} has shape {list(tokens.shape)}, expected at least a token")
        yield tokens
    if not count:
        raise ValueError("there are no calibration batches; is the text shorter than one window?")


def _free_bytes() -> int:
    """Memory of the default device that nothing takes; none where the device does not say, as a CPU."""
    stats = dispatch.default_device().memory_stats() or {}
    return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)


class _Tap:
    """Stands in for a linear layer while a block is traced, and notes its input."""

    def __init__(self, layer: Linear | VQLinear, inputs: dict[str, Array], path: str):
        self.layer, self.inputs, self.path = layer, inputs, path

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        self.inputs[self.path] = x
        return self.layer(x)


def _apply_tapped(block: Block, h: Array, at: Rotary) -> tuple[Array, dict[str, Array]]:
    """The block's output and every distinct input of its linear layers, by path within the block.

    To be traced: inside `jax.jit` the block is a copy, which this changes.
    """
    inputs: dict[str, Array] = {}
    for path, owner, name in list(block.places()):
        if hessian_key(path) == path:
            setattr(owner, name, nnx.static(_Tap(getattr(owner, name), inputs, path)))
    return block(h, at), inputs


def _in_forward_order(moments: dict[str, Moment], block: Block) -> dict[str, Moment]:
    """A jitted function returns a dictionary in alphabetical order; the first layer with a fault is to be named."""
    return {path: moments[path] for path, _, _ in block.places() if path in moments}


def _zero_moments(block: Block) -> dict[str, Moment]:
    places = [(path, getattr(owner, name)) for path, owner, name in block.places()]
    return {path: Moment.zeros(layer.shape[1]) for path, layer in places if hessian_key(path) == path}


@functools.partial(jax.jit, donate_argnames="moments")
def _observe(
    block: Block, h: Float[Array, "B T hidden"], at: Rotary, moments: dict[str, Moment]
) -> tuple[Float[Array, "B T hidden"], dict[str, Moment]]:
    h, inputs = _apply_tapped(block, h, at)
    return h, {path: moment.add(inputs[path]) for path, moment in moments.items()}


@functools.partial(jax.jit, static_argnames="path", donate_argnames="moment")
def _observe_layer(block: Block, h: Float[Array, "B T hidden"], at: Rotary, moment: Moment, path: str) -> Moment:
    return moment.add(_apply_tapped(block, h, at)[1][path])


@functools.partial(jax.jit, donate_argnames="moment")
def _observe_norm(norm: RMSNorm, h: Float[Array, "B T hidden"], moment: Moment) -> Moment:
    return moment.add(norm(h))


_run: Callable[[Block, Array, Rotary], Any] = jax.jit(lambda block, h, at: block(h, at))
