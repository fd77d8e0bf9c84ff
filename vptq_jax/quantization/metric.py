"""A Hessian made ready for the search, once for all weights that read the same input."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vptq_jax.quantization.linalg import check_hessian, inverse_factor, regularize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """What the search needs to know of a Hessian; nothing in it depends on a weight.

    Attributes:
        H: the Hessian as given, float32 [in, in], in the unit of `to_unit`.
        U: upper triangular, R^-1 = U^T U, where R is the regularized Hessian in permuted order.
        perm: original column of each permuted column, int32 [in]: by falling diagonal, or as they are.
        dead: mask of inputs that were never active, in original order.
        extra: share of R's mean diagonal that had to be added to factorize it.
        damping: static; what was added before, as a share of the mean diagonal.
        permute: static; whether columns are permuted.
    """

    H: Float[Array, "in in"]
    U: Float[Array, "in in"]
    perm: Int[Array, " in"]
    dead: Bool[Array, " in"]
    extra: Float[Array, ""]
    damping: float = dataclasses.field(metadata={"static": True})
    permute: bool = dataclasses.field(metadata={"static": True})

    @property
    def regularized(self) -> Float[Array, "in in"]:
        """R, without `extra`."""
        return regularize(self.H, self.damping)[0][self.perm][:, self.perm]


@functools.partial(jax.jit, static_argnames=("damping", "permute"))
def factorize(H: Float[Array | np.ndarray, "in in"], *, damping: float, permute: bool) -> Metric:
    """The metric of a Hessian, as one traceable function; U is not finite if the Hessian cannot be factorized."""
    H, _ = to_unit(H)
    regular, dead = regularize(H, damping)
    diagonal = jnp.where(dead, 0, jnp.diag(regular))
    perm = jnp.argsort(-diagonal, stable=True) if permute else jnp.arange(len(H), dtype=jnp.int32)
    U, extra = inverse_factor(regular[perm][:, perm])
    return Metric(H, U, perm, dead, extra, damping, permute)


def checked_metric(H: Array | np.ndarray, in_features: int, name: str, *, damping: float, permute: bool) -> Metric:
    """`factorize` behind checks on the host.

    Raises:
        ValueError: H cannot be the Hessian of a weight with `in_features` inputs, or cannot be factorized.
    """
    check_hessian(H, in_features, name)
    metric = factorize(jnp.asarray(H), damping=damping, permute=permute)
    if not bool(jnp.isfinite(metric.U).all()):
        raise ValueError(
            f"{name}: the Hessian is not positive semidefinite, even with ten times its mean diagonal added"
        )
    return metric


class LastMetric:
    """`checked_metric`, which remembers the last one: layers that share an input come one after another."""

    def __init__(self) -> None:
        self._known: tuple[np.ndarray, Metric] | None = None

    def of(self, H: np.ndarray, in_features: int, name: str, damping: float, permute: bool) -> Metric:
        """The metric of H; made anew unless it is the very array that came last, with the same options."""
        if self._known is not None:
            known, metric = self._known
            if known is H and (metric.damping, metric.permute) == (damping, permute):
                return metric
        self._known = None  # one at a time: they are large
        metric = checked_metric(jnp.asarray(H), in_features, name, damping=damping, permute=permute)
        self._known = H, metric
        return metric


def to_unit(x: Float[Array | np.ndarray, "a b"]) -> tuple[Float[Array, "a b"], Float[Array, ""]]:
    """A matrix in float32 with its largest entry between 1 and 4, and the power of four that was divided out.

    Every step of the search scales with weight and Hessian, so that its result does not depend on their units, but
    squares and products of large or small ones would leave float32. Dividing by a power of four is exact, and so is
    the root of one, which a Cholesky factor takes.
    """
    x = jnp.asarray(x, jnp.float32)
    _, exponent = jnp.frexp(jnp.abs(x).max())
    unit = jnp.ldexp(jnp.float32(1), jnp.clip((exponent - 1) // 2 * 2, -126, 126))
    return x / unit, unit
