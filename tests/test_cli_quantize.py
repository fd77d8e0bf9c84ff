"""`vptq-jax quantize` around its output, work and Hessian directories: nothing lost, and the same command goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_model import write_llama, write_tokenizer

from vptq_jax import cli
from vptq_jax.convert import checkpoint
from vptq_jax.lm.workdir import WorkDir

QUICK = ("--spec", "v4-k16", "--samples", "4", "--length", "16", "--rounds", "1")


@pytest.fixture
def run(capsys, command_hooks, tiny_hf):
    """Quantizes the tiny model in this process; gives exit status and what it said."""

    def run(*arguments, model=tiny_hf):
        with pytest.raises(SystemExit) as stop:
            cli.main(["quantize", *map(str, (model, *arguments))])
        return stop.value.code, capsys.readouterr().err

    return run


def names(path):
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("job/out", ("--workdir", "job"), "the output .*out' lies inside the work directory .*job'"),
        ("job", ("--workdir", "job/w"), "the work directory .* lies inside the output"),
        ("job", ("--workdir", "job"), "the output and the work directory are the same"),
        ("out", ("--workdir", "w", "--save-hessians", "w/h"), "the Hessians .* lies inside the work directory"),
        ("out/x", ("--save-hessians", "out"), "the output .* lies inside the Hessians"),
        ("out", ("--workdir", "."), "the output .* lies inside the work directory"),
    ],
)
def test_directories_that_would_remove_one_another(run, tmp_path, monkeypatch, output, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    code, error = run(output, *QUICK, *options)
    assert code == 1
    assert re.search(message, error), error
    assert names(tmp_path) == ["mine"]


def test_a_work_directory_that_holds_more_stays(run, tmp_path):
    (tmp_path / "w").mkdir()
    with WorkDir(tmp_path / "w") as work:
        assert not work.started
    assert run(tmp_path / "out", *QUICK, "--workdir", tmp_path / "w")[0] == 0
    assert names(tmp_path) == ["out"]
    code, error = run(tmp_path / "out2", *QUICK, "--workdir", tmp_path / "out")
    assert code == 1
    assert "holds files but no run.json" in error
    assert checkpoint.is_checkpoint(tmp_path / "out")


def test_the_report_is_in_the_output_before_it_has_its_name(run, tmp_path, monkeypatch):
    rename, seen = os.rename, []

    def watched(source, target):
        if str(target).endswith("out"):
            seen.extend(names(Path(source)))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    assert run(tmp_path / "out", *QUICK)[0] == 0
    assert {"quant_report.json", "error_by_layer.png", "bits_and_error.png", "vptq_jax.json", "arrays"} <= set(seen)
    manifest = json.loads((tmp_path / "out" / "vptq_jax.json").read_text())
    assert "quant_report.json" in manifest["files"]


def test_the_same_command_again_is_done_already(run, tmp_path):
    assert run(tmp_path / "out", *QUICK)[0] == 0
    before = (tmp_path / "out" / "vptq_jax.json").read_bytes()
    code, error = run(tmp_path / "out", *QUICK)
    assert code == 0
    assert "is the result of this command already" in error
    assert (tmp_path / "out" / "vptq_jax.json").read_bytes() == before
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("change", [("--seed", "3"), ("--length", "32")])
def test_another_command_is_refused_at_an_output_that_is_there(run, tmp_path, change):
    assert run(tmp_path / "out", *QUICK)[0] == 0
    code, error = run(tmp_path / "out", *QUICK, *change)
    assert code == 1
    assert "already holds" in error
    assert names(tmp_path) == ["out"]


def test_another_model_is_refused_at_an_output_that_is_there(run, tiny_hf, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_llama(other, write_tokenizer(other), seed=1)
    assert run(tmp_path / "out", *QUICK)[0] == 0
    code, error = run(tmp_path / "out", *QUICK, model=other)
    assert code == 1
    assert "made from other weights or other text" in error


def test_a_damaged_output_is_not_taken_for_done(run, tmp_path):
    assert run(tmp_path / "out", *QUICK)[0] == 0
    file = tmp_path / "out" / "quant_report.json"
    file.write_text(file.read_text() + " ")
    code, error = run(tmp_path / "out", *QUICK)
    assert code == 1
    assert "is damaged" in error
    assert run(tmp_path / "out", *QUICK, "--overwrite")[0] == 0


def test_saved_hessians_of_an_interrupted_run_are_used_again(run, tmp_path, monkeypatch):
    options = (*QUICK, "--save-hessians", tmp_path / "h")
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    code, error = run(tmp_path / "out", *options)
    assert code == 130
    assert "the same command continues from there" in error
    assert names(tmp_path) == ["h", "out.partial"]
    monkeypatch.undo()
    monkeypatch.setattr("vptq_jax.cli.quantize_run.collect_hessians", None)
    code, error = run(tmp_path / "out", *options)
    assert code == 0, error
    assert names(tmp_path) == ["h", "out"]


def test_saved_hessians_of_other_text_are_refused(run, tmp_path):
    assert run(tmp_path / "out", *QUICK, "--save-hessians", tmp_path / "h")[0] == 0
    code, error = run(tmp_path / "out2", *QUICK, "--length", "32", "--save-hessians", tmp_path / "h")
    assert code == 1
    assert "the calibration text was another one" in error
    assert names(tmp_path) == ["h", "out"]


def test_two_runs_cannot_share_a_work_directory(run, tmp_path):
    with WorkDir(tmp_path / "w"):
        code, error = run(tmp_path / "out", *QUICK, "--workdir", tmp_path / "w")
    assert code == 1
    assert f"another run (pid {os.getpid()}) is at work in" in error
    assert run(tmp_path / "out", *QUICK, "--workdir", tmp_path / "w")[0] == 0


def test_any_exception_is_one_line(run, tmp_path, monkeypatch):
    class Panic(BaseException):
        """What a library in Rust ends with."""

    for error, said in (
        (RuntimeError("first\n\x1b[31msecond " + "x" * 5000), "RuntimeError: first; \ufffd[31msecond x"),
        (MemoryError(), "MemoryError"),
        (Panic("index out of range"), "Panic: index out of range"),
    ):
        monkeypatch.setattr("vptq_jax.cli.common.open_model", lambda *_, error=error: (_ for _ in ()).throw(error))
        code, text = run(tmp_path / "out", *QUICK)
        assert code == 1
        assert text.startswith(f"error: {said}")
        assert text.count("\n") == 1
        assert len(text) < 500


def test_debug_shows_the_traceback(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vptq_jax.cli.common.open_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["quantize", "--debug", "model", str(tmp_path / "out"), *QUICK])


def test_ctrl_c_while_saving_waits_for_the_arrays(tiny_hf, tmp_path):
    """The signal comes in the middle of Orbax; the run ends in words and nothing half-written stays."""
    code = """
        import os, signal, sys
        import orbax.checkpoint as ocp
        from vptq_jax.cli import main
        signal.signal(signal.SIGINT, signal.default_int_handler)
        save = ocp.Checkpointer.save
        def struck(*arguments, **named):
            save(*arguments, **named)
            os.kill(os.getpid(), signal.SIGINT)
        ocp.Checkpointer.save = struck
        main(sys.argv[1:])
    """
    command = ["quantize", tiny_hf, tmp_path / "out", *QUICK]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, command)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 130, done.stderr
    assert "the same command continues from there" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == ["out.partial"]


@pytest.mark.parametrize("target", ["hf", "hf-vptq", "orbax"])
def test_overwriting_keeps_what_no_export_writes(run, tiny_hf, tmp_path, target):
    from vptq_jax.convert.api import convert

    assert run(tmp_path / "out", *QUICK)[0] == 0
    convert(tmp_path / "out", tmp_path / "app", to=target)
    convert(tmp_path / "out", tmp_path / "app", to=target, overwrite=True)
    (tmp_path / "app" / "src").mkdir()
    (tmp_path / "app" / "src" / "a.py").write_text("mine")
    with pytest.raises(FileExistsError, match=r"did not write: 'src/a.py'"):
        convert(tmp_path / "out", tmp_path / "app", to=target, overwrite=True)
    shutil.rmtree(tmp_path / "app")
    (tmp_path / "app" / "src").mkdir(parents=True)
    (tmp_path / "app" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="already holds something that is no"):
        convert(tmp_path / "out", tmp_path / "app", to=target, overwrite=True)


def test_signals_are_as_they_were(run, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    assert run(tmp_path / "out", *QUICK)[0] == 0
    assert signal.getsignal(signal.SIGINT) is before
