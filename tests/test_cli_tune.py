"""`vptq-jax tune`: what it leaves behind, that it goes on, and what it refuses."""

import json
import re
import subprocess
import sys
import textwrap

import pytest
from tiny_model import write_llama, write_tokenizer

import vptq_jax as vq
from vptq_jax import cli
from vptq_jax.convert import checkpoint
from vptq_jax.lm import data
from vptq_jax.nn.linear import VQLinear

QUICK = ("--tokens", "640", "--length", "16", "--batch-size", "2", "--evaluations", "2", "--dtype", "float32")


@pytest.fixture(scope="module")
def quantized(tiny_hf, tmp_path_factory):
    lm = vq.load(tiny_hf)
    rows = data.windows(data.tokenize(lm.tokenizer, data.builtin_text()["calibration"]), 16, 8)
    small, report = vq.quantize(lm, "v4-k16", data.batches(rows), progress=False)
    path = tmp_path_factory.mktemp("quantized") / "small"
    vq.save(small, path, metadata={"quantization": report.as_json()}, report=report)
    return path


@pytest.fixture
def run(capsys, command_hooks, tiny_hf, quantized, tmp_path):
    def run(*arguments, model=quantized, teacher=tiny_hf):
        given = ("tune", model, "--teacher", teacher, "--out", tmp_path / "tuned", *QUICK, *arguments)
        with pytest.raises(SystemExit) as stop:
            cli.main(list(map(str, given)))
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return run


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_a_tuned_model_its_history_and_nothing_else(run, quantized, tmp_path):
    code, out, error = run("--json")
    assert code == 0, error
    assert names(tmp_path) == ["tuned"]
    said = json.loads(out)
    assert [row["step"] for row in said["rows"]] == [0, 10, 20]
    assert said["rows"][said["best"]]["kl"] < said["rows"][0]["kl"]
    metadata = checkpoint.read_metadata(tmp_path / "tuned")
    assert metadata["quantization"] == checkpoint.read_metadata(quantized)["quantization"]
    assert metadata["tuning"]["text"] == "self"
    assert metadata["tuning"]["options"]["tokens"] == 640
    assert {"tuning.png", "tune_history.json"} <= set(names(tmp_path / "tuned"))
    assert json.loads((tmp_path / "tuned/tune_history.json").read_text())["rows"] == said["rows"]
    before, after = (vq.load(path, trainable=True).module.linears() for path in (quantized, tmp_path / "tuned"))
    for path, layer in before.items():
        assert isinstance(layer, VQLinear)
        assert (layer.indices[...] == after[path].indices[...]).all()
        assert after[path].codebook.dtype == layer.codebook.dtype
        assert (layer.codebook[...] != after[path].codebook[...]).any()
    code, _, error = run("--json")
    assert code == 1
    assert "already holds something, a vptq_jax checkpoint" in error


def test_real_text(run, tmp_path):
    code, out, error = run("--text", "builtin")
    assert code == 0, error
    assert re.search(r"KL to the teacher [\d.]+ before, [\d.]+ now; the same most likely token after", out)
    assert re.search(r"Tuning on \d+ rows of 16 tokens from builtin", error)


def test_a_killed_run_goes_on(run, quantized, tiny_hf, tmp_path):
    code = """
    import os, signal, sys
    from vptq_jax import cli
    from vptq_jax.tune.student import Student
    step, seen = Student.step, []
    def counted(*arguments):
        seen.append(1)
        if len(seen) == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)
    Student.step = counted
    cli.main(sys.argv[1:])
    """
    given = ("tune", quantized, "--teacher", tiny_hf, "--out", tmp_path / "tuned", *QUICK)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, given)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == -9, done.stderr
    assert names(tmp_path) == ["tuned.partial"]
    text = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tuned.partial/text").glob("*.npy")}
    assert text
    status, _, error = run("--learning-rate", "0.01")
    assert status == 1
    assert "learning_rate: 0.005 then, 0.01 now" in error
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tuned.partial/text").glob("*.npy")} == text
    status, _, error = run()
    assert status == 0, error
    assert names(tmp_path) == ["tuned"]
    rows = json.loads((tmp_path / "tuned/tune_history.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [0, 10, 20]


def test_bad_input(run, quantized, tiny_hf, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_llama(other, write_tokenizer(other))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    for arguments, options, message in (
        (("--text", "missing.txt"), {}, "text 'missing.txt': no such file"),
        (("--text", "self+missing.txt"), {}, "text 'missing.txt': no such file"),
        (("--length", "99999"), {}, "--length is 99999; the models read at most"),
        ((), {"model": tiny_hf}, "the student has no quantized layer in its blocks"),
        (("--tokens", "0"), {}, "tokens is 0; expected a whole number of at least 1"),
        (("--workdir", tmp_path / "tuned/w"), {}, "the work directory .* lies inside the output"),
        ((), {"teacher": other}, r"different tokenizers: '[xy]' is \d+ and \d+"),
    ):
        code, _, error = run(*arguments, **options)
        assert code in (1, 2), (arguments, error)
        assert re.search(message, error), (arguments, error)
        assert names(tmp_path) == ["other"], arguments
    file = tmp_path / "tiny.txt"
    file.write_text("a b")
    code, _, error = run("--text", file)
    assert code == 1
    assert "fewer than one window" in error
