"""Every example runs on a tiny model and does what it says."""

from __future__ import annotations

import importlib.util
import re
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


def test_readme(tiny_hf, tmp_path, capsys):
    """The Python of README.md, with a smaller model, text and spec."""
    code = re.search(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL).group(1)
    for written, tried in {
        "path/to/Llama-2-7b-hf": str(tiny_hf),
        "llama-2-7b-3bit": str(tmp_path / "out"),
        '"c4"': '"builtin"',
        '"wikitext2"': '"builtin"',
        "v8-k65536-256": "v2-k64",
        "length=2048, count=128": "length=64, count=4",
        "context=2048": "context=256, max_windows=2",
    }.items():
        assert written in code
        code = code.replace(written, tried)
    exec(compile(code, "README.md", "exec"), {})
    shown = capsys.readouterr().out.splitlines()
    assert float(shown[0].split()[0]) > 3  # bits per weight
    assert 100 < float(shown[-1]) < 1000  # perplexity of a random model with 300 tokens


def test_use_in_training(capsys):
    before, after = load_example("use_in_training").main(["--steps", "60"])
    assert after < 0.98 * before
    assert "step    0" in capsys.readouterr().out
