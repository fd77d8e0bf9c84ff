"""Saving and loading models, plain or quantized, with Orbax.

A checkpoint is a directory:

    vptq_jax.json   format version, model config, format of every quantized layer, dtype and shape
                    of every array, size and CRC-32 of every file, generation config, metadata,
                    and a CRC-32 of all this
    arrays/         the arrays, as Orbax stores them
    tokenizer/      the tokenizer's files, if the model has one
    quant_report.json, *.png    how it was quantized, if a report was given

It is written under a temporary name and renamed, so it exists completely or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from vptq_jax.array import VQArray
from vptq_jax.array_files import changed_files, checksums, crc_holds, read_arrays, with_crc, write_arrays
from vptq_jax.convert.source import FLOATS
from vptq_jax.convert.tokenizer import load_tokenizer, save_tokenizer
from vptq_jax.files import Kind, new_directory
from vptq_jax.format import Format
from vptq_jax.json_files import read_json
from vptq_jax.lm.config import ModelConfig, RopeConfig
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.params import AbstractSource
from vptq_jax.lm.registry import build
from vptq_jax.lm.report import REPORT_FILES
from vptq_jax.nn.forms import Rounding, stored
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.problems import raise_problems
from vptq_jax.schema import REQUIRED, Reader, is_integer, short

FORMAT_VERSION = 1
"""Raised when older versions of this library could no longer read what is written."""

MANIFEST = "vptq_jax.json"
_ARRAYS, _TOKENIZER = "arrays", "tokenizer"

Shardings = jax.sharding.Sharding | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]


class Report(Protocol):
    """What can be written beside a model."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes its files into a directory."""


def is_checkpoint(path: str | Path) -> bool:
    """Whether a directory was written by `save`."""
    return (Path(path) / MANIFEST).is_file()


