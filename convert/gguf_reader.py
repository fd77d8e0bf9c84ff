"""Strict, lazy access to the metadata and tensors of a GGUF file.

Lengths and counts are checked against the file's size before they are believed. (The reader of
the `gguf` package trusts them, and keeps an object for every token of the vocabulary.) Block
formats and their decoding come from the `gguf` package.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vptq_jax.convert.safetensors_reader import aligned_empty
from vptq_jax.extras import need
from vptq_jax.schema import is_integer, short

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_AXES = 4
_CHUNK = 1 << 22
_MAX_ENTRIES = 1 << 23  # of a metadata array: the largest vocabularies have 2**18

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""Tensor types that are read."""


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor: type name, shape in NumPy order (rows first), absolute byte offset, and bytes of one row."""

    type: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.row_bytes * math.prod(self.shape[:-1])


class GGUFFile:
    """Metadata and tensors of a GGUF file, little-endian, version 2 or 3.

    Attributes:
        metadata: every key, arrays as lists.
        tensors: facts about every tensor, by GGUF name.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the `gguf` package is missing.
        ValueError: the file is truncated, lies about a length, or holds something unknown.
    """

    def __init__(self, path: str | Path):
        need("gguf", "reading GGUF files")
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist")
        with self.path.open("rb") as stream:
            try:
                self.metadata, self.tensors = _read(stream, self.path.stat().st_size)
            except ValueError as error:
                raise ValueError(f"{self.path} cannot be read as GGUF: {error}") from None

    def read(self, name: str, dtype: Any = np.float32, rows: np.ndarray | None = None) -> np.ndarray:
        """One tensor, decoded piece by piece.

        Args:
            name: GGUF name.
            dtype: float dtype of the result.
            rows: where each stored row (of a vector: each entry) goes, or None.
        """
        from gguf import GGMLQuantizationType, dequantize

        tensor = self.tensors[name]
        columns = tensor.shape[-1]
        count = math.prod(tensor.shape[:-1])
        dtype = np.dtype(dtype)
        result = aligned_empty(count * columns * dtype.itemsize).view(dtype).reshape(count, columns)
        step = max(1, _CHUNK // max(1, columns))
        with self.path.open("rb") as stream:
            stream.seek(tensor.offset)
            for start in range(0, count, step):
                stop = min(start + step, count)
                raw = stream.read((stop - start) * tensor.row_bytes)
                if len(raw) < (stop - start) * tensor.row_bytes:
                    raise ValueError(f"{self.path}: the file ended inside tensor {short(name)}")
                block = np.frombuffer(raw, np.uint8).reshape(stop - start, tensor.row_bytes)
                values = dequantize(block, GGMLQuantizationType[tensor.type])
                if rows is None:
                    result[start:stop] = values
                elif len(tensor.shape) == 1:
                    result[0, rows] = values[0]
                else:
                    result[rows[start:stop]] = values
        return result.reshape(tensor.shape)


class _Cursor:
    """Reads from a stream, refusing to go beyond the file's end before allocating."""

    def __init__(self, stream: BinaryIO, size: int):
        self.stream, self.size, self.position = stream, size, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise ValueError(f"{what} takes {count} bytes at byte {self.position}, but the file has {self.size}")
        self.position += count
        return self.stream.read(count)

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("Q", f"the length of {what}"), what)
        return raw.decode("utf-8", errors="replace")


def _read(stream: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    cursor = _Cursor(stream, size)
    magic = cursor.take(4, "the magic")
    if magic != _MAGIC:
        raise ValueError(f"it starts with {magic!r}; expected {_MAGIC!r}")
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        hint = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"version {version}{hint} is not supported; expected {' or '.join(map(str, _VERSIONS))}")
    num_tensors = cursor.number("Q", "the tensor count")
    num_keys = cursor.number("Q", "the key count")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise ValueError(f"metadata key {short(key)} occurs twice")
        metadata[key] = _value(cursor, cursor.number("I", f"the type of {short(key)}"), short(key))
    raw_tensors = {}
    for _ in range(num_tensors):
        name = cursor.string("a tensor name")
        if name in raw_tensors:
            raise ValueError(f"tensor {short(name)} occurs twice")
        axes = cursor.number("I", f"the number of axes of {short(name)}")
        if not 1 <= axes <= _MAX_AXES:
            raise ValueError(f"tensor {short(name)} has {axes} axes; expected 1 to {_MAX_AXES}")
        shape = struct.unpack(f"<{axes}Q", cursor.take(8 * axes, f"the shape of {short(name)}"))
        kind = cursor.number("I", f"the type of {short(name)}")
        raw_tensors[name] = (shape[::-1], kind, cursor.number("Q", f"the offset of {short(name)}"))
    alignment = metadata.get("general.alignment", 32)
    if not is_integer(alignment) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {short(alignment)}; expected a power of two")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: _tensor(name, *raw, start, size) for name, raw in raw_tensors.items()}
    _refuse_overlaps(tensors)
    return metadata, tensors


def _refuse_overlaps(tensors: dict[str, GGUFTensor]) -> None:
    """Raises ValueError if two tensors share bytes: a small file would fill any memory."""
    position, previous = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < position:
            raise ValueError(f"tensor {short(name)} overlaps tensor {short(previous)}, which ends at byte {position}")
        position, previous = tensor.offset + tensor.nbytes, name


def _value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == _STRING:
        return cursor.string(what)
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], what)
    if kind != _ARRAY:
        raise ValueError(f"metadata key {what} has the unknown type {kind}")
    kind, count = cursor.number("I", what), cursor.number("Q", what)
    if kind in _SCALARS:
        code = np.dtype("<" + _SCALARS[kind] if kind != 7 else "?")
        array = np.frombuffer(cursor.take(count * code.itemsize, what), code)
        _check_entries(array.size, what)
        return array.tolist()
    if kind != _STRING:
        raise ValueError(f"metadata key {what} is an array of the unsupported type {kind}")
    texts = []
    for index in range(count):
        _check_entries(index, what)
        texts.append(cursor.string(f"an entry of {what}"))
    return texts


def _check_entries(count: int, what: str) -> None:
    if count > _MAX_ENTRIES:
        raise ValueError(f"metadata key {what} is an array of over {_MAX_ENTRIES} entries; expected fewer")


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, size: int) -> GGUFTensor:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'vptq_jax[gguf]'") from error
    try:
        member = GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(f"tensor {short(name)} has the unknown type number {kind}") from None
    if member.name not in TYPES:
        raise ValueError(f"tensor {short(name)} is of type {member.name}; supported are {', '.join(TYPES)}")
    block, block_bytes = GGML_QUANT_SIZES[member]
    if shape[-1] % block:
        raise ValueError(f"tensor {short(name)} has rows of {shape[-1]}; {member.name} needs a multiple of {block}")
    tensor = GGUFTensor(member.name, shape, start + offset, shape[-1] // block * block_bytes)
    if tensor.offset + tensor.nbytes > size:
        raise ValueError(
            f"tensor {short(name)} of shape {list(shape)} in {member.name} "
            f"ends at byte {tensor.offset + tensor.nbytes}, but the file has {size} (truncated?)"
        )
    return tensor
