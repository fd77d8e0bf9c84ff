"""Orbax checkpoints: bit-equal, complete or absent, and honest about damage."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import CONFIG, TOKENS, assert_same_bits, random_model, random_vqarray

from vptq_jax.convert import checkpoint
from vptq_jax.convert.hf import load_hf
from vptq_jax.lm.config import ModelConfig
from vptq_jax.nn.linear import VQLinear

SPECS = st.sampled_from([None, "v6-k16-4", "v7-k32", "v4-k8-16-g4-noperm", "v8-k16-nonorm", "v3-k4-g5-o10v5k8"])


@settings(max_examples=10, derandomize=True, deadline=None)
@given(st.lists(SPECS, min_size=1, max_size=4), st.sampled_from(["float32", "bfloat16", "float16"]), st.booleans())
def test_models_come_back_bit_for_bit(tmp_path_factory, specs, dtype, tied):
    config = CONFIG if not tied else ModelConfig(**{**vars(CONFIG), "tie_word_embeddings": True, "dtype": dtype})
    model = random_model(config, specs, jnp.dtype(dtype))
    path = tmp_path_factory.mktemp("save") / "model"
    checkpoint.save(model, path, metadata={"note": [1, 2]})
    loaded = checkpoint.load(path)
    assert_same_bits(model, loaded)
    assert loaded.config == model.config
    assert checkpoint.read_metadata(path) == {"note": [1, 2]}


def test_quantized_embeddings_and_heads_come_back(tmp_path):
    model = random_model()
    model.set_linear("lm_head", VQLinear(random_vqarray("v8-k16-4", 40, 24, 1)))
    model.set_linear("model.embed_tokens", VQLinear(random_vqarray("v6-k8", 40, 24, 2)))
    checkpoint.save(model, tmp_path / "m")
    loaded = checkpoint.load(tmp_path / "m")
    assert_same_bits(model, loaded)
    assert all(isinstance(layer, VQLinear) for layer in loaded.module.all_linears().values())
    np.testing.assert_array_equal(np.asarray(model(TOKENS)), np.asarray(loaded(TOKENS)))


def test_tokenizer_and_generation_config_come_along(tiny_hf, tmp_path):
    model = dataclasses.replace(load_hf(tiny_hf), generation_config={"temperature": 0.5})
    checkpoint.save(model, tmp_path / "m")
    loaded = checkpoint.load(tmp_path / "m")
    text = "the quick brown fox"
    assert loaded.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": "hi"}]
    assert loaded.tokenizer.apply_chat_template(chat, tokenize=False) == "user: hi\n"
    assert loaded.generation_config == {"temperature": 0.5}


def test_arrays_go_where_they_are_sent(tmp_path):
    model = random_model()
    checkpoint.save(model, tmp_path / "m")
    code = f"""
        import jax, numpy as np
        from flax import nnx
        from vptq_jax.convert import checkpoint
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        place = lambda name, array: rows if name == "embed_tokens.weight" else whole
        model = checkpoint.load({str(tmp_path / "m")!r}, sharding=place).module
        assert model.embed_tokens.weight[...].sharding == rows
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(nnx.state(model)))
        print(float(abs(np.asarray(model(np.arange(14).reshape(2, 7)))).sum()))
    """
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, timeout=120, check=True
    )
    expected = float(abs(np.asarray(model(TOKENS))).sum())
    assert abs(float(result.stdout.split()[-1]) / expected - 1) < 1e-5


def test_only_an_earlier_checkpoint_is_replaced(tmp_path):
    model = random_model()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="no vptq_jax checkpoint; choose another directory"):
            checkpoint.save(model, other, overwrite=overwrite)
    assert (other / "thesis.txt").read_text() == "years of work"
    empty = tmp_path / "empty"
    empty.mkdir()
    checkpoint.save(model, empty)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        checkpoint.save(model, empty)
    checkpoint.save(random_model(seed=1), empty, overwrite=True)
    assert_same_bits(checkpoint.load(empty), random_model(seed=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "other"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        checkpoint.save(random_model(), tmp_path / "file" / "m")
    with pytest.raises(TypeError, match="JSON"):
        checkpoint.save(random_model(), tmp_path / "m", metadata={"x": object()})

    def interrupted(directory):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "checksums", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(random_model(), tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(random_model(), tmp_path / "m", metadata={})
    return tmp_path / "m"


def big_file(path):
    return max((p for p in path.rglob("*") if p.is_file() and p.name != checkpoint.MANIFEST), key=os.path.getsize)


def test_damage_is_found(saved):
    file = big_file(saved)
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="truncated"):
        checkpoint.load(saved)
    changed = bytearray(raw)
    changed[len(raw) // 2] ^= 1
    file.write_bytes(bytes(changed))
    with pytest.raises(ValueError, match="CRC-32 differs"):
        checkpoint.load(saved)
    file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        checkpoint.load(saved)


def edit_manifest(path, change, *, forge=True):
    """Changes a manifest; with `forge`, its own checksum too."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    del manifest["crc"]
    change(manifest)
    if forge:
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["crc"] = zlib.crc32(text.encode())
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=99), "format version 99, written by vptq_jax .*Upgrade"),
        (lambda m: m.update(format="other"), "does not describe"),
        (lambda m: m.pop("arrays"), "arrays is missing"),
        (
            lambda m: m["arrays"].pop("norm.weight"),
            r"norm.weight' has shape None; .* ask for \[24\]",
        ),
        (lambda m: m["config"].update(hidden_size=1 << 30), "disagrees with itself"),
        (lambda m: m["config"].update(hidden_size=1 << 40), "hidden_size is 1099511627776"),
        (lambda m: m["config"].update(num_layers=60000), "num_layers is 60000, but it has .* arrays"),
        (lambda m: m["config"]["rope"].update(theta="x"), "rope theta is 'x'; expected a finite number"),
        (lambda m: m["arrays"].update({"norm.weight": ["floaty", [24]]}), "dtype 'floaty'; expected float32"),
        (
            lambda m: m["arrays"].update({"norm.weight": ["float16", [24]]}),
            "in float32, but its record says float16",
        ),
        (lambda m: m["arrays"].update({"norm.weight": []}), r"arrays has \[\] for 'norm.weight'"),
        (lambda m: m["files"].update({"arrays/x": 5}), "files has 5 for 'arrays/x'"),
        (lambda m: m["files"].update({"arrays/x": None}), "files has None for 'arrays/x'"),
        (lambda m: m.update(generation_config=7), "generation_config is 7; expected a JSON object"),
        (lambda m: m.update(format_version="1"), "does not describe"),
        (lambda m: m["files"].update({"\x1b[31mred": [1, 1]}), r"'\\x1b\[31mred' is missing"),
        (lambda m: m["config"].update(surprise=1), "is damaged"),
        (lambda m: m["layers"]["model.layers.0.mlp.up_proj"]["layout"].update(num_centroids=1 << 40), "1099511627776"),
        (lambda m: m["layers"]["model.layers.0.mlp.up_proj"]["layout"].update(vector_len=5), "disagrees with itself"),
        (lambda m: m["layers"].pop("model.layers.0.mlp.up_proj"), "disagrees with itself"),
        (lambda m: m["files"].update({"../../etc/passwd": [1, 1]}), "lies outside"),
    ],
)
def test_manifests_that_lie_are_refused(saved, change, message):
    edit_manifest(saved, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(saved)


def test_there_is_nothing_to_load(tmp_path):
    for read in (checkpoint.load, checkpoint.read_metadata):
        with pytest.raises(FileNotFoundError, match="no vptq_jax checkpoint"):
            read(tmp_path / "nowhere")


def test_restoring_makes_no_dense_copy(tmp_path):
    config = ModelConfig("llama", 256, 1024, 4096, 4, 8, 8, 128)
    model = random_model(config, ("v8-k256",))
    dense = sum(4 * layer.shape[0] * layer.shape[1] for layer in model.linears().values())
    checkpoint.save(model, tmp_path / "m")
    code = f"""
        from vptq_jax.convert import checkpoint
        import orbax.checkpoint, transformers, jax
        jax.devices()

        def status(key):
            return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

        before = status("VmRSS")
        model = checkpoint.load({str(tmp_path / "m")!r})
        print(status("VmHWM") - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(result.stdout.split()[-1]) < dense / 2


def test_a_full_disk_ends_a_save_at_once(tmp_path):
    """Not after the ten minutes for which threads of Orbax would wait for one another, and without leftovers."""
    code = f"""
        import errno, os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from random_models import random_model
        from vptq_jax.convert import checkpoint

        def full(event, arguments):
            if event == "os.mkdir" and "arrays" in os.fsdecode(arguments[0]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        model = random_model()
        sys.addaudithook(full)
        try:
            checkpoint.save(model, {str(tmp_path / "m")!r})
        except OSError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=150, check=True
    )
    assert "No space left on device" in result.stdout
    assert not list(tmp_path.iterdir())
