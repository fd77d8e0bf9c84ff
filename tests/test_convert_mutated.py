"""Hostile and broken checkpoints: one clear error each, no large allocation, no hang, no code run."""

import contextlib
import json
import os
import pickle
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vptq_jax.convert.api import convert
from vptq_jax.convert.loading import load
from vptq_jax.convert.vptq_format import load_vptq

SOURCE = Path(__file__).parent / "golden" / "checkpoints" / "v6_k64_pad"
LAYER = "model.layers.0.self_attn.q_proj"
LIMIT = 8 << 20
"""Bytes that refusing a checkpoint of 0.6 MB may allocate: its header and small tensors, and no more."""


@contextlib.contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LIMIT
    finally:
        tracemalloc.stop()


def refused(path, message="."):
    with little_memory(), pytest.raises((ValueError, FileNotFoundError, NotImplementedError), match=message) as error:
        load(path)
    text = str(error.value)
    assert text.strip()
    assert len(text) < 20_000
    return text


@pytest.fixture
def copy(tmp_path):
    path = tmp_path / "model"
    shutil.copytree(SOURCE, path)
    (path / "expected.npz").unlink()
    return path


def edit_config(path, change):
    raw = json.loads((path / "config.json").read_text())
    change(raw)
    (path / "config.json").write_text(json.dumps(raw))


def edit_layer(path, **values):
    edit_config(path, lambda raw: raw["quantization_config"]["config_for_layers"][LAYER].update(values))


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def edit_header(path, change):
    raw = (path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


LAYER_VALUES = [
    ("num_centroids", [-1, 1 << 40]),
    ("num_centroids", [-1, 128]),
    ("num_centroids", [-1, 32]),
    ("num_centroids", [-1, 63]),
    ("num_centroids", [-1, 0]),
    ("num_centroids", [-1, -64]),
    ("num_centroids", [-1, 64.0]),
    ("num_centroids", [-1]),
    ("num_centroids", "64"),
    ("num_centroids", None),
    ("num_centroids", [-1, True]),
    ("num_centroids", [-1, 10**400]),
    ("num_res_centroids", [-1, 1 << 40]),
    ("num_res_centroids", [-1, 64]),
    ("num_res_centroids", [-1, 3]),
    ("num_res_centroids", [[], {}]),
    ("vector_lens", [-1, 0]),
    ("vector_lens", [-1, -6]),
    ("vector_lens", [-1, 5]),
    ("vector_lens", [-1, 1 << 40]),
    ("vector_lens", {"a": 1}),
    ("group_num", 0),
    ("group_num", -1),
    ("group_num", 2),
    ("group_num", 7),
    ("group_num", 1 << 60),
    ("group_num", 1.5),
    ("group_size", 64),
    ("group_size", 1 << 60),
    ("group_size", "128"),
    ("outlier_size", -1),
    ("outlier_size", 2),
    ("outlier_size", 128),
    ("outlier_size", 1 << 60),
    ("in_features", 129),
    ("in_features", -7),
    ("in_features", 1 << 60),
    ("out_features", 64),
    ("out_features", [128]),
    ("enable_perm", False),
    ("enable_perm", 1),
    ("enable_norm", False),
    ("enable_norm", "yes"),
    ("is_indice_packed", False),
    ("is_indice_packed", None),
    ("norm_dim", 1),
    ("norm_dim", "x" * 10_000),
    ("vector_quant_dim", "in"),
]


@pytest.mark.parametrize(("key", "value"), LAYER_VALUES, ids=lambda value: repr(value)[:30])
def test_layer_configs_that_lie(copy, key, value):
    edit_layer(copy, **{key: value})
    assert LAYER in refused(copy) or "more than 64 bits" in refused(copy)


MODEL_VALUES = [
    ("num_hidden_layers", 1 << 40),
    ("num_hidden_layers", 3),
    ("num_hidden_layers", 1),
    ("num_hidden_layers", -2),
    ("hidden_size", 1 << 40),
    ("hidden_size", -128),
    ("hidden_size", 64),
    ("intermediate_size", 1 << 50),
    ("vocab_size", 1 << 62),
    ("vocab_size", 511),
    ("num_attention_heads", 1 << 40),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 4),
    ("head_dim", 1 << 40),
    ("head_dim", 31),
    ("rms_norm_eps", "small"),
    ("model_type", ["llama"]),
    ("model_type", "bert"),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("quantization_config", [1, 2]),
    ("quantization_config", {"quant_method": "vptq"}),
    ("quantization_config", {"quant_method": "vptq", "config_for_layers": [1]}),
    ("quantization_config", {"quant_method": "vptq", "config_for_layers": {LAYER: 3}}),
    ("quantization_config", {"quant_method": "vptq", "config_for_layers": {"../../etc": {}}}),
    ("quantization_config", {"quant_method": "vptq", "config_for_layers": {LAYER: {}}}),
    ("quantization_config", {"quant_method": "vptq", "modules_to_not_convert": {"a": 1}}),
    ("quantization_config", {"quant_method": {"a": 1}}),
]


