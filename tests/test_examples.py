"""Every example runs on a tiny model and does what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {"quantize_llama", "generate", "use_in_training"}


def test_quantize_llama_and_generate(tiny_hf, tmp_path, capsys):
    output = str(tmp_path / "out")
    options = ["--spec", "v2-k64", "--samples", "4", "--length", "64", "--windows", "2"]
    before, after = load_example("quantize_llama").main([str(tiny_hf), output, *options])
    assert after == pytest.approx(before, rel=0.2)
    assert "bits per weight" in capsys.readouterr().out

    prompts = ["the quick", "a model of the"]
    texts = load_example("generate").main([output, *prompts, "--max-new-tokens", "8"])
    shown = capsys.readouterr().out
    assert all(prompt + text in shown for prompt, text in zip(prompts, texts, strict=True))


def test_use_in_training(capsys):
    before, after = load_example("use_in_training").main(["--steps", "60"])
    assert after < 0.98 * before
    assert "step    0" in capsys.readouterr().out
