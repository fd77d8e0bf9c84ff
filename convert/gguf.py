"""GGUF files in: dequantized tensors, the config from metadata, the tokenizer; no PyTorch needed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vptq_jax.convert.gguf_reader import GGUFFile
from vptq_jax.convert.hf import nonfinite_problems
from vptq_jax.convert.source import HeaderSource, StoredSource, check_dtype
from vptq_jax.extras import byte_bar, need
from vptq_jax.lm.arch import ARCHITECTURES, Architecture, gguf_architectures, model_type_of_gguf
from vptq_jax.lm.config import ModelConfig, RopeConfig
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.registry import Requirements, build
from vptq_jax.lm.rope import inverse_frequencies
from vptq_jax.lm.streamed import StreamedModel
from vptq_jax.problems import raise_problems
from vptq_jax.schema import Reader, short

_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
_MAX_HEAD_DIM = 1 << 16


def tokenizer_of(file: GGUFFile) -> Any | None:
    """The tokenizer of a GGUF file, see `gguf_tokenizer.gguf_tokenizer`."""
    need("tokenizers", f"the tokenizer in {file.path}")
    from vptq_jax.convert.gguf_tokenizer import gguf_tokenizer

    return gguf_tokenizer(file.metadata)


def load_gguf(path: str | Path, *, dtype: Any = None, progress: bool = False) -> LanguageModel:
    """A GGUF file as a model, tensor by tensor, with its tokenizer.

    Args:
        path: the file.
        dtype: dtype of the parameters; None means float32, which holds every GGUF type exactly.
        progress: show a bar.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the `gguf` package is missing.
        NotImplementedError: an architecture or tokenizer that is not supported.
        ValueError: everything that is wrong with it, gathered before a weight is read.
    """
    target = check_dtype(dtype) or np.dtype(np.float32)
    stored = open_gguf(path)
    tokenizer = tokenizer_of(stored.file)
    total = sum(math.prod(shape) for shape in Requirements(stored.config).shapes.values()) * target.itemsize
    with byte_bar(progress, total, "reading") as bar:
        source = StoredSource(lambda name: stored.read(name, target), bar.update)
        model = build(dataclasses.replace(stored.config, dtype=target.name), source)
    return LanguageModel(model, tokenizer)


def stream_gguf(path: str | Path, *, dtype: Any = None) -> StreamedModel:
    """As `load_gguf`, but every weight is read when it is asked for."""
    target = check_dtype(dtype) or np.dtype(np.float32)
    stored = open_gguf(path)
    return StreamedModel(
        dataclasses.replace(stored.config, dtype=target.name),
        StoredSource(lambda name: stored.read(name, target)),
        tokenizer_of(stored.file),
    )


@dataclasses.dataclass(frozen=True)
class GGUFCheckpoint:
    """A GGUF file whose tensors fit its metadata: all that is known without reading a weight.

    Attributes:
        file: the file.
        config: of the model.
        names: GGUF name of every tensor, by Hugging Face name.
    """

    file: GGUFFile
    config: ModelConfig
    names: dict[str, str]

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        """One tensor under its Hugging Face name, in Hugging Face's row order, norms without their offset."""
        offset = self.config.architecture.norm_offset
        if offset and name.endswith("norm.weight"):
            return (self.file.read(self.names[name]) - np.float32(offset)).astype(dtype)
        return self.file.read(self.names[name], dtype, _row_positions(name, self.config))

    def abstract(self) -> Decoder:
        """The model with shapes in place of arrays, as it is loaded by default."""
        return build(self.config, HeaderSource(lambda name: np.dtype(np.float32)))

    def content_problems(self) -> Iterator[str]:
        """NaN and infinite weights; reads one tensor at a time and keeps none."""
        for name in self.names:
            yield from nonfinite_problems(name, self.read(name))


def open_gguf(path: str | Path) -> GGUFCheckpoint:
    """Checks a GGUF file's metadata and tensors.

    Raises:
        FileNotFoundError, ImportError, NotImplementedError, ValueError: see `load_gguf`.
    """
    file = GGUFFile(path)
    config = gguf_config(file)
    tensors = [name for name in file.tensors if name != _ROPE_FACTORS]
    names = {hugging_face_name(name, config.architecture): name for name in tensors}
    raise_problems(f"{path} does not fit its metadata", _tensor_problems(config, file, names))
    return GGUFCheckpoint(file, config, names)


