"""The one entry point of the op: checks, and the choice of an implementation."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from vptq_jax.meshes import automatic, spec_of
from vptq_jax.pallas import dispatch
from vptq_jax.pallas.decode_attention import kernel, reference
from vptq_jax.pallas.partition import over_rows

Implementation = Literal["xla", "mosaic"]

_logger = logging.getLogger(__name__)


def decode_attention(
    q: Float[Array, "B N D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    visible: Bool[Array, "#B S"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B N D"]:
    """Softmax attention of one query a head over the visible slots of a cache.

    Args:
        q: queries; N is a multiple of K, query head n reads key head n // (N / K).
        keys, values: the cache.
        visible: slots that a row sees, at least one.
        implementation: None picks by device and shape; "mosaic" is the kernel for Hopper GPUs,
            without a derivative.

    Returns:
        [B, N, D] in the dtype of q; scores and sums are float32.

    Raises:
        ValueError: shapes do not fit.
        NotImplementedError: the implementation asked for cannot run here; the message says why.
    """
    batch, heads, head_dim = q.shape
    expected = (batch, keys.shape[1], keys.shape[2], head_dim)
    if keys.shape != expected or values.shape != expected or heads % keys.shape[1]:
        raise ValueError(
            f"q has shape {q.shape}, keys {keys.shape} and values {values.shape}; "
            "expected [B, N, D] and twice [B, K, S, D] with N a multiple of K"
        )
    if implementation not in (None, "xla", "mosaic"):
        raise NotImplementedError(f"implementation {implementation!r} does not exist; choose None, 'xla' or 'mosaic'")
    visible = jnp.broadcast_to(visible, (batch, keys.shape[2]))
    reason = _why_not_mosaic(q, keys, values)
    if implementation == "mosaic" and reason:
        raise NotImplementedError(f"implementation 'mosaic' cannot run: {reason}")
    if implementation == "xla" or reason:
        if implementation is None:
            _log_choice("xla", reason)
        return automatic(reference.decode_attention, PartitionSpec(spec_of(q)[0]), q, keys, values, visible)
    _log_choice("mosaic", None)
    return _kernel(q, keys, values, visible)


def _why_not_mosaic(q: Array, keys: Array, values: Array) -> str | None:
    reason = dispatch.why_no_mosaic(dispatch.devices_of(q, keys, values)) or kernel.unsupported(
        q.shape[-1], q.shape[1] // keys.shape[1]
    )
    if reason:
        return reason
    dtypes = {jnp.dtype(array.dtype) for array in (q, keys, values)}
    if dtypes not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        return f"dtypes are {sorted(map(str, dtypes))}; the kernel takes one of bfloat16 and float16"
    return None


@functools.cache
def _log_choice(implementation: str, reason: str | None) -> None:
    _logger.info("decode_attention runs as %r%s", implementation, f": {reason}" if reason else "")


@jax.custom_batching.sequential_vmap
def _kernel(q: Array, keys: Array, values: Array, visible: Array) -> Array:
    return over_rows(lambda rows, _: kernel.decode_attention(*rows), (q, keys, values, visible), ())
