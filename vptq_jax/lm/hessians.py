"""Second moments of the inputs of linear layers, H = X^T X / T: the metric that quantization minimizes in.

Layers that read the same input (q/k/v, gate/up) share one H.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jaxtyping import Float
from safetensors.numpy import save_file

from vptq_jax.extras import progress_bar
from vptq_jax.files import Kind, new_directory
from vptq_jax.json_files import parse_json
from vptq_jax.lm.activations import Activations, Tokens, check_batches, hessian_key
from vptq_jax.lm.decoder import Block, Decoder
from vptq_jax.lm.fingerprint import (
    bytes_digest,
    end_digests,
    joined_digest,
    model_fingerprint,
    module_digests,
    text_digest,
)
from vptq_jax.lm.streamed import StreamedModel
from vptq_jax.problems import raise_problems
from vptq_jax.schema import REQUIRED, Reader, short


class Hessians:
    """Second moments by module, and what they were collected from.

    Args:
        arrays: float32 [in_features, in_features] by the path of the first module that reads that input; read anew at
            every access when it is backed by files.
        modules: for each key of `arrays`, the modules that share it and the digest of the weight of each
            (`fingerprint.array_digest`; empty when unknown).
        tokens: calibration tokens behind every H.
        fingerprint: `fingerprint.model_fingerprint` of the model, empty when unknown.
        text: `fingerprint.text_digest` of the calibration batches, empty when unknown.
    """

    def __init__(
        self,
        arrays: Mapping[str, Float[np.ndarray, "in in"]],
        modules: Mapping[str, Mapping[str, str]],
        tokens: int,
        fingerprint: str = "",
        text: str = "",
    ):
        self.arrays, self.modules = arrays, modules
        self.tokens, self.fingerprint, self.text = tokens, fingerprint, text
        self._key = {path: key for key, paths in modules.items() for path in paths}

    def __contains__(self, path: str) -> bool:
        return path in self._key

    def __iter__(self) -> Iterator[str]:
        return iter(self._key)

    def for_module(self, path: str) -> Float[np.ndarray, "in in"]:
        """H of the input of a module such as `model.layers.0.self_attn.q_proj`, float32 [in_features, in_features].

        Raises:
            ValueError: there is none for this module.
        """
        if path not in self._key:
            raise ValueError(f"no Hessian for {path}; there are {len(self._key)}, for {_some(self._key)}")
        return self.arrays[self._key[path]]

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
                array = np.asarray(self.arrays[key], np.float32)
                header = {
                    "format": _FORMAT,
                    "modules": dict(modules),
                    "shape": list(array.shape),
                    "tokens": self.tokens,
                    "fingerprint": self.fingerprint,
                    "text": self.text,
                    "files": len(self.modules),
                }
                file = temporary / f"{key}.safetensors"
                try:
                    save_file({"hessian": array}, file, metadata={"vptq_jax": json.dumps(header)})
                except safetensors.SafetensorError as error:  # what it makes of a full disk
                    raise OSError(f"the Hessian {key} cannot be written to {directory}: {error}") from None


_FORMAT = "hessian-1"
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors writes them


def collect_hessians(
    model: Decoder | StreamedModel,
    batches: Iterable[Tokens],
    *,
    progress: bool = True,
    chunk_tokens: int = 1 << 18,
) -> Hessians:
    """Collects H of every linear layer of a decoder, and of its output projection, in one pass of the model.

    Batches are read in chunks. A chunk passes block by block, so that the device holds the moments of a single
    block and the host the hidden states of one chunk, however long the stream is.

    Args:
        model: in memory (plain or quantized) or in storage, from where blocks are read as they are needed, once
            for each chunk.
        batches: token ids, integer [B, T]; every token counts. Equal shapes share one compiled program.
        progress: show a progress bar.
        chunk_tokens: tokens whose hidden states the host keeps at once.

    Returns:
        Hessians by module path; `lm_head` (`model.embed_tokens` when tied) for the output projection.

    Raises:
        ValueError: there are no batches, an id is outside the vocabulary, or an activation is not finite.
    """
    shell = model.shell() if isinstance(model, StreamedModel) else model
    head = "model.embed_tokens" if shell.lm_head is None else "lm_head"
    means: dict[str, np.ndarray] = {}
    blocks: dict[str, str] = {}  # digests
    seen: list[str] = []  # digests of the batches
    tokens = 0
    count = len(batches) if isinstance(batches, Sized) else None
    total = None if count is None else count * len(shell.layers)
    with progress_bar(progress, total=total, desc="Hessians", unit="block") as bar:
        for chunk in _chunks(check_batches(batches, shell.config.vocab_size), chunk_tokens):
            activations = Activations(shell, chunk)
            share = activations.tokens / (tokens + activations.tokens)
            for layer in range(len(shell.layers)):
                name = f"model.layers.{layer}"
                block = _block(model, layer)
                _merge(means, activations.observe(block, name), share)
                if not tokens:
                    blocks |= module_digests(block, name)
                bar.update(len(chunk))
            _merge(means, {head: activations.observe_head()}, share)
            tokens += activations.tokens
            seen += map(bytes_digest, chunk)
    digests = blocks | end_digests(shell)
    modules: dict[str, dict[str, str]] = {}
    for path in (*shell.linears(), head):
        modules.setdefault(hessian_key(path), {})[path] = digests[f"{path}.weight"]
    fingerprint = model_fingerprint(shell.config.to_hf(), digests)
    return Hessians(means, modules, tokens, fingerprint, joined_digest(seen))


def check_origin(hessians: Hessians, model: Decoder | StreamedModel, batches: Iterable[Tokens], name: str) -> None:
    """Makes sure that Hessians are those that `collect_hessians` would return; reads all weights once.

    Args:
        hessians: from `load_hessians`.
        model: see `collect_hessians`.
        batches: see `collect_hessians`.
        name: where they come from, for the message.

    Raises:
        ValueError: they belong to another model, or to other text.
    """
    shell = model.shell() if isinstance(model, StreamedModel) else model
    digests = end_digests(shell)
    for layer in range(len(shell.layers)):
        digests |= module_digests(_block(model, layer), f"model.layers.{layer}")
    for what, found, expected in (
        ("the model", hessians.fingerprint, model_fingerprint(shell.config.to_hf(), digests)),
        ("the calibration text", hessians.text, text_digest(check_batches(batches, shell.config.vocab_size))),
    ):
        if found != expected:
            raise ValueError(
                f"{name} holds Hessians already, but {what} was another one then; choose another directory for "
                "these, or use those as they are (--hessians, load_hessians)"
            )


def _block(model: Decoder | StreamedModel, layer: int) -> Block:
    return model.block(layer) if isinstance(model, StreamedModel) else model.layers[layer]


def _merge(means: dict[str, np.ndarray], found: dict[str, np.ndarray], share: float) -> None:
    """Takes means over further tokens in; `share` of all tokens are theirs."""
    for key, new in found.items():
        old = means.get(key)
        means[key] = new if old is None else (old * np.float64(1 - share) + new * np.float64(share)).astype(np.float32)


def _chunks(batches: Iterable[np.ndarray], tokens: int) -> Iterator[list[np.ndarray]]:
    """Runs of batches of at least `tokens` tokens in all (the last one fewer)."""
    chunk: list[np.ndarray] = []
    for batch in batches:
        chunk.append(batch)
        if sum(part.size for part in chunk) >= tokens:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


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

    def __getitem__(self, key: str) -> Float[np.ndarray, "in in"]:
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
    if shape != header.raw["shape"] or len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            f"{file} holds a tensor 'hessian' of shape {shape}, expected {short(header.raw['shape'])}, a square"
        )
    if dtype not in _FLOATS:
        raise ValueError(f"{file} holds a tensor 'hessian' of dtype {dtype}, expected one of {', '.join(_FLOATS)}")
    return dict(header.raw)


def _some(names: Mapping[str, Any], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")
