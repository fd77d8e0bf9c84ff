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


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("form", "rows"),
    [(xla._by_blocks, 20), (xla._by_columns, 1), (xla._by_columns, 4), (xla._at_once, 1), (xla._at_once, 20)],
    ids=["blocks-20", "columns-1", "columns-4", "at once-1", "at once-20"],
)
def test_every_form_equals_the_oracle(spec, rows, form, monkeypatch):
    """A CPU takes one of the first two; the last one, for GPUs, runs there too."""
    weight = random_vqarray(spec, 50, 80, seed=0)
    x = jax.random.normal(jax.random.key(1), (rows, 80))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, default: form(*operands))
    jax.clear_caches()  # jax.checkpoint would run the form of the last test again
    expected = exact(x, weight)
    found = vq_matmul(x, weight, implementation="xla")
    assert found.dtype == x.dtype
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, xla._FEW_ON_CPU + 1])
@pytest.mark.parametrize("spec", ["v2-k256", "v8-k256-256", "v4-k1024", "v5-k8", "v4-k16-g2", "v4-k16-o10v2k4"])
def test_columns_that_no_step_divides(spec, rows):
    for columns in (2, 106):
        weight = random_vqarray(spec, 37, columns, seed=0)
        x = jax.random.normal(jax.random.key(1), (rows, columns))
        expected = exact(x, weight)
        found = vq_matmul(x, weight, implementation="xla")
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), err_msg=str(columns))


@pytest.mark.parametrize("out", [576, 603])
def test_a_small_product_in_parts(out):
    """Parts of 144 rows of vectors, and of 101, of which one overlaps."""
    weight = random_vqarray("v2-k256", out, 70, seed=0)
    assert xla._rows_at_a_time(weight.format, 32, 4) in (144, 101)
    x = jax.random.normal(jax.random.key(1), (2, 70))
    expected = exact(x, weight)
    found = vq_matmul(x, weight, implementation="xla")
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_a_step_ends_with_a_word_and_uses_no_constant_too_often():
    for bits in range(1, 33):
        for floats in (4, 8, 16, 32, 64, 128)[bits > 16 :]:  # more than 16 bits are two indices
            step = xla._step(bits, floats)
            assert step * bits % 32 == 0
            assert step * floats >= 112
            assert step * np.gcd(bits, 32) / 32 <= 15


@pytest.mark.parametrize("first", range(0, 32, 5))
def test_any_field(first):
    words = np.random.default_rng(0).integers(0, 1 << 32, (5, 3), np.uint32)
    numbers = [sum(int(word) << 32 * i for i, word in enumerate(row)) for row in words]
    for width in range(1, 17):
        found = xla._field(jnp.asarray(words), 32 + first, width)
        np.testing.assert_array_equal(found, [number >> (32 + first) & ((1 << width) - 1) for number in numbers])


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


def product_of_floats(spec, rows, implementation):
    """The product as a function of x and the floats of a weight, and values for these."""
    weight = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        random_vqarray(spec, 24, 40, seed=0),
    )
    leaves, tree = jax.tree.flatten(weight)

    def product(x, floats):
        values = iter(floats)
        filled = [next(values) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf for leaf in leaves]
        return vq_matmul(x, jax.tree.unflatten(tree, filled), implementation=implementation)

    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return product, (jax.random.normal(jax.random.key(1), (rows, 40)), floats)


def assert_trees_close(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))


DIFFERENTIATED = ["v8-k16-16", "v4-k16-16-g2-o10v2k4", "v5-k8-nonorm"]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("spec", DIFFERENTIATED)
def test_gradients_equal_those_of_the_oracle(spec, rows):
    def gradients(implementation):
        product, values = product_of_floats(spec, rows, implementation)
        return jax.jit(jax.grad(lambda *values: jnp.sum(jnp.sin(product(*values))), (0, 1)))(*values)

    assert_trees_close(gradients("xla"), gradients("reference"))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("spec", DIFFERENTIATED)
def test_forward_derivatives_equal_those_of_the_oracle(spec, rows):
    def derivatives(implementation):
        product, values = product_of_floats(spec, rows, implementation)
        return jax.jit(lambda *values: jax.jvp(product, values, jax.tree.map(jnp.cos, values)))(*values)

    assert_trees_close(derivatives("xla"), derivatives("reference"))


def test_derivatives_under_vmap():
    def hessians(implementation):
        product, (x, floats) = product_of_floats("v4-k16-16-g2-o10v2k4", 3, implementation)
        return jax.jit(jax.vmap(jax.hessian(lambda row: jnp.sum(jnp.sin(product(row, floats))))))(x)

    assert_trees_close(hessians("xla"), hessians("reference"))


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