@pytest.mark.parametrize(("key", "value"), MODEL_VALUES, ids=lambda value: repr(value)[:30])
def test_model_configs_that_lie(copy, key, value):
    edit_config(copy, lambda raw: raw.update({key: value}))
    refused(copy)


def negative(tensors):
    tensors[f"{LAYER}.perm"][3] = -1


def repeated(tensors):
    tensors[f"{LAYER}.perm"][3] = tensors[f"{LAYER}.perm"][4]


CONTENTS = [
    (lambda t: t[f"{LAYER}.centroids.weight"].__setitem__((0, 7), np.nan), "q_proj.centroids.weight holds nan"),
    (lambda t: t[f"{LAYER}.centroids.weight"].__setitem__((0, 7), np.inf), "q_proj.centroids.weight holds inf"),
    (lambda t: t[f"{LAYER}.weight_scale"].__setitem__(5, -np.inf), "q_proj.weight_scale holds -inf"),
    (lambda t: t[f"{LAYER}.weight_bias"].__setitem__(5, np.nan), "q_proj.weight_bias holds nan"),
    (lambda t: t["model.norm.weight"].__setitem__(5, np.nan), "'model.norm.weight' holds nan"),
    (
        lambda t: t["model.embed_tokens.weight"].__setitem__((5, 1), np.nan),
        r"embed_tokens.weight' holds nan at \[5, 1\]",
    ),
    (negative, "q_proj.perm is no permutation"),
    (repeated, "q_proj.perm is no permutation"),
    (lambda t: t.pop(f"{LAYER}.perm"), "q_proj.perm is missing"),
    (lambda t: t.pop(f"{LAYER}.indices"), "q_proj.indices is missing"),
    (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    (lambda t: t.update({f"{LAYER}.perm": t[f"{LAYER}.perm"].astype(np.int8)}), "dtype int8"),
    (lambda t: t.update({f"{LAYER}.indices": t[f"{LAYER}.indices"].astype(np.int64)}), "dtype int64"),
    (lambda t: t.update({f"{LAYER}.indices": t[f"{LAYER}.indices"][..., :-1].copy()}), "q_proj.indices has shape"),
    (
        lambda t: t.update({f"{LAYER}.weight": np.zeros((128, 128), np.float32)}),
        "q_proj.weight' of shape .* is unexpected",
    ),
    (lambda t: t.update({f"{LAYER}.bias": np.zeros(128, np.float32)}), "q_proj.bias' of .* is unexpected"),
    (lambda t: t.update({"model.layers.7.mlp.up_proj.indices": np.zeros(4, np.int32)}), "is unexpected"),
    (lambda t: t.update({f"{LAYER}.centroids.weight": t[f"{LAYER}.centroids.weight"].astype(np.int32)}), "dtype int32"),
]


@pytest.mark.parametrize(("change", "message"), CONTENTS, ids=[message for _, message in CONTENTS])
def test_tensors_that_lie(copy, change, message):
    edit_tensors(copy, change)
    refused(copy, message)


def test_many_faults_come_together(copy):
    edit_tensors(copy, lambda t: [negative(t), t[f"{LAYER}.weight_scale"].fill(np.nan)])
    text = refused(copy, "2 problems")
    assert "perm is no permutation" in text
    assert "weight_scale holds nan" in text


HEADERS = [
    (lambda h: h[f"{LAYER}.indices"].update(shape=[1 << 40, 1 << 40]), "span"),
    (lambda h: h[f"{LAYER}.indices"].update(shape=[-1, -22, -24]), "whole numbers"),
    (lambda h: h[f"{LAYER}.indices"].update(dtype="I128"), "dtype 'I128'"),
    (lambda h: h[f"{LAYER}.indices"].update(data_offsets=[0, 1 << 60]), "do not lie"),
    (lambda h: h[f"{LAYER}.indices"].update(data_offsets=[-8, 8]), "whole numbers"),
    (lambda h: h[f"{LAYER}.indices"].update(data_offsets=h[f"{LAYER}.perm"]["data_offsets"]), "span|overlaps"),
    (lambda h: h.update({LAYER: None}), "lacks"),
    (lambda h: h.update({"x" * 100_000: h[f"{LAYER}.perm"]}), "overlaps|gap"),
    (lambda h: h.clear(), "bytes after the header"),
]


@pytest.mark.parametrize(("change", "message"), HEADERS, ids=[message for _, message in HEADERS])
def test_headers_that_lie(copy, change, message):
    edit_header(copy, change)
    refused(copy, message)


def cut(fraction):
    return lambda raw: raw[: int(len(raw) * fraction)]


FILES = [cut(0), cut(1e-5), cut(1e-3), cut(0.01), cut(0.5), cut(0.999999), lambda raw: raw + b"x", lambda raw: raw * 2]


@pytest.mark.parametrize("number", range(len(FILES)))
def test_files_cut_short_or_grown(copy, number):
    file = copy / "model.safetensors"
    file.write_bytes(FILES[number](file.read_bytes()))
    refused(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not usable JSON"),
        (b"null", "expected an object"),
        (b"[" * 1_000_000, "nests too deeply"),
        (b'{"a":' * 1_000_000, "nests too deeply"),
        (b'{"model_type": "llama", "model_type": "llama"}', "occurs twice"),
        (b'{"vocab_size": ' + b"9" * 1_000_000 + b"}", "not usable JSON"),
        (b"\x80\x04\x95", "not JSON|not usable JSON"),
        (b'{"model_type": "llama"}', "vocab_size is missing"),
    ],
)
def test_configs_that_are_no_configs(copy, text, message):
    (copy / "config.json").write_bytes(text)
    tracemalloc.start()
    with pytest.raises((ValueError, NotImplementedError), match=message):
        load(copy)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_a_huge_config_is_not_even_read(copy):
    with (copy / "config.json").open("wb") as stream:
        stream.truncate(1 << 40)
    refused(copy, "expected at most")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 7, None])
