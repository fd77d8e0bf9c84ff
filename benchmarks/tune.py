"""Quantize, then distil: what tuning gains, and how fast it is; one JSON line a figure.

    python benchmarks/tune.py MODEL --starts calib.txt --evaluation eval.txt --spec v8-k256-256 --tokens 10000000
    python benchmarks/tune.py MODEL ... --batch-size 32 --set learning_rate=0.005 accumulate=2

The model writes the text itself, for calibration and for tuning; a part that is trained on by nobody gives KL and
agreement. Perplexity: windows of 1024 of the evaluation text.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax

import vptq_jax as vq
from vptq_jax.lm import data
from vptq_jax.nn.forms import cast


def main() -> None:
    """Runs one spec and prints its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--starts", required=True, help="text whose snippets begin what the model writes")
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--spec", default="v8-k256-256")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--calibration-tokens", type=int, default=1 << 19)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], help="options of TuneConfig, such as learning_rate=0.01")
    parser.add_argument("--out", help="save the tuned model here")
    arguments = parser.parse_args()
    options = {name: json.loads(value) for name, value in (each.split("=") for each in arguments.set)}

    def say(what: str, **facts: Any) -> None:
        print(json.dumps({"what": what} | facts), flush=True)

    def timed(what: str, action: Any, **facts: Any) -> Any:
        begin = time.perf_counter()
        found = action()
        say(what, seconds=round(time.perf_counter() - begin, 2), **facts)
        return found

    lm = vq.load(arguments.model)
    teacher = vq.LanguageModel(cast(lm.module, "bfloat16"), lm.tokenizer)
    starts, evaluation = (
        data.tokenize(lm.tokenizer, Path(each).read_text(encoding="utf-8"))
        for each in (arguments.starts, arguments.evaluation)
    )
    say("device", kind=jax.devices()[0].device_kind, jax=jax.__version__, options=vars(arguments))
    wanted = arguments.tokens + (64 << 9)
    rows = timed(
        "text",
        lambda: vq.self_text(teacher, wanted, starts, batch_size=2048, seed=arguments.seed),
        tokens=wanted,
    )
    held_out, rows = rows[:64], rows[64:]
    calibration = data.batches(rows[-max(1, arguments.calibration_tokens // 512) :], 32)
    hessians = timed("hessians", lambda: vq.collect_hessians(lm, calibration), tokens=32 * 512 * len(calibration))
    config = vq.QuantConfig(arguments.spec, rounds=2, seed=arguments.seed)
    student, report = timed("quantized", lambda: vq.quantize(lm, config, hessians))

    def score(what: str, model: vq.LanguageModel, **facts: Any) -> None:
        found = vq.divergence(model, teacher, held_out, batch_size=8)
        value = vq.perplexity(model, evaluation, context=1024, max_windows=arguments.windows, batch_size=4).value
        say(what, kl=round(found.kl, 4), top1=round(found.top1, 4), perplexity=round(value, 3), **facts)

    score("teacher", teacher)
    score("without tuning", student, spec=arguments.spec, bits=round(report.bits_total, 3))
    batches = data.batches(rows, arguments.batch_size)[: len(rows) // arguments.batch_size]
    begin = time.perf_counter()
    tuned, history = vq.distill(
        student, teacher, batches, vq.TuneConfig(tokens=arguments.tokens, **options), held_out=held_out, progress=True
    )
    seconds = time.perf_counter() - begin
    for row in history.rows:
        say("row", **row)
    stats = jax.devices()[0].memory_stats() or {}
    score(
        "tuned", tuned, spec=arguments.spec, seconds=round(seconds, 1), stopped=history.stopped,
        tokens_per_second=round(history.tokens_per_second), peak_gb=stats.get("peak_bytes_in_use", 0) / 1e9,
    )  # fmt: skip
    if arguments.out:
        vq.save(tuned, arguments.out, overwrite=True)


if __name__ == "__main__":
    main()
