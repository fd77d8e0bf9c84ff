"""What a checkpoint holds, told from headers alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vptq_jax.convert.loading import Kind, recognize
from vptq_jax.lm.decoder import Decoder
from vptq_jax.nn.linear import Linear, VQLinear


def abstract_model(path_or_id: str | Path) -> tuple[Kind, Path, Decoder]:
    """The kind of a checkpoint, where it lies, and its model with shapes in place of arrays.

    Raises:
        FileNotFoundError, NotImplementedError, ValueError: as `load` does for what headers show.
    """
    from vptq_jax.convert import checkpoint
    from vptq_jax.convert.gguf import open_gguf
    from vptq_jax.convert.hf import open_hf
    from vptq_jax.convert.vptq_format import open_vptq

    kind, path = recognize(path_or_id)
    if kind == "orbax":
        return kind, path, checkpoint.abstract(path)
    openers: dict[Kind, Callable[[Path], Any]] = {"hf": open_hf, "hf-vptq": open_vptq, "gguf": open_gguf}
    return kind, path, openers[kind](path).abstract()


def inspect(path_or_id: str | Path) -> dict[str, Any]:
    """Layers, formats, bits and bytes of any kind of checkpoint, as JSON values; no weight is read.

    Raises:
        FileNotFoundError, NotImplementedError, ValueError: see `abstract_model`.
    """
    kind, path, model = abstract_model(path_or_id)
    return {"kind": kind, "path": str(path), **facts(model)}


def facts(model: Decoder) -> dict[str, Any]:
    """Shapes, formats and sizes of a model, which may be abstract.

    `bits_total` counts what is stored, over the decoder's linear weights; `bits_nominal` counts
    the indices alone. Weights of norms and biases are not counted.
    """
    decoder = [_row(path, layer) for path, layer in model.linears().items()]
    layers = [_row(path, layer) for path, layer in model.all_linears().items()]
    config, weights = model.config, sum(row["weights"] for row in decoder)
    return {
        "model_type": config.model_type,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "weights": sum(row["weights"] for row in layers),
        "bytes": sum(row["bytes"] for row in layers),
        "bits_nominal": sum(row["bits_nominal"] * row["weights"] for row in decoder) / weights,
        "bits_total": 8 * sum(row["bytes"] for row in decoder) / weights,
        "layers": layers,
    }


def _row(path: str, layer: Linear | VQLinear) -> dict[str, Any]:
    weights = math.prod(layer.shape)
    if isinstance(layer, VQLinear):
        form, nominal, stored = str(layer.format), layer.format.nominal_bits, layer.array.stored_bits // 8
    else:
        nominal = 8.0 * layer.weight.dtype.itemsize
        form, stored = str(layer.weight.dtype), weights * layer.weight.dtype.itemsize
    return {
        "path": path,
        "format": form,
        "out_features": layer.shape[0],
        "in_features": layer.shape[1],
        "weights": weights,
        "bytes": stored,
        "bits_nominal": nominal,
        "bits_total": 8 * stored / weights,
    }
