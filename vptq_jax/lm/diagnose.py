"""Finds where a model goes wrong."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer

from vptq_jax.lm.decoder import Decoder


def first_nonfinite(model: Decoder, tokens: Integer[Array, "B T"]) -> str | None:
    """Names the first weight, else the first activation, that holds NaN or infinity; None if all are finite.

    Weights go by their Hugging Face names.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not _finite(leaf):
            return f"the weight {_hf_name(path)}"
    h = model.embed(tokens)
    if not _finite(h):
        return "the output of model.embed_tokens"
    at = model.rotary(jnp.arange(tokens.shape[1])[None])
    for index, block in enumerate(model.layers):
        h = block(h, at)
        if not _finite(h):
            return f"the output of model.layers.{index}"
    return None if _finite(model.head(h)) else "the logits"


def _finite(x: Array) -> bool:
    return bool(jnp.isfinite(x).all())


def _hf_name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    name = ".".join(part for part in parts if part != "value")
    return name if name.startswith("lm_head") else f"model.{name}"