def save(
    model: LanguageModel | Decoder,
    path: str | Path,
    *,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> Rounding:
    """Saves a model with its config, tokenizer and generation config; all of it or nothing. The model stays as it is.

    Threads may save at the same time; an interrupt (Ctrl-C) is held back until the arrays are written.

    Args:
        model: plain or quantized.
        path: the new directory; a link stands for the directory that it points to.
        overwrite: replace an earlier checkpoint of this library in one step (nothing else is ever replaced).
        metadata: anything that JSON can hold, returned by `read_metadata`.
        report: of the quantization or of tuning; written beside the model, with its pictures.

    Returns:
        What rounding did to codebooks, scales and offsets that `trainable` had made wide; a warning names those that
        do not fit their narrow dtype and are saved in the wide one.

    Raises:
        FileExistsError: `path` holds something else, or a checkpoint and `overwrite` is False, or files that this
            library did not write.
        OSError: the directory cannot be written.
        TypeError: the metadata is not JSON.
    """
    text = json.dumps(dict(metadata or {}))
    lm = LanguageModel.of(model)
    with new_directory(path, kind=KIND, overwrite=overwrite) as temporary:
        module, rounding = stored(lm.module)
        arrays = {name: _stored(name, leaf) for name, leaf in _leaves(module)[0].items()}
        write_arrays(temporary / _ARRAYS, arrays)
        if lm.tokenizer is not None:
            save_tokenizer(lm.tokenizer, temporary / _TOKENIZER)
        if report is not None:
            report.save(temporary)
        manifest = _manifest(module, arrays) | {"generation_config": lm.generation_config}
        manifest |= {"metadata": json.loads(text), "files": checksums(temporary)}
        (temporary / MANIFEST).write_text(json.dumps(with_crc(manifest), indent=1))
    if rounding.wide:
        named = short(", ".join(rounding.wide))
        warnings.warn(f"saved in a wide dtype, since they do not fit their narrow one: {named}", stacklevel=2)
    return rounding


def load(path: str | Path, *, sharding: Shardings | None = None, verify: bool = True) -> LanguageModel:
    """A saved model, bit for bit; quantized layers stay quantized on the way.

    Args:
        path: a directory written by `save`.
        sharding: where the arrays go: one sharding for all, or a function of an array's name
            (`layers.0.mlp.up_proj.codebook`) and shape. None: the default device.
        verify: check the CRC-32 of every file first.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a newer format, or files that are missing, truncated or changed.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    raise_problems(f"{path} is damaged", file_problems(path, verify=verify))
    shell, names, structure = _shell(path, manifest)
    arrays = read_arrays(path / _ARRAYS, _abstract_arrays(manifest, sharding))
    restored = [_restored(name, arrays[name]) for name in names]
    module = nnx.merge(nnx.graphdef(shell), jax.tree.unflatten(structure, restored))
    return LanguageModel(module, load_tokenizer(path / _TOKENIZER), manifest.get("generation_config"))


def abstract(path: str | Path) -> Decoder:
    """The model of a checkpoint with shapes in place of arrays; reads nothing but the manifest.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a newer format, or a damaged manifest.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    shell, names, structure = _shell(path, manifest)
    arrays = _abstract_arrays(manifest, None)
    restored = [jax.eval_shape(functools.partial(_restored, name), arrays[name]) for name in names]
    return nnx.merge(nnx.graphdef(shell), jax.tree.unflatten(structure, restored))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that was given to `save`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a newer format, or a damaged one.
    """
    return _read_manifest(Path(path))["metadata"]


def file_problems(path: str | Path, *, verify: bool = True) -> Iterator[str]:
    """Files of a checkpoint that are missing, of another size or, with `verify`, of other contents than saved."""
    path = Path(path)
    yield from changed_files(path, _read_manifest(path)["files"], verify=verify)


def _files(path: Path) -> set[str] | None:
    """The files of a checkpoint; None if it is none, or is damaged."""
    try:
        manifest = _read_manifest(path)
    except (OSError, ValueError):
        return None
    return {MANIFEST, *REPORT_FILES, *manifest["files"]}


KIND = Kind("vptq_jax checkpoint", _files)
"""What `save` may replace."""


def _leaves(model: Decoder) -> tuple[dict[str, Any], Any]:
    """The model's arrays by dotted name, and the tree structure that takes them back in this order."""
    leaves, structure = jax.tree.flatten_with_path(nnx.state(model))
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True)), structure


def _is_small_perm(name: str, size: int) -> bool:
    return name.endswith(".perm") and size <= 1 << 16


def _stored(name: str, leaf: Array) -> Array:
    return leaf.astype(jnp.uint16) if _is_small_perm(name, leaf.size) else leaf


def _restored(name: str, array: Array) -> Array:
    return array.astype(jnp.int32) if _is_small_perm(name, array.size) else array


def _manifest(model: Decoder, arrays: Mapping[str, Array]) -> dict[str, Any]:
    layers = {path: layer.format.to_json() for path, layer in model.quantized_layers().items()}
    return {
        "format": "vptq_jax",
        "format_version": FORMAT_VERSION,
        "library_version": importlib.metadata.version("vptq_jax"),
        "config": dataclasses.asdict(model.config),
        "layers": layers,
        "arrays": {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()},
    }


def _config_from(raw: Mapping[str, Any]) -> ModelConfig:
    lists = {key: tuple(value) for key, value in raw.items() if isinstance(value, list)}
    local = raw.get("local_rope")
    ropes = {"rope": RopeConfig(**raw["rope"]), "local_rope": None if local is None else RopeConfig(**local)}
    return ModelConfig(**{**raw, **lists, **ropes})


class _ManifestSource(AbstractSource):
    """Abstract layers as a manifest describes them."""

    def __init__(self, manifest: Mapping[str, Any]):
        super().__init__()
        self._layers = manifest["layers"]

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool) -> Linear | VQLinear:
        """See `ParamSource.linear`."""
        record = self._layers.get(name)
        if record is None:
            return super().linear(name, out_features, in_features, bias=bias)
        try:
            weight = VQArray.abstract(Format.from_json(record), self.dtype)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"format of {short(name)}: {error}") from None
        return VQLinear(weight, self.tensor(f"{name}.bias", (out_features,)) if bias else None)


