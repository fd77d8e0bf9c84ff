"""Perplexity of a whole model over specs, calibration modes and seeds; one JSON line a row, resumable.

    python benchmarks/quality.py MODEL --calibration ../shared/data/calib.txt --evaluation ../shared/data/eval.txt
    python benchmarks/quality.py MODEL ... --specs v4-k256 --modes sequential --seeds 0 1 2 --set rounds=3
    python benchmarks/quality.py MODEL ... --ablation
    python benchmarks/quality.py MODEL ... --specs v6-k4096 --set rounds=3 'variant="prototype"'

Rows that the output file already holds are skipped, so that the run may be killed at any time, and several
processes may share one file as long as their rows differ. The defaults are the project's model table: 64 x 512
calibration tokens, 64 windows of 1024 for evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import vptq_jax as vq
from vptq_jax.lm import data

SPECS = ("v4-k256", "v6-k4096", "v8-k256-256", "v12-k4096-4096", "v8-k4096-4096")


def model_rows(specs: list[str], modes: list[str], seeds: list[int], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings of the model table."""
    return [{"spec": spec, "mode": mode, "seed": seed} | options for seed in seeds for mode in modes for spec in specs]


def ablation_rows(seeds: list[int]) -> list[dict[str, Any]]:
    """One step a row, at about 2 and 3 index bits."""
    rows: list[dict[str, Any]] = []
    for main, residual, outlier in (("v4-k256", "v8-k256-256", "v2k256"), ("v2-k64", "v4-k64-64", "v2k256")):
        rows += [{"spec": main, "rounds": 0, "variant": variant} for variant in STEPS]
        rows += [{"spec": spec, "rounds": 0} for spec in (main, residual)]
        rows += [{"spec": f"{residual}-o{percent}{outlier}", "rounds": 0} for percent in (1, 2, 5)]
        rows += [{"spec": f"{residual}-g{groups}", "rounds": 0} for groups in (2, 4, 8)]
        rows += [{"spec": residual, "rounds": rounds} for rounds in (1, 2, 3, 4)]
        rows += [{"spec": residual, "rounds": 2, "mode": "sequential"}]
    return [{"mode": "independent", "seed": seed} | row for seed in seeds for row in rows]


def _nearest_only(W: Any, U: Any, codes: Any, segments: Any) -> Any:
    """In place of the column pass: every vector takes its nearest centroid, nothing is compensated."""
    codes = search.assign(W, codes, segments)
    return codes, W - search.decode_all(segments, codes)


def _prepared(change: Callable[[Any, Any], dict[str, Any]]) -> Callable[..., Any]:
    """In place of `search.prepare`: fields of the problem replaced, given the problem and the scale of every slot."""

    def prepare(W: Any, metric: Any, slot_columns: Any, **options: Any) -> Any:
        problem = _prepare(W, metric, slot_columns, **options)
        scale = problem.scale[problem.perm][np.maximum(slot_columns, 0)]
        return dataclasses.replace(problem, **change(problem, jnp.where(slot_columns >= 0, scale, 1)))

    return prepare


def _undamped(W: Any, metric: Any, slot_columns: Any, **options: Any) -> Any:
    """In place of `search.prepare`: refinement in the Hessian as collected; only the column pass is damped."""
    problem = _prepare(W, metric, slot_columns, **options)
    as_collected = dataclasses.replace(metric, damping=0.0, extra=jnp.zeros(()))
    return dataclasses.replace(problem, H=_prepare(W, as_collected, slot_columns, **options).H)


def _prototype(*arguments: Any, **options: Any) -> Any:
    """In place of `search.prepare`: undamped refinement, and k-means weighted by the undamped Hessian."""
    problem = _undamped(*arguments, **options)
    return dataclasses.replace(problem, importance=jnp.diag(problem.H))


def _range(W: Any) -> tuple[Any, Any]:
    """In place of `search.normalization`: range and minimum of each column, as the released code has them."""
    lowest, highest = W.min(axis=0), W.max(axis=0)
    return jnp.maximum(highest - lowest, 1e-9), lowest


