"""Second moments of the inputs of linear layers, H = X^T X / T: the metric that quantization minimizes in.

Layers that read the same input (q/k/v, gate/up) share one H.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jaxtyping import Float
from safetensors.numpy import save_file

from vptq_jax.files import Kind, new_directory
from vptq_jax.json_files import parse_json
from vptq_jax.problems import raise_problems
from vptq_jax.schema import REQUIRED, Reader, short


class Hessians:
    """Second moments by module, and what they were collected from.

    Args:
        arrays: float32 [in_features, in_features] (of stacked weights [stack, in_features, in_features]) by the path
            of the first module that reads that input; may be read from a file at every access.
        modules: for each key of `arrays`, the modules that share it and the digest of the weight of each
            (`fingerprint.array_digest`; empty when unknown).
        tokens: calibration tokens behind every H.
        fingerprint: `fingerprint.model_fingerprint` of the model, empty when unknown.
        text: `fingerprint.text_digest` of the calibration batches, empty when unknown.
    """

    def __init__(
        self,
        arrays: Mapping[str, Float[np.ndarray, "*stack in in"]],
        modules: Mapping[str, Mapping[str, str]],
        tokens: int,
        fingerprint: str = "",
        text: str = "",
    ):
        self.arrays, self.modules = arrays, modules
        self.tokens, self.fingerprint, self.text = tokens, fingerprint, text
        self._key = {path: key for key, paths in modules.items() for path in paths}
        self._last: tuple[str, np.ndarray] | None = None

    def __contains__(self, path: str) -> bool:
        return path in self._key

    def __iter__(self) -> Iterator[str]:
        return iter(self._key)

    def for_module(self, path: str) -> Float[np.ndarray, "*stack in in"]:
        """H of the input of a module such as `model.layers.0.self_attn.q_proj`, float32 [in_features, in_features].

        Asked for modules of one input in a row, it is the same array, read once.

        Raises:
            ValueError: there is none for this module.
        """
        if path not in self._key:
            raise ValueError(f"no Hessian for {path}; there are {len(self._key)}, for {_some(self._key)}")
        key, last = self._key[path], self._last
        if last is None or last[0] != key:
            last = self._last = key, self.arrays[key]
        return last[1]

    def weight_digest(self, path: str) -> str:
        """Digest of the weight of a module at collection time, empty when unknown."""
        return self.modules[self._key[path]][path]

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes one safetensors file per H, each with modules, shape, tokens and fingerprint in its metadata.

        The directory appears under its name when it is complete.

        Raises:
            FileExistsError: the directory holds something else, or Hessians and `overwrite` is False.
            OSError: it cannot be written.
        """
        with new_directory(directory, kind=KIND, overwrite=overwrite) as temporary:
            for key, modules in self.modules.items():
                facts = {"tokens": self.tokens, "fingerprint": self.fingerprint, "text": self.text}
                write_file(temporary, key, self.arrays[key], dict(modules), facts | {"files": len(self.modules)})


def write_file(
    directory: Path, key: str, array: Float[np.ndarray, "*stack in in"], modules: dict[str, str], facts: dict[str, Any]
) -> None:
    """Writes one H into a directory of `Hessians.save`; `facts` are those that all of its files share.

    Raises:
        OSError: it cannot be written.
    """
    array = np.asarray(array, np.float32)
    header = {"format": _FORMAT, "modules": modules, "shape": list(array.shape), **facts}
    file = directory / f"{key}.safetensors"
    try:
        save_file({"hessian": array}, file, metadata={"vptq_jax": json.dumps(header)})
    except safetensors.SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"the Hessian {key} cannot be written to {file}: {error}") from None


_FORMAT = "hessian-1"
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors writes them


def read_hessians(directory: str | os.PathLike[str]) -> Hessians:
    """Reads what `Hessians.save` wrote; each H is read when it is asked for.

    Raises:
        FileNotFoundError: there is no such directory, or it holds no Hessians.
        ValueError: a file is damaged, missing, or belongs to another collection.
    """
    directory = Path(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"no Hessians in {directory}: expected *.safetensors files as Hessians.save writes them"
        )
    headers = {file.name.removesuffix(".safetensors"): _read_header(file) for file in files}
    first = next(iter(headers.values()))
    for key, header in headers.items():
        for field in ("tokens", "fingerprint", "files"):
            if header[field] != first[field]:
                raise ValueError(
                    f"{directory / key}.safetensors has {field} {short(header[field])} but others have "
                    f"{short(first[field])}; the directory mixes two collections"
                )
    if len(files) != first["files"]:
        raise ValueError(
            f"{directory} holds {len(files)} of {first['files']} Hessian files; collect or copy them again"
        )
    modules = {key: header["modules"] for key, header in headers.items()}
    return Hessians(
        _Files(directory, list(modules)), modules, first["tokens"], first["fingerprint"], first.get("text", "")
    )


def _kind_files(directory: Path) -> set[str] | None:
    """The files of a directory that `Hessians.save` wrote; None if there is none."""
    found = set()
    for file in directory.glob("*.safetensors"):
        with contextlib.suppress(OSError, ValueError):
            _read_header(file)
            found.add(file.name)
    return found or None


KIND = Kind("collection of Hessians", _kind_files)
"""What `Hessians.save` may replace."""


class _Files(Mapping):
    """Arrays of a directory, read at each access so that the host holds one at a time."""

    def __init__(self, directory: Path, keys: list[str]):
        self.directory, self.keys_ = directory, keys

    def __getitem__(self, key: str) -> Float[np.ndarray, "*stack in in"]:
        file = self.directory / f"{key}.safetensors"
        try:
            with safetensors.safe_open(file, framework="numpy") as tensors:
                return tensors.get_tensor("hessian").astype(np.float32)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read any more: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def _read_header(file: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            metadata = tensors.metadata() or {}
            found = tensors.get_slice("hessian") if "hessian" in tensors.keys() else None  # noqa: SIM118
            shape, dtype = (None, None) if found is None else (found.get_shape(), found.get_dtype())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
    header = Reader(parse_json(metadata.get("vptq_jax", "{}").encode(), f"the header of {file}"))
    if header.raw.get("format") != _FORMAT:
        raise ValueError(
            f"{file} has format {short(header.raw.get('format'))}, expected {_FORMAT!r} as Hessians.save writes it"
        )
    header.items("shape", (int,), "whole numbers")
    header.integer("tokens", low=0, high=1 << 62)
    header.integer("files", low=1)
    header.string("fingerprint")
    header.string("text", "")
    modules = header.object("modules", REQUIRED)
    if modules is not None:
        for path in modules.raw:
            modules.string(path)
        if not modules.raw:
            header.problems.append("modules is empty; expected the layers that read this input")
    raise_problems(f"the header of {file} is damaged", header.problems)
    if shape != header.raw["shape"] or len(shape) not in (2, 3) or shape[-1] != shape[-2]:
        raise ValueError(
            f"{file} holds a tensor 'hessian' of shape {shape}, expected {short(header.raw['shape'])}, a square"
        )
    if dtype not in _FLOATS:
        raise ValueError(f"{file} holds a tensor 'hessian' of dtype {dtype}, expected one of {', '.join(_FLOATS)}")
    return dict(header.raw)


def _some(names: Mapping[str, Any], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")
