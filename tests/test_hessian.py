"""Second moments: accumulation, files, collection from a model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vptq_jax.convert.hessian_files import load_hessians
from vptq_jax.lm.activations import Moment, hessian_key
from vptq_jax.lm.fingerprint import array_digest
from vptq_jax.nn import hessians as hessian
from vptq_jax.nn.hessians import Hessians


def example(fingerprint="model a", tokens=100):
    x = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    second_moment = x.T @ x / 100
    modules = {
        "model.layers.0.self_attn.q_proj": {
            "model.layers.0.self_attn.q_proj": "01",
            "model.layers.0.self_attn.k_proj": "02",
        },
        "model.layers.0.self_attn.o_proj": {"model.layers.0.self_attn.o_proj": "03"},
    }
    arrays = {key: second_moment * (i + 1) for i, key in enumerate(modules)}
    return Hessians(arrays, modules, tokens, fingerprint)


def test_a_million_tokens_lose_nothing():
    x = (np.random.default_rng(1).normal(size=(8, 3)) + 3).astype(np.float32)
    repeats = 125_000

    @jax.jit
    def accumulate(x):
        start = Moment.zeros(3), jnp.zeros((3, 3))
        return jax.lax.fori_loop(0, repeats, lambda _, both: (both[0].add(x), both[1] + x.T @ x), start)

    moment, plain = accumulate(x)
    exact = x.T.astype(np.float64) @ x / 8
    assert np.abs(np.asarray(plain) / repeats / 8 / exact - 1).max() > 1e-4, "too easy: a plain sum is as good"
    np.testing.assert_allclose(moment.mean(8 * repeats), exact, rtol=2e-7)


def test_moment_of_bfloat16_rows_is_exact_in_the_products():
    x = jax.random.normal(jax.random.key(0), (2, 32, 5), jnp.bfloat16)
    rows = np.asarray(x, np.float64).reshape(-1, 5)
    found = Moment.zeros(5).add(x).mean(64)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rows.T @ rows / 64, rtol=1e-6, atol=1e-7)


def test_layers_that_share_an_input_share_a_key():
    assert hessian_key("model.layers.3.self_attn.v_proj") == "model.layers.3.self_attn.q_proj"
    assert hessian_key("model.layers.3.mlp.up_proj") == "model.layers.3.mlp.gate_proj"
    assert hessian_key("model.layers.3.mlp.down_proj") == "model.layers.3.mlp.down_proj"
    assert hessian_key("lm_head") == "lm_head"


def test_saved_hessians_come_back(tmp_path):
    hessians = example()
    hessians.save(tmp_path / "h")
    again = load_hessians(tmp_path / "h")
    assert (again.tokens, again.fingerprint) == (100, "model a")
    assert set(again) == set(hessians)
    for path in hessians:
        np.testing.assert_array_equal(again.for_module(path), hessians.for_module(path))
        assert again.weight_digest(path) == hessians.weight_digest(path)
    assert "model.layers.0.self_attn.k_proj" in again
    with pytest.raises(ValueError, match=r"no Hessian for lm_head; there are 3"):
        again.for_module("lm_head")


def test_files_say_what_they_hold(tmp_path):
    example().save(tmp_path / "h")
    from safetensors import safe_open

    with safe_open(tmp_path / "h" / "model.layers.0.self_attn.o_proj.safetensors", framework="numpy") as file:
        header = json.loads(file.metadata()["vptq_jax"])
    assert header["shape"] == [6, 6]
    assert header["tokens"] == 100
    assert header["fingerprint"] == "model a"


def test_save_refuses_a_directory_in_use_and_leaves_no_partial_one(tmp_path, monkeypatch):
    example().save(tmp_path / "h")
    with pytest.raises(FileExistsError, match="already holds something"):
        example().save(tmp_path / "h")
    example(tokens=7).save(tmp_path / "h", overwrite=True)
    assert load_hessians(tmp_path / "h").tokens == 7

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hessian, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        example().save(tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["h"]


def test_damaged_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Hessians in"):
        load_hessians(tmp_path)
    example().save(tmp_path / "h")
    file = tmp_path / "h" / "model.layers.0.self_attn.o_proj.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"o_proj\.safetensors is not a readable safetensors file"):
        load_hessians(tmp_path / "h")
    save_file({"hessian": np.eye(3, dtype=np.float32)}, file)
    with pytest.raises(ValueError, match="has format None"):
        load_hessians(tmp_path / "h")
    file.unlink()
    with pytest.raises(ValueError, match="1 of 2 Hessian files"):
        load_hessians(tmp_path / "h")


def test_mixed_collections_are_refused(tmp_path):
    example().save(tmp_path / "a")
    example(fingerprint="model b").save(tmp_path / "b")
    name = "model.layers.0.self_attn.o_proj.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    assert load_file(tmp_path / "a" / name)["hessian"].shape == (6, 6)
    with pytest.raises(ValueError, match="mixes two collections"):
        load_hessians(tmp_path / "a")


def test_array_digest_sees_values_and_order_not_dtype():
    x = jax.random.normal(jax.random.key(0), (7, 9), jnp.bfloat16)
    assert array_digest(x) == array_digest(x.astype(jnp.float32)) == array_digest(np.asarray(x, np.float32))
    assert array_digest(x) != array_digest(x[::-1])
    assert array_digest(x) != array_digest(x.at[3, 3].add(0.125))
