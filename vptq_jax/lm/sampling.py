"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vptq_jax.schema import is_finite, is_integer, short


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The filters apply in the order of the attributes, each to what the one before it left.

    Attributes:
        repetition_penalty: logits of tokens seen before, prompt included, are divided by this
            where positive and multiplied where negative (CTRL, arXiv 1909.05858); 1 is off.
        temperature: divides the logits; 0 takes the most likely token and ignores the rest.
        top_k: keep this many of the most likely tokens; None is off.
        top_p: keep the most likely tokens until they hold this probability (arXiv 1904.09751); None is off.
        min_p: keep tokens with at least this share of the best one's probability (arXiv 2407.01082); None is off.

    Raises:
        ValueError: a value is out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise ValueError(f"{name} is {short(getattr(self, name))}; expected {expected}")

        def share(value: float | None) -> bool:
            return value is None or (is_finite(value) and 0 <= value <= 1)

        check(
            "repetition_penalty",
            is_finite(self.repetition_penalty) and 1e-3 <= self.repetition_penalty <= 1e3,
            "a number above 0 (0.001 to 1000)",
        )
        check(
            "temperature",
            is_finite(self.temperature) and (self.temperature == 0 or 1e-3 <= self.temperature <= 1e6),
            "0 (most likely token) or a number of at least 0.001, at most a million",
        )
        check(
            "top_k",
            self.top_k is None or (is_integer(self.top_k) and self.top_k >= 1),
            "a whole number of at least 1, or None for no limit",
        )
        check("top_p", share(self.top_p) and self.top_p != 0, "above 0 and at most 1, or None for no limit")
        check("min_p", share(self.min_p), "0 to 1, or None for no limit")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    def traced(self, vocab_size: int) -> SamplingArrays:
        """The settings as arrays, so that other values need no other program."""
        # A share that float32 rounds to 0 would leave no token.
        smallest = float(jnp.finfo(jnp.float32).tiny)
        return SamplingArrays(
            repetition_penalty=jnp.float32(self.repetition_penalty),
            temperature=jnp.float32(self.temperature or 1.0),
            top_k=jnp.int32(vocab_size if self.top_k is None else min(self.top_k, vocab_size)),
            top_p=jnp.float32(1.0 if self.top_p is None else max(self.top_p, smallest)),
            min_p=jnp.float32(0.0 if self.min_p is None else self.min_p),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """`Sampling` as scalars inside a jitted program; what is off has its neutral value."""

    repetition_penalty: Float[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]


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
