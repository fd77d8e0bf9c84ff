"""Models out: to the community's VPTQ format, and dequantized to plain Hugging Face.

`plan_vptq` and `plan_hf` say what would be written and what stands against it, from shapes alone;
`export` writes it, one tensor in memory at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from vptq_jax.array import VQArray
from vptq_jax.convert.model_card import model_card
from vptq_jax.convert.safetensors_writer import LazyTensor, write_sharded
from vptq_jax.convert.source import check_dtype
from vptq_jax.convert.tokenizer import save_tokenizer
from vptq_jax.convert.vptq_format import SWAPPED, TENSORS, swap_codebooks
from vptq_jax.extras import byte_bar
from vptq_jax.files import Kind, new_directory
from vptq_jax.format import Format
from vptq_jax.json_files import TOKENIZER_FILES, read_json
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.norm import RMSNorm
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.problems import raise_problems

MAX_SHARD_BYTES = 5_000_000_000

_TABLE = "model.embed_tokens"


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """What an export would write.

    Attributes:
        tensors: in the order of the files.
        config: the `config.json`.
        problems: why it cannot be done; empty when it can.
        notes: what is converted exactly on the way.
    """

    tensors: dict[str, LazyTensor]
    config: dict[str, Any]
    problems: list[str]
    notes: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_vptq(model: LanguageModel | Decoder) -> ExportPlan:
    """The export of a quantized model to the community's VPTQ format; the model may be abstract."""
    model = LanguageModel.of(model).module
    layers = model.quantized_layers()
    swapped = [path for path, layer in layers.items() if _needs_swap(layer.format)]
    problems = list(_config_problems(model.config))
    if not layers:
        problems.append("no layer is quantized; quantize the model first, or export it as 'hf'")
    for path, layer in layers.items():
        problems += [f"{path}: {problem}" for problem in _layer_problems(path, layer)]
    section: dict[str, Any] = {
        "quant_method": "vptq",
        "config_for_layers": {path: _layer_config(layer, path in swapped) for path, layer in layers.items()},
        # transformers quantizes every linear layer that is not named here.
        "modules_to_not_convert": [path for path in _linear_modules(model) if path not in layers],
    }
    notes = []
    if swapped:
        section["vptq_jax"] = {SWAPPED: swapped}
        notes.append(
            f"{len(swapped)} layers have a residual codebook larger than the main one, which the reference reads "
            "wrongly; the two are stored in exchanged roles, which leaves every weight unchanged"
        )
    tensors = dict(_tensors(model, layers, None, swapped))
    config = config_json(dataclasses.replace(model.config, dtype=str(model.dtype))) | {"quantization_config": section}
    return ExportPlan(tensors, config, problems, notes)


def plan_hf(model: LanguageModel | Decoder, dtype: Any = None) -> ExportPlan:
    """The export to plain Hugging Face, quantized layers dequantized; the model may be abstract.

    Args:
        model: plain or quantized.
        dtype: of all parameters; None means the dtype of the model's activations.
    """
    model = LanguageModel.of(model).module
    target = check_dtype(dtype) or np.dtype(model.dtype)
    layers = model.quantized_layers()
    notes = [f"{len(layers)} quantized layers become dense"] if layers else []
    tensors = dict(_tensors(model, {}, target, ()))
    config = config_json(dataclasses.replace(model.config, dtype=target.name))
    return ExportPlan(tensors, config, list(_config_problems(model.config)), notes)