def test_an_index_that_leads_outside(copy, shard):
    shutil.copy(copy / "model.safetensors", copy.parent / "outside.safetensors")
    names = list(load_file(copy / "model.safetensors"))
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    refused(copy, "not a plain file name")


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json", "tokenizer.json"])
def test_pickles_are_never_opened(copy, name):
    mark = copy.parent / "executed"
    if name == "pytorch_model.bin":
        (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises((ValueError, FileNotFoundError)):
        load(copy)
    assert not mark.exists()


def test_remote_code_is_never_run(copy):
    mark = copy.parent / "executed"
    (copy / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    code = {"auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
    edit_config(copy, lambda raw: raw.update(code))
    (copy / "tokenizer_config.json").write_text(json.dumps(code | {"tokenizer_class": "Evil"}))
    (copy / "tokenizer.json").write_text("{}")
    with contextlib.suppress(ValueError):
        load(copy)
    assert not mark.exists()


def test_flipped_bits_in_the_header_never_crash(copy):
    """Sixty files with one bit of the first 4 kB flipped: refused in words, or read to the same shapes."""
    file = copy / "model.safetensors"
    raw = file.read_bytes()
    rng = np.random.default_rng(0)
    said = []
    for position, bit in zip(rng.integers(0, 4096, 60), rng.integers(0, 8, 60), strict=True):
        changed = bytearray(raw)
        changed[position] ^= 1 << bit
        file.write_bytes(changed)
        try:
            with little_memory():
                load_vptq(copy)
        except (ValueError, FileNotFoundError) as error:
            said.append(str(error))
    assert all(said)
    assert len(said) > 30


def test_flipped_bits_in_the_data_are_finite_or_refused(copy):
    file = copy / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    rng = np.random.default_rng(1)
    for _ in range(12):
        changed = bytearray(raw)
        for position, bit in zip(rng.integers(8 + length, len(raw), 40), rng.integers(0, 8, 40), strict=True):
            changed[position] ^= 1 << bit
        file.write_bytes(changed)
        try:
            layers = load_vptq(copy).module.linears()
        except ValueError as error:
            said, layers = str(error), {}
        assert layers or "holds" in said or "permutation" in said
        for layer in layers.values():
            layer.weight.validate()


def test_a_dry_run_lists_every_problem(copy):
    edit_layer(copy, num_centroids=[-1, 1 << 40])
    edit_config(copy, lambda raw: raw["quantization_config"]["config_for_layers"].update(nowhere={}))
    edit_tensors(copy, lambda t: t.pop("model.norm.weight"))
    report = convert(copy, copy.parent / "out", to="hf", check=True)
    assert not report.ok
    assert not report.written
    text = "\n".join(report.problems)
    for part in ("1099511627776", "'nowhere'", "model.norm.weight is missing"):
        assert part in text
    assert not (copy.parent / "out").exists()
