"""Models and products on meshes of eight devices, explicit and automatic, against one device."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from random_models import random_model, random_vqarray

import vptq_jax as vq
from vptq_jax.nn.placement import place

KINDS = ("Auto", "Explicit")
HEAD = """
import sys
sys.path.insert(0, TESTS)
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from random_models import TOKENS, random_model, random_vqarray
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
