"""Strict, lazy access to the tensors of a safetensors file or sharded directory.

Every header is checked in full before a single tensor is read: nothing is allocated on the word
of a file. Tensors are then read one by one into buffers that JAX can adopt without a copy, so a
checkpoint never exists twice in memory. (`safetensors.safe_open` maps files into memory, which
counts every page read until the file is closed.)
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vptq_jax.json_files import parse_json, read_json
from vptq_jax.problems import raise_problems
from vptq_jax.schema import is_integer, short

MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors format itself sets."""

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Bits of the exponent: all set means NaN or infinity. Views as unsigned integers, by dtype name.
_EXPONENT = {
    "float64": (np.uint64, 0x7FF0_0000_0000_0000),
    "float32": (np.uint32, 0x7F80_0000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}
_CHUNK = 1 << 22
_MAX_AXES = 8
_MAX_NAME = 255  # bytes of a file name
_ALIGNMENT = 64  # what XLA's CPU client asks of a buffer that it adopts


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, dtype, shape, absolute byte offset and byte count."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFiles:
    """The tensors of one safetensors file, or of a directory with one or several of them.

    Attributes:
        tensors: facts about every tensor, by name, from headers alone.

    Raises:
        FileNotFoundError: there are no safetensors.
        ValueError: every fault found in the headers and the shard index, together.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files, weight_map = _find_files(self.path)
        self.tensors: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for file in files:
            try:
                header = read_header(file)
            except ValueError as error:
                problems.append(str(error))
                continue
            for name, info in header.items():
                if name in self.tensors:
                    problems.append(f"tensor {short(name)} is in both {self.tensors[name].file.name} and {file.name}")
                self.tensors[name] = info
        if weight_map is not None and not problems:
            problems = _index_problems(weight_map, self.tensors)
        raise_problems(f"{self.path} cannot be read", problems)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str, dtype: Any = None) -> np.ndarray:
        """One tensor, in a fresh aligned buffer.

        Args:
            name: the tensor's name.
            dtype: convert to this dtype piece by piece, without a second copy of the tensor; None keeps the stored one.

        Raises:
            ValueError: the file became shorter since its header was read.
        """
        info = self.tensors[name]
        dtype = info.dtype if dtype is None else np.dtype(dtype)
        size = math.prod(info.shape)
        result = aligned_empty(size * dtype.itemsize).view(dtype)
        what = f"{info.file}: tensor {short(name)}"
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.offset)
            if dtype == info.dtype:
                _read_fully(stream, result.view(np.uint8), what)
            else:
                scratch = np.empty(min(size, _CHUNK), info.dtype)
                for start in range(0, size, _CHUNK):
                    piece = scratch[: min(_CHUNK, size - start)]
                    _read_fully(stream, piece.view(np.uint8), what)
                    with np.errstate(over="ignore", invalid="ignore"):
                        result[start : start + piece.size] = piece
        return result.reshape(info.shape)


def aligned_empty(nbytes: int) -> np.ndarray:
    """An uninitialized uint8 buffer at an address that `jax.device_put` adopts on CPU instead of copying."""
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + nbytes]


def find_nonfinite(array: np.ndarray) -> int | None:
    """Flat position of the first NaN or infinity of a float array, or None; a few MB of scratch at most."""
    kind = _EXPONENT.get(array.dtype.name)
    if kind is None:
        return None
    flat = array.reshape(-1).view(kind[0])
    mask = kind[0](kind[1])
    for start in range(0, flat.size, _CHUNK):
        bad = (flat[start : start + _CHUNK] & mask) == mask
        if bad.any():
            return start + int(bad.argmax())
    return None


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file declares, every claim checked against the file's size.

    Raises:
        ValueError: names the file, the tensor, what was found and what was expected.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{file} has {size} bytes; a safetensors file starts with 8 bytes of header length")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{file} declares a header of {length} bytes but has {size - 8} left "
                f"(and the format allows {MAX_HEADER_BYTES}); it is truncated or not a safetensors file"
            )
        raw = stream.read(length)
    header = parse_json(raw, f"the header of {file}")
    header.pop("__metadata__", None)
    start, available = 8 + length, size - 8 - length
    infos: dict[str, TensorInfo] = {}
    problems = []
    for name, entry in header.items():
        try:
            infos[name] = _tensor_info(file, entry, start, available)
        except ValueError as error:
            problems.append(f"{file}: tensor {short(name)}: {error}")
    if not problems:
        problems = _coverage_problems(file, infos, start, size)
    if problems:
        raise ValueError("\n  ".join(problems))
    return infos


def _tensor_info(file: Path, entry: Any, start: int, available: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("its header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {short(dtype)} is not supported; expected one of {', '.join(DTYPES)}")
    if not (isinstance(shape, list) and len(shape) <= _MAX_AXES and all(_is_count(n) for n in shape)):
        raise ValueError(f"shape {short(shape)} is not a list of at most {_MAX_AXES} whole numbers from 0 on")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_count(n) for n in offsets)):
        raise ValueError(f"data_offsets {short(offsets)} are not two whole numbers from 0 on")
    begin, end = offsets
    if not begin <= end <= available:
        raise ValueError(f"data_offsets [{begin}, {end}] do not lie in the file's {available} data bytes (truncated?)")
    numpy_dtype = np.dtype(DTYPES[dtype])
    expected = math.prod(shape) * numpy_dtype.itemsize
    if end - begin != expected:
        raise ValueError(f"data_offsets span {end - begin} bytes; {dtype} of shape {short(shape)} takes {expected}")
    return TensorInfo(file, numpy_dtype, tuple(shape), start + begin, end - begin)


def _coverage_problems(file: Path, infos: dict[str, TensorInfo], start: int, size: int) -> list[str]:
    """The tensors must follow each other without gap or overlap and fill the file, as the format asks."""
    position, previous = start, "the header"
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            fault = "overlaps" if info.offset < position else "leaves a gap after"
            return [f"{file}: tensor {short(name)} at byte {info.offset} {fault} {previous}, which ends at {position}"]
        position, previous = info.offset + info.nbytes, f"tensor {short(name)}"
    if position != size:
        return [f"{file} has {size - position} bytes after {previous}; expected none"]
    return []


def _is_count(value: Any) -> bool:
    return is_integer(value) and 0 <= value < 1 << 63


def _read_fully(stream: Any, buffer: np.ndarray, what: str) -> None:
    view, done = memoryview(buffer), 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise ValueError(f"{what}: the file ended after {done} of {len(view)} bytes")
        done += count


def _find_files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a path, and the shard index's map from tensor to file where there is one."""
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE], None
    if (path / INDEX_FILE).is_file():
        weight_map = _read_index(path)
        return [path / shard for shard in sorted(set(weight_map.values()))], weight_map
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1 and not re.search(r"-\d+-of-\d+$", found[0].stem):
        return found, None
    if found:
        names = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
        raise FileNotFoundError(f"{path} has shards ({names}) but no {INDEX_FILE}; download the index too")
    others = [file.name for file in sorted(path.iterdir()) if file.suffix in (".bin", ".pt", ".pth")]
    hint = f" ({', '.join(others[:3])}: pickled weights are not read; convert them to safetensors)" if others else ""
    raise FileNotFoundError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / INDEX_FILE}: weight_map is {short(weight_map)}; expected tensor names and files")
    problems = []
    for shard in sorted({repr(value): value for value in weight_map.values()}.items()):
        name = shard[1]
        # A plain name only: the index must not lead outside the directory.
        if not isinstance(name, str) or not _is_plain(name):
            problems.append(f"shard {short(name)} is not a plain file name in the directory")
        elif not (path / name).is_file():
            problems.append(f"shard {short(name)} is missing")
    raise_problems(f"{path / INDEX_FILE} cannot be used", problems)
    return weight_map


def _is_plain(name: str) -> bool:
    """Whether a name can only be that of a file in the directory itself."""
    long = len(name.encode(errors="replace")) > _MAX_NAME
    return name == os.path.basename(name) and name not in ("", ".", "..") and "\\" not in name and not long


def _index_problems(weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> list[str]:
    problems = [
        f"the index places {short(name)} in {short(shard)}, which "
        + (f"does not hold it ({tensors[name].file.name} does)" if name in tensors else "does not hold it")
        for name, shard in weight_map.items()
        if name not in tensors or tensors[name].file.name != shard
    ]
    return problems + [f"{info.file.name} holds {short(name)}, which the index does not list"
                       for name, info in tensors.items() if name not in weight_map]  # fmt: skip
