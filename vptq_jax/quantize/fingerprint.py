"""Digests of arrays and models: how saved Hessians and finished operators know what they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt


def array_digest(array: Array | np.ndarray) -> str:
    """16 hexadecimal digits over every value of a floating array, in order.

    Computed on the device that holds the array, in integer arithmetic, so that it is the same on
    every machine. Values count, dtype does not: a bf16 tensor and its float32 copy agree.
    """
    words = _mix(jnp.asarray(array))
    return "".join(f"{int(word):08x}" for word in words)


@jax.jit
def _mix(array: Float[Array, "..."]) -> UInt[Array, "2"]:
    bits = jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32).ravel()
    position = jax.lax.iota(jnp.uint32, bits.size)
    # Odd multipliers and a shift make every bit and every position count (finalizer of MurmurHash3).
    mixed = (bits ^ (position * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * (2 * position + 1), dtype=jnp.uint32)])


def bytes_digest(array: np.ndarray) -> str:
    """Digest of an array on the host: dtype, shape and every byte."""
    array = np.ascontiguousarray(array)
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=16)
    digest.update(array.view(np.uint8).reshape(-1))
    return digest.hexdigest()


def model_fingerprint(config: Mapping[str, Any], weights: Mapping[str, str]) -> str:
    """Digest of a model: its configuration and the digest of each of its weights.

    Args:
        config: plain values, as in `config.json`.
        weights: `array_digest` by tensor name.
    """
    text = json.dumps([dict(config), dict(weights)], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
