"""Writes safetensors, in shards where they grow large, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vptq_jax.convert.safetensors_reader import DTYPES, INDEX_FILE, SINGLE_FILE, find_nonfinite

_NAMES = {np.dtype(kind).name: name for name, kind in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written: its shape and dtype, known now, and its values, asked for when their turn comes."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def plan_shards(tensors: Mapping[str, LazyTensor], max_bytes: int) -> dict[str, list[str]]:
    """File names and the tensors that go into each: one file, or shards of at most `max_bytes` where possible."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def write_sharded(
    directory: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    max_bytes: int,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """Writes all tensors into a directory, with a shard index if there are several files.

    Args:
        directory: exists already.
        tensors: in the order in which they are written.
        max_bytes: size of a shard, unless one tensor alone is larger.
        progress: told the bytes of every tensor written.

    Returns:
        the names of the files.

    Raises:
        ValueError: a tensor holds NaN or infinite values.
    """
    shards = plan_shards(tensors, max_bytes)
    for file, names in shards.items():
        with (directory / file).open("wb") as stream:
            _write(stream, {name: tensors[name] for name in names}, progress)
    if len(shards) == 1:
        return list(shards)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2))
    return [*shards, INDEX_FILE]


def _write(stream: BinaryIO, tensors: Mapping[str, LazyTensor], progress: Callable[[int], Any] | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this entry
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        kind = _NAMES[np.dtype(tensor.dtype).name]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the format asks for aligned data
    stream.write(struct.pack("<Q", len(raw)) + raw)
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor.read())
        if array.shape != tensor.shape or array.dtype != np.dtype(tensor.dtype):
            raise AssertionError(
                f"{name} was announced as {tensor.dtype} {tensor.shape}, not {array.dtype} {array.shape}"
            )
        if find_nonfinite(array) is not None:
            raise ValueError(f"tensor {name!r} holds NaN or infinite values; expected finite numbers")
        stream.write(array.reshape(-1).view(np.uint8).data)
        if progress:
            progress(array.nbytes)
