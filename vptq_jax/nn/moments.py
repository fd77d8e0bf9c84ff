"""Sums of X^T X that lose nothing over millions of rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class Moment(NamedTuple):
    """A running sum of X^T X in float32, with what rounding has taken from it."""

    total: Float[Array, "*stack in in"]
    lost: Float[Array, "*stack in in"]

    @classmethod
    def zeros(cls, features: int) -> Moment:
        """The sum over no tokens."""
        return cls(jnp.zeros((features, features), jnp.float32), jnp.zeros((features, features), jnp.float32))

    def add(self, x: Float[Array, "*batch in"]) -> Moment:
        """Adds X^T X, losing no more than a single rounding over any number of calls."""
        rows = x.reshape(-1, x.shape[-1])
        term = jnp.einsum(
            "ti,tj->ij", rows, rows, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        # Kahan's summation with Knuth's two-sum, which needs no order of magnitudes.
        term = term + self.lost
        total = self.total + term
        kept = total - self.total
        return Moment(total, (self.total - (total - kept)) + (term - kept))

    def mean(self, tokens: int) -> Float[np.ndarray, "*stack in in"]:
        """The moment per token, symmetric to the bit, as float32 on the host."""
        return np.asarray(_mean(self, jnp.float32(tokens)))

    def finite(self) -> Bool[Array, ""]:
        """Whether every row added so far was finite (squares of others show on the diagonal)."""
        return jnp.isfinite(jnp.trace(self.total))


@jax.jit
def _mean(moment: Moment, tokens: Float[Array, ""]) -> Float[Array, "*stack in in"]:
    mean = moment.total / tokens + moment.lost / tokens
    return (mean + mean.swapaxes(-1, -2)) / 2
