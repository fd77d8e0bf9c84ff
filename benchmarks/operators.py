"""Relative proxy error on the golden operators, beside what the original VPTQ reaches on the same weights and Hessians.

    python benchmarks/operators.py ../shared/golden/operators
    python benchmarks/operators.py DIR --specs v4-k256 v8-k256-256 --rounds 0 2 4 --seeds 0 1 2 --json out.json

The stored Hessians are regularized already (0.01 of the mean diagonal), and the errors are measured with them as
they are. `damping` is what `quantize_weight` adds on top before it factorizes, as the original does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import vptq_jax as vq

SPECS = ("v4-k256", "v6-k4096", "v8-k256-256", "v12-k4096-4096")


def reference_errors(directory: Path) -> dict[tuple[str, str], float]:
    """Mean final error of the original over its k-means seeds, by (operator, spec)."""
    operators = json.loads((directory / "reference_errors.json").read_text())["operators"]
    found: dict[tuple[str, str], list[float]] = {}
    for operator, facts in operators.items():
        for run in facts["runs"]:
            if run["kind"] == "reference":
                residual = f"-{run['res_k']}" if run["res_k"] > 0 else ""
                last = run.get("after_residual", run["after_vptq"])
                found.setdefault((operator, f"v{run['v']}-k{run['k']}{residual}"), []).append(last["true"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def relative_error(W: np.ndarray, quantized: np.ndarray, H: np.ndarray) -> float:
    """tr(E H E^T) / tr(W H W^T) in float64."""
    W, E, H = W.astype(np.float64), quantized.astype(np.float64) - W, H.astype(np.float64)
    return float(np.sum((E @ H) * E) / np.sum((W @ H) * W))


def measure(directory: Path, specs: list[str], rounds: list[int], seeds: list[int]) -> Iterator[dict[str, Any]]:
    """One row for each operator, spec and number of rounds: errors over the seeds, and the original's."""
    reference = reference_errors(directory)
    for path in sorted(directory.glob("*.npz")):
        data = np.load(path)
        W, H = data["weight"], data["hessian"]
        for spec in specs:
            for count in rounds:
                options = vq.SearchOptions(rounds=count)
                errors, seconds = [], []
                for seed in seeds:
                    start = time.perf_counter()
                    array, _ = vq.quantize_weight(W, H, spec, key=jax.random.key(seed), options=options)
                    errors.append(relative_error(W, np.asarray(array.dequantize()), H))
                    seconds.append(time.perf_counter() - start)
                yield {
                    "operator": path.stem,
                    "spec": spec,
                    "rounds": count,
                    "original": reference.get((path.stem, spec)),
                    "errors": errors,
                    "error": float(np.mean(errors)),
                    "seconds": min(seconds),
                }


def show(rows: list[dict[str, Any]]) -> None:
    """The table, and the geometric means of the ratios."""
    table = Table("operator", "spec", "rounds", "original", "vptq_jax", "ratio", "seconds")
    for row in rows:
        ratio = f"{row['error'] / row['original']:.3f}" if row["original"] else "-"
        table.add_row(
            row["operator"], row["spec"], str(row["rounds"]), f"{row['original'] or float('nan'):.5f}",
            f"{row['error']:.5f}", ratio, f"{row['seconds']:.1f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for count in sorted({row["rounds"] for row in rows}):
        ratios = [row["error"] / row["original"] for row in rows if row["rounds"] == count and row["original"]]
        if ratios:
            mean = np.exp(np.mean(np.log(ratios)))
            console.print(f"rounds {count}: geometric mean of the ratios {mean:.3f}, largest {max(ratios):.3f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="holds *.npz and reference_errors.json")
    parser.add_argument("--specs", nargs="+", default=list(SPECS))
    parser.add_argument("--rounds", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    rows = list(measure(options.directory, options.specs, options.rounds, options.seeds))
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
