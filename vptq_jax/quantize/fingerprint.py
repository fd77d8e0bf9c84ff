"""Digests of arrays and models: how saved Hessians and finished operators know what they belong to.

Values count, dtypes and file formats do not: a model and its float32 copy are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from vptq_jax.models.decoder import Block, Decoder
from vptq_jax.models.linear import Linear, VQLinear


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


def end_digests(model: Decoder) -> dict[str, str]:
    """`block_digests` of all that is in no block: embedding, norm and output projection."""
    digests = {"model.norm.weight": array_digest(model.norm.weight[...])}
    for path, layer in (("model.embed_tokens", model.embed_tokens), ("lm_head", model.lm_head)):
        if layer is not None:
            digests |= layer_digests(layer, path)
    return digests


def block_digests(block: Block, name: str) -> dict[str, str]:
    """`array_digest` of every tensor of a block; quantized weights count by the values that they stand for."""
    digests = {
        f"{name}.{norm}.weight": array_digest(getattr(block, norm).weight[...])
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    for path, owner, attribute in block.places():
        digests |= layer_digests(getattr(owner, attribute), f"{name}.{path}")
    return digests


def layer_digests(layer: Linear | VQLinear, path: str) -> dict[str, str]:
    """`block_digests` of one linear layer."""
    weight = layer.weight.dequantize() if isinstance(layer, VQLinear) else layer.weight[...]
    digests = {f"{path}.weight": array_digest(weight)}
    return digests if layer.bias is None else digests | {f"{path}.bias": array_digest(layer.bias[...])}
