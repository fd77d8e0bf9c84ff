"""Which implementation of an op runs: what the devices of its arguments can do, and what is said where they cannot."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp

TARGETS = {"sm_90": "9"}
"""GPUs that kernels are built for: the name of a target, and its compute capability's first number."""


class KernelFallbackWarning(UserWarning):
    """A kernel was to be expected, and something slower runs; said once for each reason."""


def devices_of(*arguments: Any) -> tuple[Any, ...]:
    """The devices on which the arrays among the arguments lie; the default device where they are not bound yet."""
    found: dict[Any, None] = {}
    for leaf in jax.tree.leaves(arguments):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            found |= dict.fromkeys(leaf.devices())
    return tuple(found) or (default_device(),)


def default_device() -> Any:
    """The device on which new arrays land."""
    chosen: Any = jax.config.values["jax_default_device"]
    if isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return chosen or jax.devices()[0]


def target_of(device: Any) -> str | None:
    """The target of `TARGETS` that a device is, or None."""
    return next((target for target, number in TARGETS.items() if number == _generation(device)), None)


def _generation(device: Any) -> str | None:
    """The first number of a GPU's compute capability (a name on AMD's), or None where the device is no GPU."""
    if device.platform not in ("gpu", "cuda"):
        return None
    return str(getattr(device, "compute_capability", "0.0")).partition(".")[0]


def why_no_mosaic(devices: tuple[Any, ...] | None = None) -> str | None:
    """Why the Mosaic GPU kernels cannot run on some devices (by default the default one), or None."""
    device = next((device for device in devices or (default_device(),) if target_of(device) is None), None)
    if device is None:
        return None
    if device.platform not in ("gpu", "cuda"):
        return f"the device is {device.platform!r}, not an NVIDIA GPU"
    capability = getattr(device, "compute_capability", "0.0")
    return f"{device.device_kind} has compute capability {capability}; the kernels are built for 9.0 (Hopper)"


def has_fused_attention(dtype: Any, head_dim: int) -> bool:
    """Whether the default device has cuDNN's fused attention, forward and backward, for heads of this kind."""
    generation = _generation(default_device()) or ""
    fits = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    return fits and generation.isdigit() and int(generation) >= 8


@functools.cache
def warn_fallback(op: str, reason: str, remedy: str) -> None:
    """Says that a kernel does not run, once for each reason."""
    warnings.warn(f"{op} runs without its kernel: {reason}; {remedy}", KernelFallbackWarning, stacklevel=4)


@functools.cache
def num_processors() -> int:
    """Streaming multiprocessors of the default device (an H100's where it is no GPU)."""
    return int(getattr(default_device(), "core_count", None) or 132)