def hugging_face_name(name: str, architecture: Architecture) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay."""
    match = _TENSOR.fullmatch(name)
    modules = {part: module for module, part in architecture.gguf_names.items()}
    if match is None or match["part"] not in modules:
        return name
    layer = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{layer}{modules[match['part']]}.{match['kind']}"


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The model config that a GGUF file's metadata and tensor names describe.

    Raises:
        NotImplementedError: another architecture, experts, or a partial or unknown rope.
        ValueError: keys that are missing or do not fit together.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in gguf_architectures():
        raise NotImplementedError(
            f"{file.path} is of architecture {short(architecture)}; supported are {', '.join(gguf_architectures())}"
        )
    meta = Reader(_section(file.metadata, architecture), f"GGUF metadata {architecture}.")
    if meta.raw.get("expert_count"):
        raise NotImplementedError(
            f"{file.path} is a mixture of {short(meta.raw['expert_count'])} experts; not supported"
        )
    layers = meta.integer("block_count", low=1, high=len(file.tensors))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight'")
    hidden, heads = meta.integer("embedding_length", low=1), meta.integer("attention.head_count", low=1)
    kv_heads = meta.integer("attention.head_count_kv", None, low=0)
    head_dim = (
        meta.integer("attention.key_length", None, low=0, high=_MAX_HEAD_DIM)
        or meta.integer("rope.dimension_count", None, low=0, high=_MAX_HEAD_DIM)
        or (hidden // heads if hidden and heads else None)
    )
    window = meta.integer("attention.sliding_window", None, low=0)
    eps = meta.number("attention.layer_norm_rms_epsilon")
    context = meta.integer("context_length", low=1)
    inner = meta.integer("feed_forward_length", low=1)
    cap = meta.number("final_logit_softcapping", None) or None
    local_theta = meta.number("rope.freq_base_swa", None)
    pattern = meta.raw.get("attention.sliding_window_pattern")
    ids = Reader(_section(file.metadata, "tokenizer.ggml"), "GGUF metadata tokenizer.ggml.", meta.problems)
    bos, pad = ids.integer("bos_token_id", None), ids.integer("padding_token_id", None)
    stops = [ids.integer(key, None) for key in ("eos_token_id", "eot_token_id")]
    raise_problems(f"{file.path} cannot be used", meta.problems)
    model_type = model_type_of_gguf(architecture, windowed=bool(window))
    raw = {
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(eps),
        "max_position_embeddings": context,
        "sliding_window": window or None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": bos,
        "eos_token_id": [stop for stop in stops if stop is not None] or None,
        "pad_token_id": pad,
        "rope_parameters": _rope(file, meta, head_dim, ARCHITECTURES[model_type].rope_theta),
        "query_pre_attn_scalar": ARCHITECTURES[model_type].gguf_query_scalars.get(layers, head_dim),
        "final_logit_softcapping": cap,
    }
    # What older files do not say follows from the architecture.
    if local_theta is not None:
        raw["rope_local_base_freq"] = _shortest(local_theta)
    if isinstance(pattern, list):
        raw["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    elif pattern is not None:
        raw["sliding_window_pattern"] = pattern
    biases: dict[str, Any] = {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "attention_out_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    return dataclasses.replace(ModelConfig.from_hf(raw), **biases)


def _section(metadata: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The metadata keys that begin with a prefix, without it."""
    return {key[len(prefix) + 1 :]: value for key, value in metadata.items() if key.startswith(f"{prefix}.")}


def _shortest(value: float) -> float:
    """The decimal number that a float32 was written as: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _rope(file: GGUFFile, meta: Reader, head_dim: int | None, theta: float) -> dict[str, Any]:
    if head_dim is None:
        raise ValueError(f"{file.path} says neither the size of a head nor what it follows from")
    rotated = meta.raw.get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise NotImplementedError(f"{file.path} rotates {short(rotated)} of {head_dim} dimensions a head; expected all")
    rope: dict[str, Any] = {"rope_theta": _shortest(meta.number("rope.freq_base", theta)), "rope_type": "default"}
    kind = meta.raw.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise NotImplementedError(f"{file.path} has rope scaling {short(kind)}; supported are none, linear and yarn")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": _shortest(meta.number("rope.scaling.factor") or 0.0)}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = meta.integer("rope.scaling.original_context_length", low=1)
    raise_problems(f"{file.path} cannot be used", meta.problems)
    if _ROPE_FACTORS in file.tensors:
        rope |= _llama3_rope(file, rope["rope_theta"], head_dim)
    return rope


def _llama3_rope(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's rope from the divisors of its frequencies, which is all that a GGUF file keeps of it."""
    if math.prod(file.tensors[_ROPE_FACTORS].shape) != head_dim // 2:
        raise NotImplementedError(
            f"{file.path}: {_ROPE_FACTORS} has not {head_dim // 2} entries, one for each rotation"
        )
    divisors = file.read(_ROPE_FACTORS).reshape(-1)
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise ValueError(f"{file.path}: {_ROPE_FACTORS} holds values that are no numbers above 0")
    rope: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": _shortest(float(divisors.max(initial=1))),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = RopeConfig(theta=theta, type="llama3", **{key: value for key, value in rope.items() if key != "rope_type"})
    expected = inverse_frequencies(RopeConfig(theta), head_dim)[0] / inverse_frequencies(scaled, head_dim)[0]
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise NotImplementedError(f"{file.path}: {_ROPE_FACTORS} is not the rope scaling of Llama 3.1 to 3.3")
    return rope


def _tensor_problems(config: ModelConfig, file: GGUFFile, names: dict[str, str]) -> list[str]:
    expected = Requirements(config).shapes
    problems = []
    for name, shape in expected.items():
        if name not in names:
            problems.append(f"{name} is missing; expected shape {list(shape)}")
        elif file.tensors[names[name]].shape != shape:
            problems.append(f"{names[name]} has shape {list(file.tensors[names[name]].shape)}; expected {list(shape)}")
    return problems + [f"{short(names[name])} is unexpected" for name in names if name not in expected]


def _row_positions(name: str, config: ModelConfig) -> np.ndarray | None:
    """Where the rows of q and k belong, if the file interleaves the two halves of every head."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None or not config.architecture.gguf_interleaved:
        return None
    rows = np.arange(heads * config.head_dim)
    return rows.reshape(heads, 2, config.head_dim // 2).swapaxes(1, 2).reshape(-1)
