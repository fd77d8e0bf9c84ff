"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vptq_jax.lm.sampling import Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """`Sampling` as scalars inside a jitted program; what is off has its neutral value."""

    repetition_penalty: Float[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]

    @staticmethod
    def of(sampling: Sampling, vocab_size: int) -> SamplingArrays:
        """The settings as arrays, so that other values need no other program."""
        # A share that float32 rounds to 0 would leave no token.
        smallest = float(jnp.finfo(jnp.float32).tiny)
        return SamplingArrays(
            repetition_penalty=jnp.float32(sampling.repetition_penalty),
            temperature=jnp.float32(sampling.temperature or 1.0),
            top_k=jnp.int32(vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size)),
            top_p=jnp.float32(1.0 if sampling.top_p is None else max(sampling.top_p, smallest)),
            min_p=jnp.float32(0.0 if sampling.min_p is None else sampling.min_p),
        )


def next_token(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: SamplingArrays, key: Array, *, greedy: bool
) -> Int[Array, "B"]:
    """The next token of every row, int32.

    Args:
        logits: float32, finite.
        seen: tokens that the repetition penalty applies to.
        sampling: the settings.
        key: PRNG key of this step.
        greedy: static; takes the most likely token and uses no randomness.
    """
    logits = penalize(logits, seen, sampling.repetition_penalty)
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, restrict(logits, sampling), axis=-1).astype(jnp.int32)


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""]) -> Float[Array, "B V"]:
    """Applies the repetition penalty."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def restrict(logits: Float[Array, "B V"], sampling: SamplingArrays) -> Float[Array, "B V"]:
    """Logits after temperature, with -inf for every token that top-k, top-p or min-p removes.

    The most likely token always stays, and so do tokens as likely as the last one kept.
    """
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    all_stay = (sampling.top_k >= logits.shape[-1]) & (sampling.top_p >= 1) & (sampling.min_p <= 0)
    return jax.lax.cond(all_stay, lambda logits, _: logits, _filtered, logits, sampling)


def _filtered(logits: Float[Array, "B V"], sampling: SamplingArrays) -> Float[Array, "B V"]:
    # Bits of floats of one sign sort as integers do, which is several times as fast.
    bits = jax.lax.sort(jax.lax.bitcast_convert_type(-logits, jnp.int32), dimension=-1)
    ranked = -jax.lax.bitcast_convert_type(bits, jnp.float32)
    kept = jnp.arange(ranked.shape[-1]) < sampling.top_k
    probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Rounding may carry the sum to 1 before the last token: a top-p of 1 must still keep all.
    kept &= (before < sampling.top_p) | (sampling.top_p >= 1)
    kept &= probability >= sampling.min_p * probability[:, :1]
    threshold = jnp.where(kept, ranked, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)
