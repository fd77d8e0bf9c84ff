"""A student and its teacher block by block: one small program for all blocks of a kind, whatever the model's depth.

The backward pass computes the inside of each block again from its input, so that memory holds one block's inside.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.norm import RMSNorm
from vptq_jax.nn.structure import Structure
from vptq_jax.tune.leaves import Leaves, as_before, decoded, learned, units
from vptq_jax.tune.loss import divergence_of, head_weight

NORM = "norm.weight"
_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)


class Teacher:
    """A decoder whose normalized last hidden states are the target.

    Args:
        model: dense or quantized, in the dtype to compute in.
    """

    def __init__(self, model: Decoder):
        self.model = model
        self.blocks = _interned(model.layers)
        self.head, self.cap = head_weight(model, model.dtype), model.config.final_logit_softcapping

    def hidden(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T hidden"]:
        """What its output projection reads."""
        at = self.model.rotary(jnp.arange(tokens.shape[1])[None])
        h = self.model.embed(tokens)
        for arrays, structure in self.blocks:
            h = _run(structure, arrays, h, at)
        return _normed(self.model.norm, h)


class Student:
    """A decoder whose blocks' leaves, and whose final norm, learn.

    Blocks of one structure that follow one another are a run: their arrays are stacked, and one program loops over
    them, so that a model of equal blocks takes a handful of launches a step.

    Args:
        model: unpacked; left as it is.
        dtype: of the decoded weights and activations.

    Attributes:
        leaves: float32, by run, each with an axis for its blocks before its own; the final norm last.
    """

    def __init__(self, model: Decoder, dtype: str):
        self.model, self.dtype = model, dtype
        self.runs = _runs(model.layers)
        # A step donates leaves: none may be an array of the model.
        self.leaves: list[Leaves] = [
            *(_stacked([learned(model.layers[i]) for i in run.layers]) for run in self.runs),
            {NORM: jnp.array(model.norm.weight[...].astype(jnp.float32))},
        ]
        blocks = self.by_block(self.leaves)
        self.units: list[Leaves] = [
            *(_stacked([units(model.layers[i], blocks[i]) for i in run.layers]) for run in self.runs),
            jax.tree.map(jnp.abs, self.leaves[-1]),
        ]
        self.moments = _ADAM.init(self.leaves)
        self.head, self.cap = head_weight(model, dtype), model.config.final_logit_softcapping
        self.norm = (model.norm.eps, model.norm.offset)

    def by_block(self, leaves: list[Leaves]) -> list[Leaves]:
        """Leaves as they are kept here, block by block, the final norm last."""
        found: list[Leaves] = []
        for run, part in zip(self.runs, leaves[:-1], strict=True):
            found += [{name: leaf[i] for name, leaf in part.items()} for i in range(len(run.layers))]
        return [*found, leaves[-1]]

    def score(self, tokens: Int[Array, "B T"], teacher: Teacher) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(mean KL(teacher || student), share of equal most likely tokens) of a batch."""
        last, _ = self._states(tokens)
        kl, same, _, _ = self._end(last, teacher.hidden(tokens), teacher)
        return kl, same

    def gradient(self, tokens: Int[Array, "B T"], teacher: Teacher) -> tuple[Float[Array, ""], list[Leaves]]:
        """(mean KL, its gradient in all leaves) of a batch."""
        target = teacher.hidden(tokens)
        last, inputs = self._states(tokens)
        kl, _, slope, norm = self._end(last, target, teacher)
        found = [norm]
        at = self.model.rotary(jnp.arange(tokens.shape[1])[None])
        for run, leaves, h in zip(self.runs[::-1], self.leaves[-2::-1], inputs[::-1], strict=True):
            gradient, slope = _backward(run.structure, run.arrays, leaves, h, at, slope, dtype=self.dtype)
            found.append(gradient)
        return kl, found[::-1]

    def step(self, batches: Sequence[Int[Array, "_B _T"]], teacher: Teacher, rate: float) -> Float[Array, ""]:
        """One step of Adam in units of each leaf, on the mean gradient of some batches; returns the loss before it."""
        kl, gradient = self.gradient(batches[0], teacher)
        for tokens in batches[1:]:
            kl, gradient = _sum((kl, gradient), self.gradient(tokens, teacher))
        if len(batches) > 1:
            kl, gradient = _over((kl, gradient), jnp.float32(len(batches)))
        self.leaves, self.moments = _update(self.leaves, self.moments, gradient, self.units, jnp.float32(rate))
        return kl

    def tuned(self, model: Decoder, leaves: list[Leaves]) -> Decoder:
        """The student's model with these leaves, norms and biases in their old dtype."""
        new = nnx.merge(*nnx.split(model), copy=True)
        *blocks, end = self.by_block(leaves)
        for index, (block, found) in enumerate(zip(model.layers, blocks, strict=True)):
            new.layers[index] = as_before(block, found)
        new.norm.weight = nnx.Param(end[NORM].astype(model.norm.weight.dtype))
        return new

    def _states(self, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B T hidden"], list[Array]]:
        """The output of the last block, and by run the inputs of its blocks."""
        at = self.model.rotary(jnp.arange(tokens.shape[1])[None])
        h, inputs = self.model.embed(tokens).astype(self.dtype), []
        for run, leaves in zip(self.runs, self.leaves[:-1], strict=True):
            h, seen = _forward(run.structure, run.arrays, leaves, h, at, dtype=self.dtype)
            inputs.append(seen)
        return h, inputs

    def _end(self, h: Array, target: Array, teacher: Teacher) -> tuple[Array, Array, Array, Leaves]:
        heads = self.head, teacher.head
        return _end(self.leaves[-1], h, target, heads, norm=self.norm, caps=(self.cap, teacher.cap))


class _BlockRun(NamedTuple):
    """Blocks of one structure in a row, their arrays stacked."""

    layers: range
    structure: Structure
    arrays: list[Array]


def _runs(blocks: Any) -> list[_BlockRun]:
    found: list[_BlockRun] = []
    parts = enumerate(_interned(blocks))
    for structure, run in itertools.groupby(parts, key=lambda part: (part[1][1], [x.shape for x in part[1][0]])):
        members = list(run)
        first = members[0][0]
        stacked = [jnp.stack(arrays) for arrays in zip(*(arrays for _, (arrays, _) in members), strict=True)]
        found.append(_BlockRun(range(first, first + len(members)), structure[0], stacked))
    return found


def _stacked(blocks: list[Leaves]) -> Leaves:
    return {name: jnp.stack([block[name] for block in blocks]) for name in blocks[0]}


def _interned(blocks: Any) -> list[tuple[list[Array], Structure]]:
    """Arrays and structure of every block; equal structures are one object, which `jax.jit` finds at once."""
    known: dict[Structure, Structure] = {}
    found = [Structure.of(block) for block in blocks]
    return [(arrays, known.setdefault(structure, structure)) for arrays, structure in found]


@functools.partial(jax.jit, static_argnames="structure")
def _run(structure: Structure, arrays: list[Array], h: Array, at: Any) -> Array:
    return structure.module(arrays)(h, at)


@jax.jit
def _normed(norm: RMSNorm, h: Array) -> Array:
    return norm(h)


@functools.partial(jax.jit, static_argnames=("structure", "dtype"))
def _forward(
    structure: Structure, arrays: list[Array], leaves: Leaves, h: Array, at: Any, *, dtype: str
) -> tuple[Array, Array]:
    """The output of a run of blocks, and the inputs of all of them."""

    def one(h: Array, block: tuple[list[Array], Leaves]) -> tuple[Array, Array]:
        arrays, leaves = block
        return decoded(structure.module(arrays), leaves, dtype)(h, at), h

    return jax.lax.scan(one, h, (arrays, leaves))


@functools.partial(jax.jit, static_argnames=("structure", "dtype"))
def _backward(
    structure: Structure, arrays: list[Array], leaves: Leaves, inputs: Array, at: Any, slope: Array, *, dtype: str
) -> tuple[Leaves, Array]:
    """Gradients in a run's leaves and in its input, given that in its output."""

    def one(slope: Array, block: tuple[list[Array], Leaves, Array]) -> tuple[Array, Leaves]:
        arrays, leaves, h = block

        def run(leaves: Leaves, h: Array) -> Array:
            return decoded(structure.module(arrays), leaves, dtype)(h, at)

        gradient, slope = jax.vjp(run, leaves, h)[1](slope)
        return slope, gradient

    slope, gradient = jax.lax.scan(one, slope, (arrays, leaves, inputs), reverse=True)
    return gradient, slope


@functools.partial(jax.jit, static_argnames=("norm", "caps"))
def _end(
    leaves: Leaves, h: Array, target: Array, heads: tuple[Array, Array], *, norm: tuple[float, float], caps: Any
) -> tuple[Array, Array, Array, Leaves]:
    """(KL, agreement, gradient in h, gradient in the final norm)."""

    def run(leaves: Leaves, h: Array) -> Array:
        return RMSNorm(leaves[NORM].astype(h.dtype), *norm)(h)

    x, back = jax.vjp(run, leaves, h)
    kl, same, slope = divergence_of(x, target, heads, caps)
    norm_gradient, slope = back(slope)
    return kl, same, slope, norm_gradient


@functools.partial(jax.jit, donate_argnums=0)
def _sum(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


@functools.partial(jax.jit, donate_argnums=0)
def _over(tree: Any, count: Float[Array, ""]) -> Any:
    return jax.tree.map(lambda x: x / count, tree)


@functools.partial(jax.jit, donate_argnames=("leaves", "moments"))
def _update(
    leaves: list[Leaves], moments: Any, gradient: list[Leaves], units: list[Leaves], rate: Float[Array, ""]
) -> tuple[list[Leaves], Any]:
    changes, moments = _ADAM.update(gradient, moments)
    return jax.tree.map(lambda x, change, size: x - rate * change * size, leaves, changes, units), moments
