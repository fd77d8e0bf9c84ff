"""Rotary position embedding: inverse frequencies of every rope type, and the rotation itself.

Sources: RoFormer (arXiv 2104.09864), position interpolation (2306.15595), dynamic NTK as in
transformers, YaRN (2309.00071), and the Llama 3.1 reference. Frequencies are computed in
float32 in the order in which models were trained, since long positions amplify every rounding.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vptq_jax.lm.config import ModelConfig, RopeConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotary:
    """Where tokens stand: their positions (negative: padding) and the rotation that goes with them.

    `local` is the rotation of layers with a sliding window, where they have their own.
    """

    positions: Int[Array, "#B T"]
    cos: Float[Array, "#B T half"]
    sin: Float[Array, "#B T half"]
    local: Rotary | None = None


def rotary(config: ModelConfig, positions: Int[Array, "#B T"]) -> Rotary:
    """Cos and sin (float32) of every position.

    With dynamic NTK the frequencies of a row depend on its last position (and keys in a cache
    keep the rotation of the time they were written, as in transformers); every other type depends
    on the position alone.
    """
    at = _rotary(config, config.rope, positions)
    if config.local_rope is None:
        return at
    return dataclasses.replace(at, local=_rotary(config, config.local_rope, positions))


def _rotary(config: ModelConfig, rope: RopeConfig, positions: Int[Array, "#B T"]) -> Rotary:
    attention_factor = 1.0
    if rope.type == "dynamic":
        frequencies = _dynamic(config, rope, jnp.max(positions, axis=-1) + 1)[:, None, :]
    else:
        constant, attention_factor = inverse_frequencies(rope, config.head_dim)
        frequencies = jnp.asarray(constant)[None, None, :]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rotary(positions, jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor)


def rotate(x: Float[Array, "B T N D"], at: Rotary) -> Float[Array, "B T N D"]:
    """Rotates each pair (d, d + D/2) of every head; computed in float32, returned in the dtype of x."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = at.cos[..., None, :], at.sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Float32 inverse frequencies [head_dim / 2] and the factor on cos and sin, for the static types."""
    wavelengths = _power(rope.theta, head_dim)
    if rope.type == "yarn":
        return _yarn(rope, wavelengths, head_dim)
    frequencies = np.float32(1) / wavelengths
    if rope.type == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    elif rope.type == "llama3":
        frequencies = _llama3(rope, frequencies)
    return frequencies, 1.0


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def _power(theta: float, head_dim: int) -> np.ndarray:
    # Float64 inside gives the correctly rounded float32 power, whatever the machine's float32 power does.
    return np.power(float(theta), _exponents(head_dim).astype(np.float64)).astype(np.float32)


def _dynamic(config: ModelConfig, rope: RopeConfig, length: Int[Array, "B"]) -> Float[Array, "B half"]:
    factor, trained, dim = rope.factor, config.max_position_embeddings, config.head_dim
    beyond = jnp.maximum(length, trained).astype(jnp.float32)[:, None]
    theta = rope.theta * (factor * beyond / trained - (factor - 1)) ** (dim / (dim - 2))
    short = 1 / _power(rope.theta, dim)
    return jnp.where(length[:, None] > trained, 1 / theta ** _exponents(dim), short)


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    context = rope.original_max_position_embeddings
    assert context is not None
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(context) / wavelengths - np.float32(rope.low_freq_factor)) / np.float32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    factor = np.float32(rope.factor)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    low = wavelengths > context / rope.low_freq_factor
    high = wavelengths < context / rope.high_freq_factor
    return np.where(high, frequencies, np.where(low, frequencies / factor, blended)).astype(np.float32)


def _yarn(rope: RopeConfig, wavelengths: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    context = rope.original_max_position_embeddings
    assert context is not None

    def dimension(rotations: float) -> float:
        # The dimension that makes this many rotations over the original context.
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = np.float32(1) - ramp
    stretched = np.float32(1) / (np.float32(rope.factor) * wavelengths)
    return stretched * (1 - kept) + np.float32(1) / wavelengths * kept, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
