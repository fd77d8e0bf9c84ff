"""The Hessian's side of the algorithm: checks, regularization, the factor of its inverse, the proxy loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

_SYMMETRY_TOLERANCE = 1e-3  # Of the largest entry: float32 sums over many tokens differ by far less.
_DAMPING_ATTEMPTS = 8


def dot(a: Array, b: Array) -> Array:
    """`a @ b` in full float32: GPUs would otherwise round the operands to tf32."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def check_hessian(H: Array | np.ndarray, in_features: int, name: str) -> None:
    """Checks on the host that H can be the second moment of this layer's inputs.

    Raises:
        ValueError: H has the wrong size, is not finite, not symmetric, has a negative diagonal, or is zero.
    """
    if H.shape != (in_features, in_features):
        raise ValueError(
            f"{name}: the Hessian has shape {tuple(H.shape)}; expected ({in_features}, {in_features}) for a weight "
            f"with {in_features} input features (is it the Hessian of another layer or model?)"
        )
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, which is refused
        top, lowest, skew = (float(x) for x in _hessian_facts(H))
    if not np.isfinite(top):
        raise ValueError(f"{name}: the Hessian holds NaN or infinite values; collect it again")
    if top == 0:
        raise ValueError(f"{name}: the Hessian is all zeros, so no input ever reached this layer; collect it again")
    if lowest < 0:
        raise ValueError(f"{name}: the Hessian's diagonal goes down to {lowest:g}; expected a second moment, >= 0")
    if skew > _SYMMETRY_TOLERANCE * top:
        raise ValueError(
            f"{name}: the Hessian is not symmetric: entries differ from their mirror image by up to {skew:g} "
            f"(largest entry {top:g}); expected E[x x^T]"
        )


@jax.jit
def _hessian_facts(H: Float[Array, "in in"]) -> tuple[Array, Array, Array]:
    finite = jnp.isfinite(H).all()
    return jnp.where(finite, jnp.abs(H).max(), jnp.nan), jnp.diag(H).min(), jnp.abs(H - H.T).max()


def regularize(H: Float[Array, "in in"], damping: float) -> tuple[Float[Array, "in in"], Bool[Array, " in"]]:
    """The symmetric part of H with `damping` times its mean diagonal added; dead inputs decoupled.

    A dead input (H_qq = 0) was never active: its row and column become those of the identity
    times the mean diagonal, so that it disturbs nothing and the factorization stays finite.

    Returns:
        (regularized Hessian, mask of dead inputs).
    """
    H = 0.5 * (H + H.T)
    diagonal = jnp.diag(H)
    dead = diagonal <= 0
    mean = jnp.sum(jnp.where(dead, 0, diagonal)) / jnp.maximum(jnp.sum(~dead), 1)
    H = jnp.where(dead[:, None] | dead[None, :], 0, H)
    return H + jnp.diag(jnp.where(dead, mean, damping * mean)), dead


def inverse_factor(H: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """The upper triangular U with H^-1 = U^T U, and the share of the mean diagonal that had to be added.

    H = R R^T with R upper triangular is a Cholesky factorization in reversed order, and U = R^-1:
    one factorization and one triangular solve, no explicit inverse. If it fails, the damping grows
    by factors of ten from 1e-6, at most eight times (the last adds ten times the mean diagonal, which
    makes any second moment positive definite).
    """
    n = H.shape[0]
    mean = jnp.trace(H) / n
    eye = jnp.eye(n, dtype=H.dtype)

    def factor(extra: Array) -> Array:
        flipped = (H + extra * mean * eye)[::-1, ::-1]
        return lax.linalg.triangular_solve(jnp.linalg.cholesky(flipped), eye, lower=True, left_side=True)[::-1, ::-1]

    def failed(state: tuple[Array, Array, Array]) -> Array:
        attempt, _, U = state
        return ~jnp.isfinite(U).all() & (attempt < _DAMPING_ATTEMPTS)

    def retry(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        attempt, _, _ = state
        extra = 1e-6 * 10.0 ** attempt.astype(H.dtype)
        return attempt + 1, extra, factor(extra)

    none = jnp.zeros((), H.dtype)
    _, extra, U = lax.while_loop(failed, retry, (jnp.zeros((), jnp.int32), none, factor(none)))
    return U, extra


def proxy_loss(error: Float[Array, "in out"], H: Float[Array, "in in"]) -> Float[Array, ""]:
    """tr(E H E^T) of an error given column by column (E^T)."""
    return jnp.sum(dot(H, error) * error)
