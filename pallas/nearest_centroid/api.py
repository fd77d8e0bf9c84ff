"""The one entry point of the op: checks, and the choice of an implementation."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from vptq_jax.meshes import automatic, spec_of
from vptq_jax.pallas import dispatch
from vptq_jax.pallas.nearest_centroid import kernel, reference
from vptq_jax.pallas.partition import over_rows

Implementation = Literal["xla", "mosaic"]

_logger = logging.getLogger(__name__)


def nearest_centroid(
    vectors: Float[Array, "n v"], codebook: Float[Array, "k v"], *, implementation: Implementation | None = None
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The nearest centroid (Euclidean) of every vector, without ever writing the n x k distances.

    Args:
        vectors: float [n, v].
        codebook: float [k, v].
        implementation: None picks by device and shape; "xla" searches block by block; "mosaic" is
            the kernel for Hopper GPUs, for v up to 16.

    Returns:
        (index int32 [n], squared distance float32 [n]); the lowest index wins a tie.

    Raises:
        ValueError: shapes do not fit, the codebook is empty, or a dtype is not floating point.
        NotImplementedError: the implementation asked for cannot run here.

    Example:
        >>> codebook = jnp.array([[0.0, 0.0], [4.0, 4.0]])
        >>> index, squared = nearest_centroid(jnp.array([[0.0, 1.0], [5.0, 5.0]]), codebook)
        >>> index.tolist(), squared.tolist()
        ([0, 1], [1.0, 2.0])
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
    if implementation not in (None, "xla", "mosaic"):
        raise NotImplementedError(f"implementation {implementation!r} does not exist; choose None, 'xla' or 'mosaic'")
    reason = _why_not_mosaic(vectors)
    if implementation == "mosaic" and reason:
        raise NotImplementedError(f"implementation 'mosaic' cannot run: {reason}")
    if implementation == "xla" or reason:
        if implementation is None:
            _log_choice("xla", reason)
        search = reference.nearest_centroid
    else:
        _log_choice("mosaic", None)
        search = _by_kernel
    return automatic(search, PartitionSpec(spec_of(vectors)[0]), vectors, codebook)


def cluster_sums(
    vectors: Float[Array, "n v"],
    codebook: Float[Array, "k v"],
    weights: Float[Array, " n"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Int[Array, " n"], Float[Array, " n"], Float[Array, " k"], Float[Array, "k v"]]:
    """`nearest_centroid`, and the sums from which an iteration of weighted k-means takes its means.

    Args:
        vectors, codebook, implementation: as in `nearest_centroid`.
        weights: float [n], >= 0.

    Returns:
        (index, squared distance, sum of the weights of each centroid's vectors [k], weighted sum of their
        differences from the centroid [k, v]), sums in float32. The weighted mean of a cluster is its centroid plus
        the last over the one before: exact when nothing moves, and with less cancellation than a sum of vectors.

    Raises:
        ValueError: there is not one weight a vector, or as `nearest_centroid`.
        NotImplementedError: as `nearest_centroid`.
    """
    if weights.shape != vectors.shape[:1]:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; expected one for each of {len(vectors)} vectors")
    index, distance = nearest_centroid(vectors, codebook, implementation=implementation)
    weights = weights.astype(jnp.float32)
    difference = vectors.astype(jnp.float32) - codebook.astype(jnp.float32)[index]
    count = codebook.shape[0]
    mass = jax.ops.segment_sum(weights, index, count)
    return index, distance, mass, jax.ops.segment_sum(weights[:, None] * difference, index, count)


def _why_not_mosaic(vectors: Array) -> str | None:
    count, length = vectors.shape
    if length > kernel.MAX_VECTOR_LEN:
        return f"vector length {length} is above {kernel.MAX_VECTOR_LEN}"
    return dispatch.why_no_mosaic(dispatch.devices_of(vectors)) or ("there are no vectors" if count == 0 else None)


@functools.cache
def _log_choice(implementation: str, reason: str | None) -> None:
    _logger.info("nearest_centroid runs as %r%s", implementation, f": {reason}" if reason else "")


def _by_kernel(vectors: Array, codebook: Array) -> tuple[Array, Array]:
    index = _nearest_index(vectors, codebook)
    return index, reference.squared_distance(vectors, codebook, index)


@jax.custom_batching.sequential_vmap
def _nearest_index(vectors: Array, codebook: Array) -> Array:
    return over_rows(kernel.nearest_index, vectors, codebook)
