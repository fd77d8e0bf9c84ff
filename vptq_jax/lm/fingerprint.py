"""Digests of arrays and models: how saved Hessians and finished operators know what they belong to.

Values count, dtypes and file formats do not: a model and its float32 copy are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt

from vptq_jax.lm.decoder import Block, Decoder
from vptq_jax.nn.linear import VQLinear


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


def text_digest(batches: Iterable[np.ndarray]) -> str:
    """Digest of token batches, int32 [B, T] each: their ids, shapes and order."""
    return joined_digest(map(bytes_digest, batches))


def joined_digest(digests: Iterable[str]) -> str:
    """Digest of a sequence of digests."""
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def json_digest(value: Any) -> str:
    """Digest of JSON values, whatever the order of an object's keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def model_fingerprint(config: Mapping[str, Any], weights: Mapping[str, str]) -> str:
    """Digest of a model: its configuration and the digest of each of its weights.

    Args:
        config: plain values, as in `config.json`.
        weights: `array_digest` by tensor name.
    """
    return json_digest([dict(config), dict(weights)])


def decoder_fingerprint(model: Decoder, blocks: Iterable[Block] | None = None) -> str:
    """`model_fingerprint` of a decoder; reads all weights once.

    Args:
        model: in memory, or a shell without its blocks.
        blocks: those of a shell, read as they are needed.
    """
    digests = end_digests(model)
    for index, block in enumerate(model.layers if blocks is None else blocks):
        digests |= module_digests(block, f"model.layers.{index}")
    return model_fingerprint(model.config.to_hf(), digests)


def end_digests(model: Decoder) -> dict[str, str]:
    """`module_digests` of all that is in no block: embedding, norm, output projection, and whatever else there is."""
    names = {name: getattr(model, name) for name in vars(model) if name != "layers"}
    digests: dict[str, str] = {}
    for name, part in names.items():
        if isinstance(part, nnx.Module):
            digests |= module_digests(part, name if name == "lm_head" else f"model.{name}")
    return digests


def module_digests(module: nnx.Module, path: str) -> dict[str, str]:
    """`array_digest` of every parameter of a module, whatever it is; quantized weights count by the values that they
    stand for.

    Args:
        module: a block, a layer or a norm.
        path: its module path.
    """
    digests: dict[str, str] = {}
    for parts, part in nnx.iter_modules(module):
        name = ".".join([path, *map(str, parts)])
        if isinstance(part, VQLinear):
            digests[f"{name}.weight"] = array_digest(part.array.dequantize())
            parameters: dict[str, nnx.Variable] = {} if part.bias is None else {"bias": part.bias}
        else:
            parameters = {key: value for key, value in vars(part).items() if isinstance(value, nnx.Variable)}
        digests |= {f"{name}.{key}": array_digest(value[...]) for key, value in parameters.items()}
    return digests
