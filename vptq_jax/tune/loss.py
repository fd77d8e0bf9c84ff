"""The divergence at the end of a student and its teacher, with its gradient from the same pass over the vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.divergence import compare
from vptq_jax.nn.linear import Linear

CHUNK = 4096
"""Tokens whose logits exist at one time."""


def head_weight(model: Decoder, dtype: Any) -> Float[Array, "V hidden"]:
    """The weight of the output projection, written out."""
    layer = model.embed_tokens if model.lm_head is None else model.lm_head
    return layer.weight[...].astype(dtype) if isinstance(layer, Linear) else layer.array.dequantize(dtype)


def divergence_of(
    x: Float[Array, "B T hidden"],
    target: Float[Array, "B T hidden2"],
    heads: tuple[Float[Array, "V hidden"], Float[Array, "V hidden2"]],
    caps: tuple[float | None, float | None],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "B T hidden"]]:
    """Of normalized hidden states of student and teacher, over all positions.

    Args:
        x, target: of the student and of the teacher.
        heads: weights of their output projections.
        caps: soft caps of their logits, or None; static.

    Returns:
        (mean KL(teacher || student) in nats, share of equal most likely tokens, gradient of the former in x).
    """
    count = x.shape[0] * x.shape[1]
    size = min(CHUNK, count)

    def parts(states: Array) -> Array:
        flat = states.reshape(count, states.shape[-1])
        return jnp.pad(flat, ((0, -count % size), (0, 0))).reshape(-1, size, states.shape[-1])

    real = jnp.pad(jnp.ones(count, bool), (0, -count % size)).reshape(-1, size)

    def sums(x: Array, target: Array, real: Array) -> tuple[Array, Array]:
        kl, same = compare(_logits(x, heads[0], caps[0]), _logits(target, heads[1], caps[1]))
        return jnp.where(real, kl, 0).sum(), jnp.where(real, same, False).sum()

    def chunk(part: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        (kl, same), gradient = jax.value_and_grad(sums, has_aux=True)(*part)
        return kl, same, gradient

    kl, same, gradient = jax.lax.map(chunk, (parts(x), parts(target), real))
    gradient = gradient.reshape(-1, x.shape[-1])[:count].reshape(x.shape)
    return kl.sum() / count, same.sum() / count, gradient / count


def _logits(x: Array, head: Array, cap: float | None) -> Float[Array, "n V"]:
    logits = _product(x, head.astype(x.dtype))
    return logits if cap is None else jnp.tanh(logits / cap) * cap


@jax.custom_vjp
def _product(x: Float[Array, "n h"], head: Float[Array, "V h"]) -> Float[Array, "n V"]:
    """Float32 logits; their gradient goes back as a product in the dtype of x, and the head gets none."""
    return jnp.einsum("nh,vh->nv", x, head, preferred_element_type=jnp.float32)


def _product_back(head: Float[Array, "V h"], slope: Float[Array, "n V"]) -> tuple[Array, None]:
    return jnp.einsum("nv,vh->nh", slope.astype(head.dtype), head, preferred_element_type=head.dtype), None


_product.defvjp(lambda x, head: (_product(x, head), head), _product_back)
