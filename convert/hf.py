"""Hugging Face directories and hub ids: plain safetensors in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vptq_jax.convert.safetensors_reader import SafetensorsFiles, find_nonfinite
from vptq_jax.convert.source import FLOATS, HeaderSource, StoredSource, check_dtype
from vptq_jax.convert.tokenizer import load_tokenizer
from vptq_jax.extras import byte_bar
from vptq_jax.json_files import read_json, resolve_directory
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.registry import Requirements, build
from vptq_jax.lm.streamed import StreamedModel
from vptq_jax.problems import raise_problems
from vptq_jax.schema import is_integer, short

# Buffers that older versions of transformers saved; every model computes them anew.
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


@dataclasses.dataclass(frozen=True)
class PlainCheckpoint:
    """A plain Hugging Face directory whose headers fit its config: all that is known without reading a weight."""

    directory: Path
    config: ModelConfig
    files: SafetensorsFiles
    plan: Requirements

    def abstract(self) -> Decoder:
        """The model with shapes in place of arrays."""
        return build(self.config, HeaderSource(lambda name: self.files[name].dtype))

    def content_problems(self) -> Iterator[str]:
        """NaN and infinite weights; reads one tensor at a time and keeps none."""
        for name in self.plan.shapes:
            yield from nonfinite_problems(name, self.files.read(name))


def open_hf(path_or_id: str | Path) -> PlainCheckpoint:
    """Checks a plain Hugging Face checkpoint's config and headers.

    Raises:
        FileNotFoundError: no such checkpoint, or no weights in it.
        NotImplementedError: its weights are quantized by another method.
        ValueError: everything that is wrong with it, gathered.
    """
    directory = resolve_directory(path_or_id)
    raw = read_json(directory / "config.json")
    method = quantization_method(raw)
    if method is not None:
        raise NotImplementedError(f"{directory} is quantized by {method!r}; only plain checkpoints and 'vptq' are read")
    files = SafetensorsFiles(directory)
    config = read_config(raw, files)
    plan = Requirements(config)
    raise_problems(f"{directory} does not fit its config.json", tensor_problems(plan.shapes, files, config))
    return PlainCheckpoint(directory, config, files, plan)


def load_hf(path_or_id: str | Path, *, dtype: Any = None, progress: bool = False) -> LanguageModel:
    """A plain Hugging Face checkpoint as a model, tensor by tensor.

    Args:
        path_or_id: a directory, or a hub id such as `HuggingFaceTB/SmolLM2-135M`.
        dtype: dtype of the parameters; None keeps every tensor as it is stored.
        progress: show a bar.

    Raises:
        FileNotFoundError, NotImplementedError, ValueError: see `open_hf`; ValueError also for NaN or
            infinite weights, which are found on the way.
    """
    target = check_dtype(dtype)
    stored = open_hf(path_or_id)
    with byte_bar(progress, stored.files.nbytes, "reading") as bar:
        source = StoredSource(lambda name: stored.files.read(name, target), bar.update)
        model = build(stored.config, source)
    return finish(model, stored.directory)


def stream_hf(path_or_id: str | Path, *, dtype: Any = None) -> StreamedModel:
    """As `load_hf`, but every weight is read when it is asked for."""
    target = check_dtype(dtype)
    stored = open_hf(path_or_id)
    generation_config = _generation_config(stored.directory)
    name = target.name if target is not None else stored.files["model.norm.weight"].dtype.name
    return StreamedModel(
        dataclasses.replace(with_stop_tokens(stored.config, generation_config), dtype=name),
        StoredSource(lambda name: stored.files.read(name, target)),
        load_tokenizer(stored.directory),
        generation_config,
    )


def quantization_method(raw: Mapping[str, Any]) -> str | None:
    """The `quant_method` that a config.json names, None for a plain checkpoint."""
    section = raw.get("quantization_config")
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, Mapping) else section
    return method if isinstance(method, str) and len(method) < 80 else short(method)


def read_config(raw: Mapping[str, Any], files: SafetensorsFiles) -> ModelConfig:
    """The model config, after checking that it does not claim more layers than there are tensors.

    Raises:
        ValueError: see `ModelConfig.from_hf`.
    """
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(files.tensors):
        raise ValueError(f"num_hidden_layers is {layers}, but the checkpoint holds only {len(files.tensors)} tensors")
    return ModelConfig.from_hf(raw)


def tensor_problems(expected: Mapping[str, tuple[int, ...]], files: SafetensorsFiles, config: ModelConfig) -> list[str]:
    """Missing, misshapen, wrongly typed and unexpected tensors, one line each."""
    problems = []
    for name, shape in expected.items():
        if name not in files:
            problems.append(f"{name} is missing; expected shape {list(shape)}")
        elif files[name].shape != shape:
            problems.append(f"{name} has shape {list(files[name].shape)}; expected {list(shape)}")
        elif files[name].dtype.name not in FLOATS:
            problems.append(f"{name} has dtype {files[name].dtype.name}; expected {', '.join(FLOATS)}")
    return problems + [
        f"{short(name)} of shape {list(files[name].shape)} is unexpected"
        for name in files
        if name not in expected and not is_harmless(name, config)
    ]


def is_harmless(name: str, config: ModelConfig) -> bool:
    """Whether a tensor that no model asks for may be left out in silence."""
    return bool(_HARMLESS.search(name)) or (config.tie_word_embeddings and name == "lm_head.weight")


def finish(module: Decoder, directory: Path) -> LanguageModel:
    """A module just read, with the tokenizer and generation config that lie beside its weights."""
    generation_config = _generation_config(directory)
    config = with_stop_tokens(module.config, generation_config)
    module.config = dataclasses.replace(config, dtype=str(module.dtype))
    return LanguageModel(module, load_tokenizer(directory), generation_config)


def _generation_config(directory: Path) -> dict[str, Any] | None:
    file = directory / "generation_config.json"
    return read_json(file) if file.is_file() else None


def with_stop_tokens(config: ModelConfig, generation_config: Mapping[str, Any] | None) -> ModelConfig:
    """The config with the stop tokens of the generation config, which win where both are given."""
    stops = (generation_config or {}).get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    if not all(is_integer(stop) and 0 <= stop < config.vocab_size for stop in stops):
        return config
    return dataclasses.replace(config, eos_token_id=tuple(stops))


def nonfinite_problems(name: str, array: np.ndarray) -> Iterator[str]:
    """One line if an array holds NaN or infinite values."""
    position = find_nonfinite(array)
    if position is not None:
        yield f"{name} holds {array.reshape(-1)[position]} at entry {position}; expected finite numbers"