def export(
    model: LanguageModel | Decoder,
    path: str | Path,
    plan: ExportPlan,
    *,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> list[str]:
    """Writes a plan of `plan_vptq` or `plan_hf` of this model, with tokenizer, generation config and model card.

    Args:
        model: the model that was planned.
        path: the new directory; it exists completely or not at all.
        plan: what to write.
        overwrite: replace an earlier Hugging Face model in one step (nothing else is ever replaced).
        metadata: what is known about how the model was made; goes into the model card.
        max_shard_bytes: above this, several files.
        progress: show a bar.

    Returns:
        the names of the weight files.

    Raises:
        FileExistsError: the directory holds something else, or a model and `overwrite` is False, or files that no
            export writes.
        OSError: the directory cannot be written.
        ValueError: the format cannot express the model, all reasons given; or NaN in a weight.
    """
    path, lm = Path(path), LanguageModel.of(model)
    raise_problems("the model cannot be exported", plan.problems)
    with (
        new_directory(path, kind=KIND, overwrite=overwrite) as temporary,
        byte_bar(progress, plan.nbytes, "writing") as bar,
    ):
        files = write_sharded(temporary, plan.tensors, max_bytes=max_shard_bytes, progress=bar.update)
        _write_json(temporary / "config.json", plan.config)
        _write_json(temporary / "generation_config.json", _generation_config(lm))
        if lm.tokenizer is not None:
            save_tokenizer(lm.tokenizer, temporary)
        (temporary / "README.md").write_text(
            model_card(lm.module, path.name, plan.config, metadata or {}), encoding="utf-8"
        )
    return files


_FILE_NAMES = re.compile(
    r"(config|generation_config)\.json|README\.md|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|additional_chat_templates/[^/]+\.jinja|" + "|".join(map(re.escape, TOKENIZER_FILES))
)


def _files(path: Path) -> set[str] | None:
    """The files of a Hugging Face model that an export may have written; None if there is no such model."""
    try:
        config = read_json(path / "config.json")
    except (OSError, ValueError):
        return None
    if not isinstance(config.get("model_type"), str):
        return None
    entries = (str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file())
    return {entry for entry in entries if _FILE_NAMES.fullmatch(entry)}


KIND = Kind("Hugging Face model", _files)
"""What `export` may replace."""


def config_json(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` for readers of transformers 5 and, with the older keys beside the newer, of transformers 4."""
    raw = config.to_hf()
    rope = config.rope.to_hf()
    scaling = None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    raw |= {"torch_dtype": config.dtype, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    return raw if config.local_rope is None else raw | {"rope_local_base_freq": config.local_rope.theta}


def _config_problems(config: ModelConfig) -> Iterator[str]:
    again = ModelConfig.from_hf(config.to_hf())
    for field in dataclasses.fields(config):
        mine, theirs = getattr(config, field.name), getattr(again, field.name)
        if mine != theirs:
            yield (
                f"the Hugging Face config of {config.model_type} models cannot say {field.name} = {mine!r} "
                f"(it would be read as {theirs!r})"
            )


def _layer_problems(path: str, layer: VQLinear) -> Iterator[str]:
    format = layer.format
    if path == _TABLE:
        yield "the format has no quantized embedding table; leave it dense, or export as 'hf'"
    if format.outlier_size and format.outlier_vector_len == 1:
        yield "outlier vectors of length 1 mean 'no outliers' to readers of the format; use length 2 or more"
    if layer.perm is not None and format.in_features > 1 << 16:
        yield f"{format.in_features} input columns do not fit the format's 16-bit permutation"


def _needs_swap(format: Format) -> bool:
    return format.num_res_centroids > format.num_centroids


def _linear_modules(model: Decoder) -> list[str]:
    modules = [path for path in model.all_linears() if path != _TABLE]
    return modules if model.lm_head is not None else [*modules, "lm_head"]


def _layer_config(layer: VQLinear, swapped: bool) -> dict[str, Any]:
    format = layer.format
    main, residual = format.num_centroids, format.num_res_centroids
    if swapped:
        main, residual = residual, main
    return {
        "in_features": format.in_features,
        "out_features": format.out_features,
        "bias": layer.bias is not None,
        "vector_lens": [format.outlier_vector_len or -1, format.vector_len],
        "num_centroids": [format.num_outlier_centroids or -1, main],
        "num_res_centroids": [-1, residual or -1],
        "group_num": format.num_groups,
        "group_size": format.group_size,
        "outlier_size": format.outlier_size,
        "enable_norm": layer.scale is not None,
        "enable_perm": layer.perm is not None,
        "is_indice_packed": True,
        "indices_as_float": False,
    }


def _tensors(
    model: Decoder, quantized: Mapping[str, VQLinear], dtype: np.dtype | None, swapped: Any
) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor, layer by layer; linear layers in `quantized` in VPTQ form, all others dense."""
    for path, module in _modules(model).items():
        if path in quantized:
            yield from _quantized(path, quantized[path], path in swapped)
        elif isinstance(module, RMSNorm):
            yield f"{path}.weight", _dense(module.weight, dtype)
        else:
            yield f"{path}.weight", _weight(module, dtype)
        if not isinstance(module, RMSNorm) and module.bias is not None:
            yield f"{path}.bias", _dense(module.bias, dtype)


def _modules(model: Decoder) -> dict[str, Linear | VQLinear | RMSNorm]:
    """Everything that holds parameters, by Hugging Face path: the table, the layers, the last norm, the output."""
    modules: dict[str, Linear | VQLinear | RMSNorm] = {_TABLE: model.embed_tokens}
    for index, block in enumerate(model.layers):
        linears = {path: getattr(owner, name) for path, owner, name in block.places()}
        modules |= {f"model.layers.{index}.{path}": part for path, part in (block.norms() | linears).items()}
    modules["model.norm"] = model.norm
    return modules if model.lm_head is None else modules | {"lm_head": model.lm_head}


def _dense(variable: Any, dtype: np.dtype | None) -> LazyTensor:
    target = np.dtype(variable.dtype) if dtype is None else dtype
    return LazyTensor(tuple(variable.shape), target, lambda: np.asarray(variable[...].astype(target)))


def _weight(layer: Linear | VQLinear, dtype: np.dtype | None) -> LazyTensor:
    if isinstance(layer, Linear):
        return _dense(layer.weight, dtype)
    target = np.dtype(layer.codebook.dtype) if dtype is None else dtype
    return LazyTensor(layer.shape, target, lambda: np.asarray(_dequantize(layer.array, target)))


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(weight: VQArray, dtype: Any) -> Array:
    return weight.dequantize(dtype)


_INTEGERS = {"indices": np.int32, "outlier_indices": np.int16, "perm": np.int16}
_EXCHANGED = {"codebook": "res_codebook", "res_codebook": "codebook"}


def _quantized(path: str, layer: VQLinear, swapped: bool) -> Iterator[tuple[str, LazyTensor]]:
    shape: tuple[int, ...]
    for field, name in TENSORS.items():
        source = _EXCHANGED.get(field, field) if swapped else field
        format = layer.format
        if field == "indices":
            shape = (format.num_groups, format.num_vectors, format.packed_words)
            dtype = np.dtype(np.int32)
        else:
            variable = getattr(layer, source)
            if variable is None:
                continue
            shape, dtype = tuple(variable.shape), np.dtype(_INTEGERS.get(field, variable.dtype))
        if field in ("codebook", "res_codebook"):
            shape = (shape[0], shape[1] * shape[2])
        elif field == "outlier_codebook":
            shape = (1, shape[0] * shape[1])
        elif field == "outlier_indices":
            shape = (1, *shape)
        read = functools.partial(_read_field, layer, source, shape, swapped)
        yield f"{path}.{name}", LazyTensor(shape, dtype, read)


def _read_field(layer: VQLinear, field: str, shape: tuple[int, ...], swapped: bool) -> np.ndarray:
    weight: Any = layer.weight
    if field == "indices":
        weight = swap_codebooks(layer.array) if swapped else layer.array
    array = np.asarray(getattr(weight, field))
    if field == "perm":
        array = array.astype(np.uint16)  # the format keeps the bits of a uint16 in an int16
    return (array.view(_INTEGERS[field]) if field in _INTEGERS else array).reshape(shape)


def _generation_config(lm: LanguageModel) -> dict[str, Any]:
    config = lm.config
    stops: Any = list(config.eos_token_id)
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": config.pad_token_id,
    }
    return {key: value for key, value in ids.items() if value is not None} | dict(lm.generation_config or {})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
