"""`VQArray` and the XLA matmul against a loop in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from vptq_jax.array import VQArray
from vptq_jax.nn.linear import Linear, VQIndices, VQLinear, project
from vptq_jax.pallas.vq_matmul import vq_matmul
from vptq_jax.spec import VQSpec


def random_array(text: str, rows: int, columns: int, seed: int = 0, dtype=np.float32) -> tuple[VQArray, dict]:
    """A random quantized weight and the plain NumPy arrays it was made of."""
    spec = VQSpec.parse(text)
    layout = spec.layout(rows, columns)
    rng = np.random.default_rng(seed)

    def floats(*shape):
        return rng.normal(size=shape).astype(dtype)

    groups, size, length = layout.num_groups, layout.group_size, layout.vector_len
    parts = {
        "main": rng.integers(0, layout.num_centroids, (groups, layout.num_vectors, size)),
        "residual": None,
        "codebook": floats(groups, layout.num_centroids, length),
        "res_codebook": None,
        "outlier_indices": None,
        "outlier_codebook": None,
        "scale": floats(columns) if spec.normalize else None,
        "offset": floats(columns) if spec.normalize else None,
        "perm": rng.permutation(columns) if spec.permute else None,
    }
    if layout.num_res_centroids:
        parts["residual"] = rng.integers(0, layout.num_res_centroids, parts["main"].shape)
        parts["res_codebook"] = floats(groups, layout.num_res_centroids, length)
    if layout.outlier_size:
        shape = (layout.num_outlier_vectors, layout.outlier_size)
        parts["outlier_indices"] = rng.integers(0, layout.num_outlier_centroids, shape)
        parts["outlier_codebook"] = floats(layout.num_outlier_centroids, layout.outlier_vector_len)
    array = VQArray.from_indices(layout, **jax.tree.map(jnp.asarray, parts))
    return array, parts


def decode_by_loop(layout, parts) -> np.ndarray:
    """The format's definition, one weight at a time, float32."""
    weight = np.zeros((layout.out_features, layout.in_features), np.float32)
    for row in range(layout.out_features):
        for column in range(layout.in_features):
            if column < layout.outlier_size:
                vector, within = divmod(row, layout.outlier_vector_len)
                value = parts["outlier_codebook"][parts["outlier_indices"][vector, column], within]
            else:
                group, inside = divmod(column - layout.outlier_size, layout.group_size)
                vector, within = divmod(row, layout.vector_len)
                value = parts["codebook"][group, parts["main"][group, vector, inside], within]
                if parts["residual"] is not None:
                    value = value + parts["res_codebook"][group, parts["residual"][group, vector, inside], within]
            target = column if parts["perm"] is None else parts["perm"][column]
            if parts["scale"] is not None:
                value = value * parts["scale"][target] + parts["offset"][target]
            weight[row, target] = value
    return weight


spec_texts = st.builds(
    lambda v, k, kr, g, o, n, p: f"v{v}-k{1 << k}{kr}{g}{o}{n}{p}",
    st.integers(1, 13),
    st.integers(1, 9),
    st.sampled_from(["", "-8", "-1024"]),
    st.sampled_from(["", "-g2", "-g3"]),
    st.sampled_from(["-o3v4k16", "-o20v5k512"]),
    st.sampled_from(["", "-nonorm"]),
    st.sampled_from(["", "-noperm"]),
) | st.sampled_from(["v8-k256", "v6-k64-16", "v12-k16-nonorm-noperm", "v64-k4"])


