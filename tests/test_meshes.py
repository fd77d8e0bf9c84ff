"""Models and products on meshes of eight devices, explicit and automatic, against one device."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from random_models import CONFIG, random_model, random_vqarray

import vptq_jax as vq
from vptq_jax.nn.placement import place
from vptq_jax.pallas.decode_attention import decode_attention
from vptq_jax.pallas.nearest_centroid import nearest_centroid

KINDS = ("Auto", "Explicit")
HEAD = """
import sys
sys.path.insert(0, TESTS)
import dataclasses, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from random_models import CONFIG, TOKENS, random_model, random_vqarray
import vptq_jax as vq
from vptq_jax.nn.placement import place

mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.KIND,) * 2)

def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))
"""


def on_eight_devices(kind: str, code: str) -> str:
    head = HEAD.replace("KIND", kind).replace("TESTS", repr(str(Path(__file__).parent)))
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        env=os.environ | devices, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_data_parallel_models(kind):
    on_eight_devices(
        kind,
        """
        model = random_model(specs=("v6-k16-4", "v4-k16-o5v4k8", None))
        tokens = jnp.tile(TOKENS[:1], (8, 1)) + jnp.arange(8)[:, None]
        expected = model(tokens)
        copies = place(model, mesh)
        for call in (lambda m, t: m(t), jax.jit(lambda m, t: m(t))):
            logits = call(copies, put(tokens, "data"))
            assert logits.sharding.spec[0] == "data", logits.sharding
            np.testing.assert_allclose(logits, expected, atol=1e-5)
        """,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_divided_vectors(kind):
    on_eight_devices(
        kind,
        """
        x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 24)), jnp.float32)
        for spec in ("v4-k16-8", "v4-k16-g2-nonorm", "v4-k16-o10v4k8", "v8-k16-noperm"):
            weight = random_vqarray(spec, 32, 24, 0)
            specs = weight.partition_specs("model")
            divided = jax.tree.map(lambda a, s: put(a, *s), weight, specs)
            assert divided.indices.addressable_shards[0].data.shape[1] == weight.indices.shape[1] // 2
            for rows in ("data", None):
                y = jax.jit(vq.matmul)(put(x, rows), divided)
                np.testing.assert_allclose(y, vq.matmul(x, weight), rtol=1e-5, atol=1e-5)
                assert y.sharding.spec[-1] == "model", y.sharding
                with jax.set_mesh(mesh):
                    loss = jax.jit(jax.grad(lambda w, x: jnp.sum(vq.matmul(x, w) ** 2), allow_int=True))
                    found = loss(divided, put(x, rows)).codebook
                expected = jax.grad(lambda w: jnp.sum(vq.matmul(x, w) ** 2), allow_int=True)(weight).codebook
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
        """,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_loading_onto_a_mesh(kind, tmp_path):
    vq.save(random_model(specs=("v3-k16-4", "v1-k4")), tmp_path / "m")
    on_eight_devices(
        kind,
        f"""
        path = {str(tmp_path / "m")!r}
        tokens = jnp.asarray(TOKENS)
        expected = vq.load(path)(tokens)
        lm = vq.load(path, mesh=mesh, axis="model")
        parts = lm.module.layers[0].self_attn.q_proj
        assert parts.indices[...].sharding.spec[1] == "model"
        assert lm.module.lm_head.weight[...].sharding.spec[0] == "model"
        assert parts.codebook[...].sharding.is_fully_replicated
        assert lm.module.norm.weight[...].sharding.mesh.shape == mesh.shape
        np.testing.assert_allclose(lm(put(tokens)), expected, atol=1e-4)
        student = vq.load(path, mesh=mesh, axis="model", trainable=True)
        assert student.module.layers[0].self_attn.q_proj.codebook.dtype == jnp.float32
        """,
    )


@pytest.mark.parametrize(("kind", "axis"), [("Auto", None), ("Explicit", "model")])
def test_text_and_perplexity_on_a_mesh(kind, axis):
    on_eight_devices(
        kind,
        f"""
        config = dataclasses.replace(CONFIG, num_layers=1)
        model = random_model(config, specs=("v3-k16-4",))
        lm = place(model, mesh, {axis!r})
        prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
        options = dict(max_new_tokens=9, sampling=vq.Sampling(temperature=0.9, seed=3), stop_tokens=())
        assert vq.generate(lm, prompts, **options) == vq.generate(model, prompts, **options)
        text = np.random.default_rng(0).integers(0, model.config.vocab_size, 128)
        found, expected = (vq.perplexity(m, text, context=32, batch_size=4).value for m in (lm, model))
        assert abs(found / expected - 1) < 1e-5, (found, expected)
        assert lm.layers[0].self_attn.q_proj.codebook[...].sharding.mesh.axis_types == mesh.axis_types
        """,
    )


def test_axes_that_do_not_exist(tiny_hf):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="the mesh has no axis 'y'; expected one of 'x'"):
        vq.load(tiny_hf, mesh=mesh, axis="y")
    with pytest.raises(ValueError, match="axis is 'x', but there is no mesh"):
        vq.load(tiny_hf, axis="x")


def test_vectors_that_do_not_divide():
    format = vq.Format.of("v8-k16-o5v4k8", (96, 24))
    assert not list(format.division_problems(4))
    message = "12 vectors a column do not divide among 8 devices; 1, 2, 3, 4, 6, 12 would, or another vector length"
    assert list(format.division_problems(8)) == [message]
    on_eight_devices(
        "Auto",
        """
        try:
            place(random_model(specs=("v6-k16", None)), jax.make_mesh((8,), ("x",)), "x")
        except ValueError as error:
            text = str(error)
            assert "layers.0.self_attn.q_proj: 4 vectors a column do not divide among 8 devices; 1, 2, 4 would" in text
            assert "the 8 devices of mesh axis 'x'" in text, text
        else:
            raise AssertionError
        """,
    )


def test_packed_words_are_not_divided_along_the_input():
    weight = random_vqarray("v4-k16", 8, 16, 0)
    assert weight.partition_specs("x").indices == PartitionSpec(None, "x")
    assert all(spec == PartitionSpec() for spec in jax.tree.leaves(weight.partition_specs(None).codebook))
    with pytest.raises(NotImplementedError, match="dim is 1; expected 0, the output features: packed words hold"):
        weight.partition_specs("x", dim=1)


def test_one_device_is_a_mesh_too():
    model = random_model()
    mesh = jax.make_mesh((1,), ("x",))
    tokens = jnp.arange(6).reshape(1, 6)
    assert jnp.array_equal(place(model, mesh, "x")(tokens), model(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_ops_with_divided_rows(kind):
    on_eight_devices(
        kind,
        """
        from vptq_jax.pallas.decode_attention import decode_attention
        from vptq_jax.pallas.nearest_centroid import nearest_centroid

        rng = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
        vectors, codebook = draw(64, 4), draw(16, 4)
        index, distance = jax.jit(nearest_centroid)(put(vectors, "data"), put(codebook))
        expected = ((np.float64(vectors)[:, None] - np.float64(codebook)) ** 2).sum(-1)
        assert (index == expected.argmin(1)).all()
        np.testing.assert_allclose(distance, expected.min(1), rtol=1e-5)
        q, keys, values, seen = draw(4, 6, 8), draw(4, 2, 5, 8), draw(4, 2, 5, 8), jnp.arange(5)[None] < 4
        y = jax.jit(decode_attention)(*(put(a, "data") for a in (q, keys, values)), put(seen))
        assert y.sharding.spec[0] == "data"
        scores = np.einsum("bkgd,bksd->bkgs", q.reshape(4, 2, 3, 8), keys)[..., :4] / 8**0.5
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        expected = np.einsum("bkgs,bksd->bkgd", weights, values[:, :, :4]).reshape(4, 6, 8)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        """,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_on_a_mesh_are_lowered_with_their_rows_divided(kind):
    """A mesh of eight CPUs, programs for as many GPUs: what lies between here and a compiler for them."""
    on_eight_devices(
        kind,
        """
        def lowered(function, *arguments):
            traced = jax.jit(function).trace(*arguments)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert "@CustomSPMDPartitioning" in text and "sdy.sharding_rule" in text
            return traced.out_info

        weight = jax.tree.map(put, vq.pack(random_vqarray("v4-k16-8", 64, 32, 0), target="sm_90"))
        x = put(jnp.ones((8, 3, 32), jnp.bfloat16), "data")
        product = lambda x, w: vq.matmul(x, w, implementation="mosaic")
        y = lowered(product, x, weight)
        assert y.shape == (8, 3, 64)
        assert mesh.axis_types[0] == AxisType.Auto or y.sharding.spec[0] == "data", y.sharding
        _, dx = lowered(jax.value_and_grad(lambda x, w: product(x, w).astype(jnp.float32).sum()), x, weight)
        assert dx.shape == x.shape
        try:
            jax.jit(jax.grad(lambda w, x: product(x, w).astype(jnp.float32).sum(), allow_int=True)).trace(weight, x)
        except TypeError as error:
            assert "unpack(weight)" in str(error)
        else:
            raise AssertionError
        """,
    )


@pytest.mark.gpu
@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_run_on_a_mesh(kind):
    """Rows stay where they are, and the results are bit for bit those of one device."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType[kind],), devices=jax.devices()[:2])

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    keys = jax.random.split(jax.random.key(0), 4)
    weight = vq.pack(random_vqarray("v8-k256-256", 512, 256, 0), target="sm_90")
    everywhere = jax.tree.map(put, weight)
    for rows in (4, 64, 2048):
        x = jax.random.normal(keys[0], (rows, 256), jnp.bfloat16)
        one = jax.jit(lambda x, w: vq.matmul(x, w, implementation="mosaic"))
        expected = jnp.concatenate([one(half, weight) for half in jnp.split(x, 2)])  # a plan depends on the rows
        compiled = one.trace(put(x, "data"), everywhere).lower().compile()
        assert "mosaic_gpu" in compiled.as_text()
        y = compiled(put(x, "data"), everywhere)
        assert y.sharding.spec[0] == "data"
        assert [shard.data.shape for shard in y.addressable_shards] == [(rows // 2, 512)] * 2
        assert jnp.array_equal(jax.device_get(y), jax.device_get(expected))
        assert jnp.array_equal(jax.device_get(one(put(x), everywhere)), jax.device_get(one(x, weight)))
    q = jax.random.normal(keys[1], (4, 8, 64), jnp.bfloat16)
    cache = [jax.random.normal(key, (4, 2, 96, 64), jnp.bfloat16) for key in keys[2:]]
    seen = jnp.arange(96)[None] < jnp.array([[5], [96], [31], [64]])
    attend = jax.jit(lambda *arrays: decode_attention(*arrays, implementation="mosaic"))
    y = attend(*(put(array, "data") for array in (q, *cache, seen)))
    assert y.sharding.spec[0] == "data"
    assert jnp.array_equal(jax.device_get(y), jax.device_get(attend(q, *cache, seen)))
    vectors, codebook = jax.random.normal(keys[1], (4096, 8)), jax.random.normal(keys[2], (256, 8))
    nearest = jax.jit(lambda *arrays: nearest_centroid(*arrays, implementation="mosaic")[0])
    index = nearest(put(vectors, "data"), put(codebook))
    assert jnp.array_equal(jax.device_get(index), jax.device_get(nearest(vectors, codebook)))

    wide = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=512, head_dim=64)
    model = random_model(wide, specs=("v8-k256-256",), dtype=jnp.bfloat16)
    twin = vq.pack(place(model, mesh), target="sm_90")
    assert all(layer.order is not None for layer in twin.quantized_layers().values())
    prompts, options = [[1, 2, 3], [4, 5, 6, 7, 8]], {"max_new_tokens": 12, "stop_tokens": ()}
    result = vq.generate(twin, prompts, return_result=True, **options)
    assert result.implementation == "mosaic"
    assert result.tokens == vq.generate(vq.pack(model), prompts, **options)
