"""`Sampling`: how the next token is chosen."""

from __future__ import annotations

import dataclasses

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
        seed: of the draws; the same seed gives the same tokens.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> Sampling(temperature=0.7, top_p=0.9)
        Sampling(repetition_penalty=1.0, temperature=0.7, top_k=None, top_p=0.9, min_p=None, seed=0)
        >>> Sampling(top_p=90)
        Traceback (most recent call last):
        ValueError: top_p is 90; expected above 0 and at most 1, or None for no limit
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

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
        check("seed", is_integer(self.seed) and 0 <= self.seed < 1 << 32, "a whole number from 0 to 2**32 - 1")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


GREEDY = Sampling()
"""The most likely token each time."""