def _shell(path: Path, manifest: Mapping[str, Any]) -> tuple[Decoder, list[str], Any]:
    """The model without arrays, and the names and the tree structure of its arrays."""
    try:
        config = _config_from(manifest["config"])
        if config.num_layers > len(manifest["arrays"]):
            raise ValueError(f"num_layers is {config.num_layers}, but it has {len(manifest['arrays'])} arrays")
        shell = build(config, _ManifestSource(manifest))
        leaves, structure = _leaves(shell)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        reason = str(error) if isinstance(error, ValueError) else short(str(error))
        raise ValueError(f"{path / MANIFEST} is damaged ({type(error).__name__}: {reason})") from error
    raise_problems(f"{path / MANIFEST} disagrees with itself", _array_problems(leaves, manifest["arrays"]))
    return shell, list(leaves), structure


_INTEGERS = {"indices": ("uint32",), "outlier_indices": ("uint16",), "perm": ("uint16", "int32")}


def _array_problems(expected: Mapping[str, Any], recorded: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(expected.keys() | recorded.keys()):
        dtype, found = recorded.get(name, (None, None))
        wanted = list(expected[name].shape) if name in expected else None
        if found != wanted:
            yield f"array {short(name)} has shape {short(found)}; the config and formats ask for {wanted}"
        elif dtype not in _INTEGERS.get(name.rpartition(".")[2], FLOATS):
            kinds = ", ".join(_INTEGERS.get(name.rpartition(".")[2], FLOATS))
            yield f"array {short(name)} has dtype {short(dtype)}; expected {kinds}"


def _abstract_arrays(manifest: Mapping[str, Any], sharding: Shardings | None) -> dict[str, jax.ShapeDtypeStruct]:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = {}
    for name, (dtype, shape) in manifest["arrays"].items():
        array = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        place = sharding if isinstance(sharding, jax.sharding.Sharding) else sharding(name, array)
        arrays[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
    return arrays


def _read_manifest(path: Path) -> dict[str, Any]:
    if not is_checkpoint(path):
        raise FileNotFoundError(f"{path} is no vptq_jax checkpoint: it has no {MANIFEST}")
    manifest = read_json(path / MANIFEST)
    fields = Reader(manifest)
    version = fields.integer("format_version", low=1)
    if manifest.get("format") != "vptq_jax" or version is None:
        raise ValueError(f"{path / MANIFEST} does not describe a vptq_jax checkpoint")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, written by vptq_jax {short(manifest.get('library_version'))}; "
            f"this version reads up to {FORMAT_VERSION}. Upgrade vptq_jax"
        )
    # Manifests of 0.1.0 and before have no checksum of their own.
    if "crc" in manifest and not crc_holds(manifest):
        raise ValueError(f"{path / MANIFEST} has changed since it was saved (its CRC-32 differs)")
    for key in ("config", "layers", "metadata"):
        fields.object(key, REQUIRED)
    fields.object("generation_config", None)
    _check_pairs(fields, "files", lambda pair: all(is_integer(n) and n >= 0 for n in pair), "a size and a CRC-32")
    _check_pairs(
        fields, "arrays",
        lambda pair: isinstance(pair[0], str) and isinstance(pair[1], list) and all(map(is_integer, pair[1])),
        "a dtype and a shape",
    )  # fmt: skip
    raise_problems(f"{path / MANIFEST} is damaged", fields.problems)
    return manifest


def _check_pairs(fields: Reader, key: str, is_right: Callable[[list], bool], expected: str) -> None:
    pairs = fields.object(key, REQUIRED)
    for name, pair in ({} if pairs is None else pairs.raw).items():
        if not isinstance(pair, list) or len(pair) != 2 or not is_right(pair):
            fields.problems.append(f"{key} has {short(pair)} for {short(name)}; expected {expected}")
