"""`load` tells checkpoints apart by what they hold."""

import json
import shutil

import numpy as np
import pytest

from vptq_jax.convert import checkpoint
from vptq_jax.convert.hf import load_hf
from vptq_jax.convert.loading import load, recognize


def test_saved_models_and_hugging_face_directories(tiny_hf, tmp_path):
    model = load(tiny_hf).module
    checkpoint.save(model, tmp_path / "m")
    assert recognize(tiny_hf) == ("hf", tiny_hf)
    assert recognize(tmp_path / "m") == ("orbax", tmp_path / "m")
    tokens = np.arange(6)[None]
    expected = np.asarray(load_hf(tiny_hf)(tokens))
    for path in (tiny_hf, tmp_path / "m"):
        np.testing.assert_array_equal(np.asarray(load(path)(tokens)), expected)
    assert load(tiny_hf, dtype="bfloat16").module.dtype == "bfloat16"
    assert load(tmp_path / "m", dtype="bfloat16").module.dtype == "bfloat16"
    with pytest.raises(ValueError, match="dtype is int8; expected one of float32, float16, bfloat16"):
        load(tmp_path / "m", dtype="int8")


def test_gguf_files_and_directories(smollm2_gguf, tmp_path):
    assert recognize(smollm2_gguf) == ("gguf", smollm2_gguf)
    (tmp_path / "a.gguf").symlink_to(smollm2_gguf)
    assert recognize(tmp_path)[0] == "gguf"
    (tmp_path / "b.gguf").symlink_to(smollm2_gguf)
    with pytest.raises(FileNotFoundError, match=r"2 GGUF files; name one, such as .*a\.gguf"):
        recognize(tmp_path)


def test_vptq_directories(tiny_hf, tmp_path):
    shutil.copytree(tiny_hf, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    for method, kind in (("vptq", "hf-vptq"), ("gptq", None), (3, None)):
        (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": method}}))
        if kind:
            assert recognize(tmp_path) == (kind, tmp_path)
        else:
            with pytest.raises(NotImplementedError, match=f"quantized by '{method}'"):
                load(tmp_path)


def test_what_is_not_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match="not a GGUF file"):
        load(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="not a hub id"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        load("nobody/nothing")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        load(tmp_path)