@settings(deadline=None, derandomize=True, max_examples=25)
@given(spec_texts, st.integers(1, 30), st.integers(6, 30), st.integers(0, 99))
def test_dequantize_equals_the_definition(text, rows, columns, seed):
    array, parts = random_array(text, rows, columns, seed)
    array.validate()
    expected = decode_by_loop(array.layout, parts)
    np.testing.assert_allclose(array.dequantize(), expected, rtol=1e-6, atol=1e-6)
    some = jnp.asarray([[0, rows - 1], [rows // 2, 0]])
    np.testing.assert_allclose(array.take_rows(some), expected[np.asarray(some)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", ["v8-k256-256", "v6-k64-16-g4-o2v4k32", "v5-k16-nonorm-noperm"])
def test_matmul_and_gradients_equal_the_dense_product(text):
    array, parts = random_array(text, 40, 132)
    x = jax.random.normal(jax.random.key(1), (2, 3, 132))
    dense = decode_by_loop(array.layout, parts).astype(np.float64)
    np.testing.assert_allclose(vq_matmul(x, array), np.asarray(x, np.float64) @ dense.T, rtol=1e-4, atol=1e-3)

    fields = [f for f in ("codebook", "res_codebook", "scale", "offset") if getattr(array, f) is not None]
    cotangent = jax.random.normal(jax.random.key(2), (2, 3, 40))

    def loss(x, leaves):
        return jnp.sum(vq_matmul(x, dataclasses.replace(array, **leaves)) * cotangent)

    dx, dleaves = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, {f: getattr(array, f) for f in fields})
    np.testing.assert_allclose(dx, np.asarray(cotangent, np.float64) @ dense, rtol=1e-4, atol=1e-3)
    # dL/dW, then the chain rule of the definition, by hand in float64.
    dW = np.einsum("bto,bti->oi", np.asarray(cotangent, np.float64), np.asarray(x, np.float64))
    if "offset" in fields:
        np.testing.assert_allclose(dleaves["offset"], dW.sum(0), rtol=1e-4, atol=1e-3)
        dW = dW * parts["scale"]
    if parts["perm"] is not None:
        dW = dW[:, parts["perm"]]
    layout = array.layout
    expected = np.zeros(parts["codebook"].shape)
    for row in range(layout.out_features):
        for column in range(layout.outlier_size, layout.in_features):
            group, inside = divmod(column - layout.outlier_size, layout.group_size)
            vector, within = divmod(row, layout.vector_len)
            expected[group, parts["main"][group, vector, inside], within] += dW[row, column]
    np.testing.assert_allclose(dleaves["codebook"], expected, rtol=1e-3, atol=1e-2)


def test_matmul_refuses_misfits():
    array, _ = random_array("v8-k16", 16, 24)
    with pytest.raises(ValueError, match="in_features = 24"):
        vq_matmul(jnp.zeros((2, 23)), array)
    with pytest.raises(ValueError, match="int32"):
        vq_matmul(jnp.zeros((2, 24), jnp.int32), array)


def test_bits_count_every_stored_byte():
    array, _ = random_array("v8-k256-256", 1024, 512)
    stored = 1024 * 512 * 2 // 8 + 2 * 256 * 8 * 4 + 2 * 512 * 4 + 512 * 2  # indices, codebooks, scale+offset, perm
    assert array.nbytes == stored
    assert array.bits_per_weight == pytest.approx(8 * stored / (1024 * 512))
    assert array.layout.nominal_bits == 2


def test_validate_names_every_problem():
    array, _ = random_array("v8-k16-o5v4k8", 16, 24)
    broken = dataclasses.replace(
        array,
        codebook=array.codebook[:, :8],
        scale=array.scale.astype(jnp.int32),
        offset=array.offset.at[3].set(jnp.nan),
    )
    with pytest.raises(ValueError, match="layer 7") as error:
        broken.validate("layer 7")
    for expected in (
        "codebook: found shape (1, 8, 8), expected (1, 16, 8)",
        "scale: found dtype int32",
        "offset: holds NaN",
    ):
        assert expected in str(error.value)
    with pytest.raises(ValueError, match="not a permutation"):
        dataclasses.replace(array, perm=array.perm.at[0].set(array.perm[1])).validate()
    with pytest.raises(ValueError, match="found index 9, expected at most 7"):
        dataclasses.replace(array, outlier_indices=array.outlier_indices.at[0, 0].set(9)).validate()


def test_vqlinear_splits_into_trainable_codebooks_and_fixed_indices():
    array, _ = random_array("v8-k16-16", 16, 24)
    layer = VQLinear(array, bias=jnp.arange(16.0))
    _, trainable, fixed = nnx.split(layer, nnx.Param, VQIndices)
    assert set(trainable) == {"codebook", "res_codebook", "scale", "offset", "bias"}
    assert set(fixed) == {"indices", "perm"}
    x = jax.random.normal(jax.random.key(0), (5, 24))
    dense = Linear(array.dequantize(), jnp.arange(16.0))
    np.testing.assert_allclose(layer(x), dense(x), rtol=1e-5, atol=1e-4)
    for fused, single in zip(project(x, layer, dense), (layer(x), dense(x)), strict=True):
        np.testing.assert_array_equal(fused, single)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, layer.weight, array))


def test_bfloat16_layer_keeps_the_dtype():
    array, _ = random_array("v8-k16", 16, 24)
    y = VQLinear(array, bias=jnp.ones(16))(jnp.ones((2, 24), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
