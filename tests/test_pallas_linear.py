"""`VQLinear` in kernel order, with the reference in the kernel's place so that the tests run anywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pallas_cases import random_weight, relative_error

from vptq_jax.convert import checkpoint
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.params import RandomSource
from vptq_jax.lm.registry import build
from vptq_jax.nn import linear
from vptq_jax.nn.linear import Linear, VQLinear, project
from vptq_jax.pallas.vq_matmul import api, mosaic, restore

CONFIG = ModelConfig(
    "llama", vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8
)


@pytest.fixture
def launches(monkeypatch):
    """A device that runs kernels; collects how many weights each launch had."""
    counts = []

    def matmul(x, weights, norm=None, out_dtype=None):
        x = x if norm is None else norm(x)
        counts.append(len(weights))
        return tuple(x.astype(jnp.float32) @ restore(weight).dequantize().T for weight in weights)

    monkeypatch.setattr(mosaic, "matmul", matmul)
    monkeypatch.setattr(api.device, "why_no_mosaic", lambda: None)
    return counts


@pytest.fixture
def model():
    model = build(CONFIG, RandomSource(jax.random.key(0), jnp.bfloat16))
    for seed, (path, layer) in enumerate(model.linears().items()):
        model.set_linear(path, VQLinear(random_weight("v4-k16-8", *layer.shape, seed=seed)))
    return model


def _weights(model):
    return {path: jax.tree.leaves(layer.weight) for path, layer in model.linears().items()}


def _assert_same(first, second):
    for path, leaves in first.items():
        for a, b in zip(leaves, second[path], strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


def test_prepared_layers_lose_nothing_and_share_launches(model, launches):
    before, tokens = _weights(model), jnp.arange(6)[None]
    assert linear.prepare(model.linears(), model.dtype) == 7
    assert linear.prepare(model.linears(), model.dtype) == 7
    _assert_same(before, _weights(model))
    model(tokens)
    assert sorted(launches) == [1, 1, 2, 3]
    linear.unprepare(model.linears())
    _assert_same(before, _weights(model))


def test_prepared_layers_are_frozen(model, launches):
    layer = model.layers[0].mlp.up_proj
    assert len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == 4
    layer.prepare()
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))


def test_a_prepared_model_is_saved_in_checkpoint_order(model, launches, tmp_path):
    before = _weights(model)
    linear.prepare(model.linears(), model.dtype)
    checkpoint.save(model, tmp_path / "saved")
    _assert_same(before, _weights(checkpoint.load(tmp_path / "saved")))


def test_other_activations_stay_in_checkpoint_order(model, launches):
    assert linear.prepare(model.linears(), jnp.float32) == 0
    assert all(layer.order is None for layer in model.linears().values())


def test_mixed_layers_run_one_by_one(launches):
    layers = [VQLinear(random_weight("v4-k16-8", 32, 32)), Linear(jnp.ones((16, 32), jnp.bfloat16))]
    layers[0].prepare()
    first, second = project(jnp.ones((2, 32), jnp.bfloat16), *layers)
    assert first.shape == (2, 32)
    assert second.shape == (2, 16)


def test_kernel_weight_of_an_unprepared_layer():
    with pytest.raises(ValueError, match=r"call prepare\(\)"):
        _ = VQLinear(random_weight("v4-k16-8", 32, 32)).kernel_weight


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_a_step_through_the_kernels_agrees_with_float32(batch):
    """Normalization, products and attention of the decode loop together, in one program."""
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=520, num_layers=2, head_dim=64)
    model = build(config, RandomSource(jax.random.key(0), jnp.bfloat16))
    for seed, (path, layer) in enumerate(model.linears().items()):
        model.set_linear(path, VQLinear(random_weight("v8-k256-256", *layer.shape, seed=seed)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (batch, 9)))

    def logits(model):
        start = jnp.zeros(batch, jnp.int32)
        _, cache = jax.jit(lambda m: m.prefill(tokens[:, :8], start, capacity=16))(model)
        return jax.jit(lambda m, cache: m.step(tokens[:, 8], cache)[0])(model, cache)

    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, model)
    expected = np.asarray(logits(exact), np.float64)
    assert linear.prepare(model.linears(), model.dtype) == 14
    assert relative_error(logits(model), expected) < 2e-2
