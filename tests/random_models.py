"""Models with random contents for tests of formats: NumPy only, so that no shape needs compiling."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vptq_jax.array import VQArray
from vptq_jax.format import Format
from vptq_jax.lm.config import ModelConfig, RopeConfig
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.params import DenseSource
from vptq_jax.lm.registry import build
from vptq_jax.nn.linear import VQLinear
from vptq_jax.spec import VQSpec

CONFIG = ModelConfig(
    "llama", vocab_size=40, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    rope=RopeConfig(5e5, "llama3", 8.0, 64), attention_bias=True, attention_out_bias=True, eos_token_id=(3, 5),
)  # fmt: skip
TOKENS = np.arange(14).reshape(2, 7)


class NumpySource(DenseSource):
    """Normal weights, a stream of its own for every name."""

    def __init__(self, seed, dtype, std):
        self.seed, self.dtype, self.std = seed, dtype, std

    def tensor(self, name, shape):
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        mean = 1 if name.endswith("norm.weight") else 0
        return jax.device_put((mean + self.std * rng.standard_normal(shape)).astype(self.dtype))


def random_vqarray(spec, out_features, in_features, seed, dtype=jnp.float32):
    """A VQArray with random contents: no algorithm involved."""
    spec = VQSpec.parse(spec)
    format = Format.of(spec, (out_features, in_features))
    rng = np.random.default_rng(seed)
    fields = {}
    for name, shape in format.shapes().items():
        if shape is None:
            fields[name] = None
            continue
        if name == "indices":
            value = rng.integers(0, 1 << 32, shape, np.uint32)
            spare = 32 * shape[-1] - format.group_size * (format.index_bits + format.res_index_bits)
            value[..., -1] &= np.uint32((1 << (32 - spare)) - 1)
        elif name == "outlier_indices":
            value = rng.integers(0, format.num_outlier_centroids, shape, np.uint16)
        elif name == "perm":
            value = rng.permutation(in_features).astype(np.int32)
        else:
            value = (0.3 * rng.standard_normal(shape)).astype(dtype)
        fields[name] = jax.device_put(value)
    return VQArray(**fields, format=format)


def random_model(config=CONFIG, specs=("v6-k16-4",), dtype=jnp.float32, seed=0):
    """A model whose linear layers take the specs in turn (None: dense)."""
    model = build(config, NumpySource(seed, dtype, std=0.2))
    for number, (path, layer) in enumerate(model.linears().items()):
        spec = specs[number % len(specs)]
        if spec is not None:
            bias = None if layer.bias is None else layer.bias[...]
            model.set_linear(path, VQLinear(random_vqarray(spec, *layer.shape, seed + number, dtype), bias))
    return model


def assert_same_bits(left, right):
    """The same modules, formats, shapes, dtypes and bytes."""
    left, right = (LanguageModel.of(model).module for model in (left, right))
    assert nnx.graphdef(left) == nnx.graphdef(right)
    for (path, a), (_, b) in zip(*(jax.tree.leaves_with_path(nnx.state(m)) for m in (left, right)), strict=True):
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
