"""The portable product against the oracle, in float64 where that can be had."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_vqarray

from vptq_jax.pallas import vq_matmul
from vptq_jax.pallas.vq_matmul import xla

SPECS = [
    "v8-k256-256", "v6-k64", "v2-k256", "v8-k4096-256", "v12-k64-64", "v4-k16-g4", "v4-k16-16-g2-o10v2k4",
    "v5-k8-nonorm", "v4-k16-noperm", "v64-k4", "v1-k16",
]  # fmt: skip


def exact(x, weight):
    """The product in float64."""
    return np.asarray(x, np.float64) @ np.asarray(weight.dequantize(), np.float64).T


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("form", [xla._by_blocks, xla._at_once], ids=["by blocks", "at once"])
def test_both_forms_equal_the_oracle(spec, rows, form, monkeypatch):
    """A CPU takes one of them; the other, for GPUs, runs there too."""
    weight = random_vqarray(spec, 50, 80, seed=0)
    x = jax.random.normal(jax.random.key(1), (rows, 80))

    def chosen(*operands, cpu, default):
        return cpu(*operands) if form is xla._by_blocks else default(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    expected = exact(x, weight)
    found = vq_matmul(x, weight, implementation="xla")
    assert found.dtype == x.dtype
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@settings(max_examples=8)
@given(
    v=st.integers(1, 13), bits=st.integers(1, 7), residual=st.integers(0, 7), out=st.integers(1, 60),
    columns=st.integers(1, 70), rows=st.integers(1, 6),
)  # fmt: skip
def test_any_shape(v, bits, residual, out, columns, rows):
    weight = random_vqarray(f"v{v}-k{2**bits}" + (f"-{2**residual}" if residual else ""), out, columns, seed=0)
    x = jax.random.normal(jax.random.key(rows), (rows, columns))
    expected = exact(x, weight)
    np.testing.assert_allclose(
        vq_matmul(x, weight, implementation="xla"), expected, atol=3e-5 * max(np.abs(expected).max(), 1e-3)
    )


@pytest.mark.parametrize("spec", ["v8-k16-16", "v4-k16-16-g2-o10v2k4", "v5-k8-nonorm"])
def test_gradients_equal_those_of_the_oracle(spec):
    weight = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        random_vqarray(spec, 24, 40, seed=0),
    )
    leaves, tree = jax.tree.flatten(weight)
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    x = jax.random.normal(jax.random.key(1), (5, 40))

    def loss(implementation):
        def of(x, floats):
            values = iter(floats)
            filled = [next(values) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf for leaf in leaves]
            y = vq_matmul(x, jax.tree.unflatten(tree, filled), implementation=implementation)
            return jnp.sum(jnp.sin(y))

        return jax.jit(jax.grad(of, (0, 1)))(x, floats)

    for found, expected in zip(jax.tree.leaves(loss("xla")), jax.tree.leaves(loss("reference")), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))


def test_stacked_weights_under_vmap_and_a_loop():
    weights = [random_vqarray("v4-k16-16", 24, 40, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    x = jax.random.normal(jax.random.key(1), (3, 2, 40))
    expected = np.stack([exact(rows, weight) for rows, weight in zip(x, weights, strict=True)])
    found = jax.jit(jax.vmap(lambda x, w: vq_matmul(x, w, implementation="xla")))(x, stacked)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    _, found = jax.lax.scan(lambda _, item: (None, vq_matmul(*item, implementation="xla")), None, (x, stacked))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_result_is_rounded_once(implementation):
    weight = random_vqarray("v4-k16-16", 24, 40, seed=0)
    x = jax.random.normal(jax.random.key(1), (5, 40), jnp.bfloat16)
    wide = vq_matmul(x, weight, implementation=implementation, out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    assert float(jnp.mean(wide == wide.astype(jnp.bfloat16))) < 0.1, "on the grid of bfloat16"
    narrow = vq_matmul(x, weight, implementation=implementation)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_no_dense_weight_exists_on_a_cpu():
    weight = random_vqarray("v8-k256", 4096, 1024, seed=0)
    x = jnp.ones((1, 1024))
    memory = jax.jit(lambda x, w: vq_matmul(x, w, implementation="xla")).lower(x, weight).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 1024 * 4 / 2
