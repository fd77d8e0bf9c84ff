"""Conversion between all kinds of checkpoints, its dry run, and inspection without reading weights."""

import json
import shutil
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from random_models import CONFIG, TOKENS, assert_same_bits, random_model
from safetensors.numpy import load_file

from vptq_jax.convert import checkpoint
from vptq_jax.convert.api import convert
from vptq_jax.convert.export import export, plan_hf, plan_vptq
from vptq_jax.convert.inspect import facts, inspect
from vptq_jax.convert.loading import load
from vptq_jax.lm.config import ModelConfig


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same quantized model saved as each kind that can hold it, and a plain one."""
    path = tmp_path_factory.mktemp("sources")
    model = random_model(CONFIG, ("v6-k16-4", "v4-k8-g4"))
    checkpoint.save(model, path / "orbax", metadata={"calibration": "some text"})
    export(model, path / "hf-vptq", plan_vptq(model))
    export(model, path / "hf", plan_hf(model))
    return path


@pytest.mark.parametrize("kind", ["orbax", "hf-vptq"])
@pytest.mark.parametrize("to", ["orbax", "hf-vptq", "hf"])
def test_every_quantized_source_to_every_target(sources, tmp_path, kind, to):
    report = convert(sources / kind, tmp_path / "out", to=to)
    assert report.ok
    assert report.written
    assert (report.kind, report.to, report.model_type) == (kind, to, "llama")
    assert (report.quantized_layers, report.dense_layers) == (14, 2)
    assert report.seconds > 0
    assert report.peak_memory > 10 << 20
    assert json.loads(json.dumps(report.to_dict()))["files"]
    out = load(tmp_path / "out")
    if to == "hf":
        np.testing.assert_allclose(np.asarray(out(TOKENS)), np.asarray(load(sources / kind)(TOKENS)), atol=1e-4)
    else:
        assert_same_bits(out, load(sources / kind))
    if kind == "orbax" and to != "orbax":
        assert "some text" in (tmp_path / "out" / "README.md").read_text()


def test_plain_sources(sources, tmp_path):
    report = convert(sources / "hf", tmp_path / "m", to="orbax", dtype="bfloat16", metadata={"a": 1})
    assert (report.quantized_layers, report.bits_total) == (0, 16.0)
    assert load(tmp_path / "m").module.dtype == jnp.bfloat16
    assert checkpoint.read_metadata(tmp_path / "m") == {"a": 1}
    with pytest.raises(ValueError, match="no layer is quantized"):
        convert(sources / "hf", tmp_path / "v", to="hf-vptq")
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("kind", ["orbax", "hf-vptq", "hf"])
@pytest.mark.parametrize("to", ["orbax", "hf-vptq", "hf"])
def test_a_dry_run_says_what_the_run_does(sources, tmp_path, kind, to):
    dry = convert(sources / kind, tmp_path / "out", to=to, check=True)
    assert not dry.written
    assert list(tmp_path.iterdir()) == []
    if kind == "hf" and to == "hf-vptq":
        assert dry.problems == ["no layer is quantized; quantize the model first, or export it as 'hf'"]
        return
    wet = convert(sources / kind, tmp_path / "out", to=to)
    same = ("source", "kind", "destination", "to", "problems", "notes", "model_type", "quantized_layers",
            "dense_layers", "weights", "bits_nominal", "bits_total", "bytes")  # fmt: skip
    for field in same:
        assert getattr(dry, field) == getattr(wet, field), field
    if to != "orbax":
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert sum(tensor.nbytes for tensor in stored.values()) == dry.bytes


def test_a_dry_run_reports_destination_and_source_together(sources, tmp_path):
    shutil.copytree(sources / "orbax", tmp_path / "m")
    file = max((p for p in (tmp_path / "m" / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "thesis.txt").write_text("years of work")
    report = convert(tmp_path / "m", tmp_path, to="hf", check=True)
    assert len(report.problems) == 2
    assert "truncated" in report.problems[0]
    assert "no Hugging Face model" in report.problems[1]
    assert convert(tmp_path / "nowhere", tmp_path / "x", check=True).problems[0].endswith("'organization/name'")


@pytest.mark.parametrize("to", ["orbax", "hf-vptq", "hf"])
def test_destinations_that_are_taken(sources, tmp_path, to):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError):
            convert(sources / "orbax", tmp_path, to=to, overwrite=overwrite)
    with pytest.raises(FileExistsError, match="is a file"):
        convert(sources / "orbax", tmp_path / "thesis.txt", to=to)
    with pytest.raises(FileExistsError, match="the source itself"):
        convert(sources / "orbax", sources / "orbax", to=to, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    for _ in range(2):
        convert(sources / "hf-vptq", tmp_path / "m", to=to, overwrite=True)


def test_arguments_out_of_range(sources, tmp_path):
    with pytest.raises(ValueError, match="to is 'onnx'; expected one of orbax, hf-vptq, hf"):
        convert(sources / "hf", tmp_path / "m", to="onnx", check=True)
    with pytest.raises(ValueError, match="dtype is int8"):
        convert(sources / "hf", tmp_path / "m", dtype="int8")


@pytest.mark.parametrize("kind", ["orbax", "hf-vptq", "hf"])
def test_inspection_counts_what_loading_finds(sources, kind):
    seen = inspect(sources / kind)
    assert seen.pop("kind") == kind
    assert seen.pop("path") == str(sources / kind)
    loaded = load(sources / kind).module
    assert seen == facts(loaded)
    if kind != "hf":
        weights = [layer.weight for layer in loaded.linears().values()]
        bits = sum(w.stored_bits for w in weights) / sum(np.prod(w.shape) for w in weights)
        assert seen["bits_total"] == pytest.approx(bits)
        assert {row["format"] for row in seen["layers"]} == {"v6-k16-4", "v4-k8-g4", "float32"}


def test_inspecting_a_gguf_file(smollm2_gguf):
    seen = inspect(smollm2_gguf)
    assert (seen["kind"], seen["num_layers"], seen["vocab_size"], seen["bits_total"]) == ("gguf", 30, 49152, 32.0)


def test_import_and_export_take_little_memory(tmp_path):
    """Import: at most 1.3 times the packed checkpoint. Export: less than half of the dense model."""
    config = ModelConfig("llama", 2048, 1024, 4096, 8, 8, 8, 128, dtype="bfloat16")
    model = random_model(config, ("v8-k4096-256",), jnp.bfloat16)
    plan = plan_vptq(model)
    export(model, tmp_path / "m", plan)
    dense = sum(2 * layer.shape[0] * layer.shape[1] for layer in model.linears().values())
    small = tmp_path / "small"
    export(random_model(), small, plan_vptq(random_model()))
    code = f"""
        from vptq_jax.convert.api import convert
        from vptq_jax.convert.loading import load

        def status(key):
            return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

        def measured(action):
            before = status("VmRSS")
            open("/proc/self/clear_refs", "w").write("5")
            result = action()
            print(status("VmHWM") - before)
            return result

        convert({str(small)!r}, {str(tmp_path / "warm")!r}, to="hf")
        model = measured(lambda: load({str(tmp_path / "m")!r}))
        del model
        measured(lambda: convert({str(tmp_path / "m")!r}, {str(tmp_path / "hf")!r}, to="hf"))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=200, check=True
    )
    load_peak, convert_peak = map(int, result.stdout.split())
    assert load_peak <= 1.3 * plan.nbytes
    assert convert_peak <= plan.nbytes + dense / 4