_prepare = search.prepare
STEPS: dict[str, dict[str, Any]] = {
    "k-means only": {"column_pass": _nearest_only},
    # The column pass takes the Hessian of the weights before normalization.
    "unscaled Hessian": {"prepare": _prepared(lambda problem, scale: {"U": problem.U * scale})},
}
CHOICES: dict[str, dict[str, Any]] = {
    "range": {"normalization": _range},
    # k-means weighted as in the paper; by costs of errors of the weight itself, not in units of a column's scale.
    "diag(H)": {"prepare": _prepared(lambda problem, _: {"importance": jnp.diag(problem.H)})},
    "absolute": {"prepare": _prepared(lambda problem, scale: {"importance": problem.importance * scale**2})},
    "undamped refinement": {"prepare": _undamped},
    "prototype": {"normalization": _range, "prepare": _prototype},
}


@contextlib.contextmanager
def variant(name: str | None) -> Iterator[None]:
    """Puts a step or a choice of the algorithm back to what it was before, to measure what it is worth."""
    with contextlib.ExitStack() as stack:
        for function, replacement in (STEPS | CHOICES)[name].items() if name else ():
            stack.enter_context(mock.patch.object(search, function, replacement))
        if name:
            search.search.clear_cache()
            stack.callback(search.search.clear_cache)
        yield


def run_row(
    model: vq.LanguageModel, settings: dict[str, Any], calibration: vq.Hessians | list[np.ndarray], tokens: np.ndarray
) -> dict[str, Any]:
    """Quantizes and measures one row."""
    options = dict(settings)
    start = time.perf_counter()
    with variant(options.pop("variant", None)):
        quantized, report = vq.quantize(model, vq.QuantConfig(**options), calibration, progress=False)
    seconds = time.perf_counter() - start
    errors = [row["error"] for row in report.operators]
    return {
        "settings": settings,
        "perplexity": vq.perplexity(quantized, tokens, context=1024, max_windows=64, batch_size=4).value,
        "bits_nominal": report.bits_nominal,
        "bits_total": report.bits_total,
        "error": float(np.exp(np.mean(np.log(errors)))),
        "seconds": seconds,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Medians over the seeds."""
    table = Table("settings", "bits", "stored", "perplexity (median)", "of", "seeds", "proxy error")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = ", ".join(f"{key} {value}" for key, value in row["settings"].items() if key != "seed")
        groups.setdefault(name, []).append(row)
    for name, group in groups.items():
        values = sorted(row["perplexity"] for row in group)
        table.add_row(
            name, f"{group[0]['bits_nominal']:.2f}", f"{group[0]['bits_total']:.2f}", f"{np.median(values):.2f}",
            " ".join(f"{value:.2f}" for value in values), str(len(values)), f"{group[0]['error']:.5f}",
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="anything that vptq_jax.load reads")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--evaluation", type=Path, required=True, help="text file")
    parser.add_argument("--specs", nargs="+", default=list(SPECS))
    parser.add_argument("--modes", nargs="+", default=["independent", "sequential"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=NUMBER", help="fields of QuantConfig")
    parser.add_argument("--ablation", action="store_true", help="the ablation instead of the model table")
    parser.add_argument("--output", type=Path, default=Path("quality.jsonl"))
    options = parser.parse_args()

    model = vq.load(options.model)
    text = data.tokenize(model.tokenizer, options.calibration.read_text())
    calibration = data.batches(data.windows(text, 512, 64, first=model.config.first_token), batch_size=8)
    tokens = data.tokenize(model.tokenizer, options.evaluation.read_text())
    extra = {name: json.loads(value) for name, value in (item.split("=") for item in options.set)}
    wanted = (
        ablation_rows(options.seeds)
        if options.ablation
        else model_rows(options.specs, options.modes, options.seeds, extra)
    )
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = [json.loads(line) for line in lines]
    hessians = None
    for settings in wanted:
        if any(row["settings"] == settings for row in done):
            continue
        if settings["mode"] == "independent" and hessians is None:
            hessians = vq.collect_hessians(model, calibration)
        row = run_row(model, settings, hessians if settings["mode"] == "independent" else calibration, tokens)
        done.append(row)
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    show([row for row in done if row["settings"] in wanted])


if __name__ == "__main__":
    main()
