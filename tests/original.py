"""The original software: `VQuantLinear` of the package vptq, on CPU, without the imports that it does not need."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

_UNNEEDED = ("accelerate", "sentence_transformers", "sentence_transformers.SentenceTransformer")


def vquant_linear() -> Any:
    """The class.

    Raises:
        ImportError: the package is not installed.
    """
    if importlib.util.find_spec("vptq") is None:
        raise ImportError("the original software is missing: pip install --no-deps vptq==0.0.5.post1 (Python 3.11)")
    added = {name: types.ModuleType(name) for name in _UNNEEDED if name not in sys.modules}
    if "sentence_transformers.SentenceTransformer" in added:
        added["sentence_transformers.SentenceTransformer"].SentenceTransformer = object
    sys.modules.update(added)
    try:
        from vptq import VQuantLinear
    finally:
        for name in added:
            del sys.modules[name]
    return VQuantLinear


def load_original(path: Path) -> torch.nn.Module:
    """A directory in VPTQ format as the original would build it: its layers inside a transformers model, float32."""
    layer_class = vquant_linear()
    config = transformers.AutoConfig.from_pretrained(path)
    layers = config.quantization_config["config_for_layers"]
    del config.quantization_config
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, options in layers.items():
        parent, _, child = name.rpartition(".")
        layer = layer_class(**options, enable_proxy_error=False, dtype=torch.float32)
        setattr(model.get_submodule(parent), child, layer)
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors)
    return model.eval()
