"""`VQArray` and the XLA matmul against a loop in NumPy."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from vptq_jax.array import VQArray
from vptq_jax.format import Format
from vptq_jax.nn.linear import Linear, VQIndices, VQLinear, project
from vptq_jax.pallas.vq_matmul import vq_matmul
from vptq_jax.spec import VQSpec


def random_array(text: str, rows: int, columns: int, seed: int = 0, dtype=np.float32) -> tuple[VQArray, dict]:
    """A random quantized weight and the plain NumPy arrays it was made of."""
    spec = VQSpec.parse(text)
    format = Format.of(spec, (rows, columns))
    rng = np.random.default_rng(seed)

    def floats(*shape):
        return rng.normal(size=shape).astype(dtype)

    groups, size, length = format.num_groups, format.group_size, format.vector_len
    parts = {
        "main": rng.integers(0, format.num_centroids, (groups, format.num_vectors, size)),
        "residual": None,
        "codebook": floats(groups, format.num_centroids, length),
        "res_codebook": None,
        "outlier_indices": None,
        "outlier_codebook": None,
        "scale": floats(columns) if spec.normalize else None,
        "offset": floats(columns) if spec.normalize else None,
        "perm": rng.permutation(columns) if spec.permute else None,
    }
    if format.num_res_centroids:
        parts["residual"] = rng.integers(0, format.num_res_centroids, parts["main"].shape)
        parts["res_codebook"] = floats(groups, format.num_res_centroids, length)
    if format.outlier_size:
        shape = (format.num_outlier_vectors, format.outlier_size)
        parts["outlier_indices"] = rng.integers(0, format.num_outlier_centroids, shape)
        parts["outlier_codebook"] = floats(format.num_outlier_centroids, format.outlier_vector_len)
    array = VQArray.from_indices(format, **jax.tree.map(jnp.asarray, parts))
    return array, parts


def decode_by_loop(format, parts) -> np.ndarray:
    """The format's definition, one weight at a time, float32."""
    weight = np.zeros((format.out_features, format.in_features), np.float32)
    for row in range(format.out_features):
        for column in range(format.in_features):
            if column < format.outlier_size:
                vector, within = divmod(row, format.outlier_vector_len)
                value = parts["outlier_codebook"][parts["outlier_indices"][vector, column], within]
            else:
                group, inside = divmod(column - format.outlier_size, format.group_size)
                vector, within = divmod(row, format.vector_len)
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
    expected = decode_by_loop(array.format, parts)
    np.testing.assert_allclose(array.dequantize(), expected, rtol=1e-6, atol=1e-6)
    some = jnp.asarray([[0, rows - 1], [rows // 2, 0]])
    np.testing.assert_allclose(array.take_rows(some), expected[np.asarray(some)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", ["v8-k256-256", "v6-k64-16-g4-o2v4k32", "v5-k16-nonorm-noperm"])
def test_matmul_and_gradients_equal_the_dense_product(text):
    array, parts = random_array(text, 40, 132)
    x = jax.random.normal(jax.random.key(1), (2, 3, 132))
    dense = decode_by_loop(array.format, parts).astype(np.float64)
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
    format = array.format
    expected = np.zeros(parts["codebook"].shape)
    for row in range(format.out_features):
        for column in range(format.outlier_size, format.in_features):
            group, inside = divmod(column - format.outlier_size, format.group_size)
            vector, within = divmod(row, format.vector_len)
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
    assert array.stored_bits == 8 * stored
    assert array.nbytes == stored + 2 * 512  # a permutation has four bytes a column in memory
    assert array.bits_per_weight == pytest.approx(8 * stored / (1024 * 512))
    assert array.format.nominal_bits == 2


SPECS = st.sampled_from(["v8-k16", "v6-k16-8-nonorm", "v4-k8-4-g2-noperm", "v3-k8-o10v5k4"])


@given(SPECS, st.integers(1, 40), st.integers(4, 32))
def test_a_format_says_what_arrays_are_there(text, rows, columns):
    format = Format.of(text, (rows, 2 * columns))
    abstract = VQArray.abstract(format, jnp.bfloat16)
    array = VQArray.random(jax.random.key(0), format, jnp.bfloat16).validate()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), array) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    narrow = array.astype(jnp.float16)
    assert narrow.dtype == jnp.float16
    assert narrow.stored_bits == format.stored_bits
    assert Format.from_json(json.loads(json.dumps(format.to_json()))) == format
    made, _ = random_array(text, rows, 2 * columns)
    assert jax.tree.structure(made) == jax.tree.structure(array)


def test_random_weights_have_the_size_of_real_ones():
    weight = VQArray.random(jax.random.key(0), Format.of("v8-k256", (256, 256)), jnp.float32).dequantize()
    assert abs(weight.mean()) < 1e-3
    assert 0.015 < weight.std() < 0.025


def test_a_matrix_has_what_an_array_has():
    array, _ = random_array("v4-k16-8", 12, 20)
    assert (array.shape, array.ndim, array.size) == ((12, 20), 2, 240)
    np.testing.assert_array_equal(array.T, array.dequantize().T)
    wide = array.astype(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype(t) for t in ("bfloat16", "uint32", "int32")}
    assert array.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(array))


def test_a_stack_says_its_shape_and_is_scanned():
    arrays = [random_array("v4-k16-8", 12, 20, seed)[0] for seed in range(3)]
    stack = VQArray.stack(arrays)
    assert (stack.shape, stack.ndim, stack.size) == ((3, 12, 20), 3, 720)
    assert stack.stored_bits == 3 * arrays[0].stored_bits
    assert stack.bits_per_weight == arrays[0].bits_per_weight
    assert jax.eval_shape(lambda a: a, stack).shape == (3, 12, 20)
    x = jnp.ones((2, 20))
    expected = [vq_matmul(x, array) for array in arrays]

    def one(total, weight):
        assert weight.shape == (12, 20)
        return total, vq_matmul(x, weight)

    for found in (jax.lax.scan(one, 0, stack)[1], jax.vmap(lambda weight: one(0, weight)[1])(stack)):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_stacks_of_unlike_formats_are_refused():
    arrays = [random_array(text, 12, 20)[0] for text in ("v4-k16-8", "v4-k16")]
    with pytest.raises(ValueError, match=r"one format; found v4-k16-8 \[12, 20\] and v4-k16 \[12, 20\]"):
        VQArray.stack(arrays)
    with pytest.raises(ValueError, match="found no weights"):
        VQArray.stack([])


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
