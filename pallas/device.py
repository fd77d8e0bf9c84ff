"""What the default device can run."""

from __future__ import annotations

import functools

import jax


@functools.cache
def why_no_mosaic() -> str | None:
    """Why the Mosaic GPU kernels cannot run on the default device, or None."""
    gpu = jax.devices()[0]
    if gpu.platform not in ("gpu", "cuda"):
        return f"the default device is {gpu.platform!r}, not an NVIDIA GPU"
    capability = getattr(gpu, "compute_capability", "0.0")
    if str(capability).split(".")[0] != "9":
        return f"{gpu.device_kind} has compute capability {capability}; the kernels are built for 9.0 (Hopper)"
    return None


def kind() -> str:
    """What the default device calls itself, such as `NVIDIA H100 80GB HBM3`."""
    return jax.devices()[0].device_kind


@functools.cache
def num_processors() -> int:
    """Streaming multiprocessors of the default device (an H100's where it is no GPU)."""
    return int(getattr(jax.devices()[0], "core_count", None) or 132)
