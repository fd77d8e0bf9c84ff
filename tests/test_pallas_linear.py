"""Packed layers of a decoder, with the reference in the kernel's place so that the tests run anywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pallas_cases import random_weight, relative_error

import vptq_jax as vq
from vptq_jax.convert import checkpoint
from vptq_jax.convert.export import plan_hf, plan_vptq
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.generation import matmul_implementation
from vptq_jax.lm.params import RandomSource
from vptq_jax.lm.registry import build
from vptq_jax.nn.forms import cast
from vptq_jax.nn.linear import Linear, VQLinear, VQParam, project

CONFIG = ModelConfig(
    "llama", vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8
)


@pytest.fixture
def model():
    model = build(CONFIG, RandomSource(jax.random.key(0), jnp.bfloat16))
    for seed, (path, layer) in enumerate(model.linears().items()):
        model.set_linear(path, VQLinear(random_weight("v4-k16-8", *layer.shape, seed=seed)))
    return model


def _weights(model):
    return {path: jax.tree.leaves(layer.array) for path, layer in model.linears().items()}


def _assert_same(first, second):
    for path, leaves in first.items():
        for a, b in zip(leaves, second[path], strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


def test_packed_layers_lose_nothing_and_share_launches(model, launches):
    before, tokens = _weights(model), jnp.arange(6)[None]
    packed = vq.pack(model)
    assert [layer.order is not None for layer in packed.linears().values()] == [True] * 7
    _assert_same(before, _weights(model))
    packed(tokens)
    assert sorted(launches) == [1, 1, 2, 3]
    _assert_same(before, _weights(vq.unpack(packed)))
    _assert_same(before, _weights(vq.unpack(vq.pack(packed))))


def test_packed_layers_have_nothing_to_train(model):
    layer = model.layers[0].mlp.up_proj
    assert len(jax.tree.leaves(nnx.state(layer, VQParam))) == 4
    packed = vq.pack(model, target="sm_90").layers[0].mlp.up_proj
    assert not jax.tree.leaves(nnx.state(packed, nnx.Param))
    assert len(jax.tree.leaves(nnx.state(layer, VQParam))) == 4


def test_a_packed_model_is_saved_and_exported_as_it_was(model, launches, tmp_path):
    before = _weights(model)
    packed = vq.pack(model)
    checkpoint.save(packed, tmp_path / "saved")
    _assert_same(before, _weights(checkpoint.load(tmp_path / "saved").module))
    for plan in (plan_vptq, plan_hf):
        tensors, expected = plan(packed).tensors, plan(model).tensors
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor.read(), expected[name].read(), err_msg=name)
    assert all(layer.order is not None for layer in packed.linears().values())


def test_float32_activations_go_through_kernels_of_bfloat16(model, launches):
    wide = cast(model, jnp.float32)
    packed = vq.pack(wide)
    assert packed.layers[0].mlp.up_proj.weight.dtype == jnp.bfloat16
    logits = packed(jnp.arange(6)[None])
    assert launches
    np.testing.assert_allclose(logits, wide(jnp.arange(6)[None]), atol=0.05)


def test_mixed_layers_run_one_by_one(launches):
    packed = vq.pack(random_weight("v4-k16-8", 32, 32))
    layers = [VQLinear(packed), Linear(jnp.ones((16, 32), jnp.bfloat16))]
    first, second = project(jnp.ones((2, 32), jnp.bfloat16), *layers)
    assert first.shape == (2, 32)
    assert second.shape == (2, 16)


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
    packed = vq.pack(model)
    assert sum(layer.order is not None for layer in packed.linears().values()) == 14
    assert matmul_implementation(packed) == "mosaic"
    assert relative_error(logits(packed), expected) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 70])
def test_the_gradient_through_the_kernel_is_that_of_the_oracle(rows):
    weight = random_weight("v8-k256-256", 264, 200)
    packed = vq.pack(weight)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, 200)), jnp.bfloat16)

    def loss(x, weight, implementation):
        return jnp.sum(jnp.sin(vq.matmul(x, weight, implementation=implementation, out_dtype=jnp.float32)))

    found = jax.jit(jax.grad(lambda x: loss(x, packed, "mosaic")))(x)
    expected = jax.grad(lambda x: loss(x, weight, "reference"))(x.astype(jnp.float32))
    assert relative_error(found, np.asarray(expected, np.float64)) < 2e-2


@pytest.mark.gpu
def test_sampling_through_kernels_leaves_a_model_to_train(tmp_path):
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=512, head_dim=64)
    model = build(config, RandomSource(jax.random.key(0), jnp.float32))
    for seed, (path, layer) in enumerate(model.linears().items()):
        model.set_linear(path, VQLinear(random_weight("v8-k256", *layer.shape, seed=seed)))
    student = vq.trainable(model)
    before = jax.tree.leaves(nnx.state(student, VQParam))
    result = vq.generate(student, [1, 2, 3], max_new_tokens=4, return_result=True)
    assert "mosaic" in result.implementation
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(student, VQParam)), strict=True))
    tokens = jnp.arange(24).reshape(2, 12)
    gradient = nnx.jit(nnx.grad(lambda m: jnp.mean(m(tokens) ** 2), argnums=nnx.DiffState(0, VQParam)))(student)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    vq.save(student, tmp_path / "m")
    assert "mosaic" in vq.generate(vq.load(tmp_path / "m"), [1, 2], max_new_tokens=2, return_result=True).implementation
