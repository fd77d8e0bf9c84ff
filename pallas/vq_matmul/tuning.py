"""Configurations that were measured to be best, by GPU kind and format (`benchmarks/matmul.py --tune`)."""

from __future__ import annotations

import functools
import logging
from typing import Any

from vptq_jax.pallas import device
from vptq_jax.pallas.vq_matmul.plan import Config
from vptq_jax.spec import VQLayout

_logger = logging.getLogger(__name__)

# The fields of `Config` that differ from its defaults do so because a sweep was faster with them.
TABLE: dict[str, dict[str, dict[str, Any]]] = {
    "NVIDIA H100 80GB HBM3": {
        "v8-k256-256": {"column_warps": 4, "prefetch": 1, "replica_entries": 4096},
    },
    "NVIDIA H200": {
        "v8-k256-256": {"column_warps": 4, "prefetch": 1, "replica_entries": 4096},
        "v8-k4096": {"column_warps": 4, "prefetch": 1},
    },
}


def format_name(layout: VQLayout) -> str:
    """What the table knows a weight by: vector length and codebooks."""
    name = f"v{layout.vector_len}-k{layout.num_centroids}"
    return f"{name}-{layout.num_res_centroids}" if layout.num_res_centroids else name


def tuned(layout: VQLayout) -> Config:
    """The configuration for a weight on the default device; where none was measured, the default one."""
    return _configuration(device.kind(), format_name(layout))


@functools.cache
def _configuration(kind: str, name: str) -> Config:
    blocks = device.num_processors()
    if kind not in TABLE:
        _log_default(kind, "was not tuned")
        return Config(blocks=blocks)
    try:
        return Config(blocks=blocks, **TABLE[kind].get(name, {}))
    except TypeError as error:  # A field that is gone or renamed since the sweep.
        _log_default(kind, f"has a stale entry for {name} ({error})")
        return Config(blocks=blocks)


@functools.cache
def _log_default(kind: str, why: str) -> None:
    _logger.info("vq_matmul: %s %s; the default configuration runs", kind, why)
