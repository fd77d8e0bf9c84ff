"""The one entry point of the op: checks, and the choice of an implementation."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vptq_jax.pallas.nearest_centroid import reference

Implementation = Literal["xla"]


def nearest_centroid(
    vectors: Float[Array, "n v"], codebook: Float[Array, "k v"], *, implementation: Implementation | None = None
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The nearest centroid (Euclidean) of every vector, without ever writing the n x k distances.

    Args:
        vectors: float [n, v].
        codebook: float [k, v].
        implementation: None picks by device and shape; "xla" searches block by block.

    Returns:
        (index int32 [n], squared distance float32 [n]); the lowest index wins a tie.

    Raises:
        ValueError: shapes do not fit, the codebook is empty, or a dtype is not floating point.
        NotImplementedError: the implementation asked for cannot run here.
    """
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"vectors have shape {tuple(vectors.shape)} and the codebook {tuple(codebook.shape)}; "
            "expected [n, v] and [k, v] with the same v"
        )
    if codebook.shape[0] == 0:
        raise ValueError("the codebook is empty; expected at least one centroid")
    for name, array in (("vectors", vectors), ("codebook", codebook)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} have dtype {array.dtype}; expected a floating-point dtype")
    if implementation not in (None, "xla"):
        raise NotImplementedError(f"implementation {implementation!r} does not exist; choose None or 'xla'")
    return reference.nearest_centroid(vectors, codebook)
