"""A student and its teacher block by block: one small program for all blocks of a kind, whatever the model's depth.

The backward pass computes the inside of each block again from its input, so that memory holds one block's inside.
"""

from __future__ import annotations

import functools
from typing import Any

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

    Args:
        model: unpacked; left as it is.
        dtype: of the decoded weights and activations.

    Attributes:
        leaves: float32, by block, the final norm last.
    """

    def __init__(self, model: Decoder, dtype: str):
        self.model, self.dtype = model, dtype
        self.blocks = _interned(model.layers)
        # A step donates leaves: none may be an array of the model.
        self.leaves: list[Leaves] = jax.tree.map(
            jnp.array, [*map(learned, model.layers), {NORM: model.norm.weight[...].astype(jnp.float32)}]
        )
        self.units = [*map(units, model.layers, self.leaves[:-1]), jax.tree.map(jnp.abs, self.leaves[-1])]
        self.moments = [_ADAM.init(leaves) for leaves in self.leaves]
        self.head, self.cap = head_weight(model, dtype), model.config.final_logit_softcapping
        self.norm = (model.norm.eps, model.norm.offset)

    def score(self, tokens: Int[Array, "B T"], teacher: Teacher) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(mean KL(teacher || student), share of equal most likely tokens) of a batch."""
        *_, last = self._states(tokens)
        kl, same, _, _ = self._end(last, teacher.hidden(tokens), teacher)
        return kl, same

    def gradient(self, tokens: Int[Array, "B T"], teacher: Teacher) -> tuple[Float[Array, ""], list[Leaves]]:
        """(mean KL, its gradient in all leaves) of a batch."""
        target = teacher.hidden(tokens)
        *inputs, last = self._states(tokens)
        kl, _, slope, norm = self._end(last, target, teacher)
        found = [norm]
        at = self.model.rotary(jnp.arange(tokens.shape[1])[None])
        for (arrays, structure), leaves, h in zip(self.blocks[::-1], self.leaves[-2::-1], inputs[::-1], strict=True):
            gradient, slope = _backward(structure, arrays, leaves, h, at, slope, dtype=self.dtype)
            found.append(gradient)
        return kl, found[::-1]

    def step(self, tokens: Int[Array, "B T"], teacher: Teacher, rate: float) -> Float[Array, ""]:
        """One step of Adam in units of each leaf; returns the loss before it."""
        kl, gradients = self.gradient(tokens, teacher)
        for index, gradient in enumerate(gradients):
            self.leaves[index], self.moments[index] = _update(
                self.leaves[index], self.moments[index], gradient, self.units[index], jnp.float32(rate)
            )
        return kl

    def tuned(self, leaves: list[Leaves]) -> Decoder:
        """The model with these leaves, norms and biases in their old dtype."""
        new = nnx.merge(*nnx.split(self.model), copy=True)
        for index, block in enumerate(self.model.layers):
            new.layers[index] = as_before(block, leaves[index])
        new.norm.weight = nnx.Param(leaves[-1][NORM].astype(self.model.norm.weight.dtype))
        return new

    def _states(self, tokens: Int[Array, "B T"]) -> list[Float[Array, "B T hidden"]]:
        """The input of every block, and the output of the last."""
        at = self.model.rotary(jnp.arange(tokens.shape[1])[None])
        states = [self.model.embed(tokens).astype(self.dtype)]
        for (arrays, structure), leaves in zip(self.blocks, self.leaves[:-1], strict=True):
            states.append(_forward(structure, arrays, leaves, states[-1], at, dtype=self.dtype))
        return states

    def _end(self, h: Array, target: Array, teacher: Teacher) -> tuple[Array, Array, Array, Leaves]:
        heads = self.head, teacher.head
        return _end(self.leaves[-1], h, target, heads, norm=self.norm, caps=(self.cap, teacher.cap))


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
def _forward(structure: Structure, arrays: list[Array], leaves: Leaves, h: Array, at: Any, *, dtype: str) -> Array:
    return decoded(structure.module(arrays), leaves, dtype)(h, at)


@functools.partial(jax.jit, static_argnames=("structure", "dtype"))
def _backward(
    structure: Structure, arrays: list[Array], leaves: Leaves, h: Array, at: Any, slope: Array, *, dtype: str
) -> tuple[Leaves, Array]:
    """Gradients in a block's leaves and in its input, given that in its output."""

    def run(leaves: Leaves, h: Array) -> Array:
        return decoded(structure.module(arrays), leaves, dtype)(h, at)

    return jax.vjp(run, leaves, h)[1](slope)


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


@functools.partial(jax.jit, donate_argnames=("leaves", "moments"))
def _update(leaves: Leaves, moments: Any, gradient: Leaves, unit: Leaves, rate: Float[Array, ""]) -> tuple[Leaves, Any]:
    changes, moments = _ADAM.update(gradient, moments)
    return jax.tree.map(lambda x, change, size: x - rate * change * size, leaves, changes, unit), moments
