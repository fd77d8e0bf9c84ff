"""Quantizes one full block of a large model and extrapolates to the whole: seconds, Hessians apart.

    python benchmarks/quantize_block.py --shape llama2-7b --spec v6-k4096

Random weights; Hessians of correlated inputs of unequal size. The block is quantized twice: the first time compiles.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax

import vptq_jax as vq
from vptq_jax.cli import benchmarking as bench


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama2-7b", choices=sorted(bench.SHAPES))
    parser.add_argument("--spec", default="v6-k4096")
    options = parser.parse_args()
    config = bench.model_config(options.shape)
    model = bench.random_model(dataclasses.replace(config, num_layers=1, vocab_size=32), None)
    layers = model.linears()
    keys = jax.random.split(jax.random.key(1), len(layers))
    hessians = {
        path: jax.device_get(bench.random_hessian(key, layer.shape[1]))
        for key, (path, layer) in zip(keys, layers.items(), strict=True)
    }
    given = vq.Hessians(hessians, {path: {path: ""} for path in layers}, tokens=1)
    print(bench.environment())
    for run in ("first", "second"):
        _, report = vq.quantize(model, options.spec, given, progress=False)
        seconds = report.seconds["total"]
        print(
            f"{run} run: {seconds:.1f} s a block of {options.shape} at {options.spec}, "
            f"{seconds * config.num_layers / 60:.1f} minutes for {config.num_layers} blocks",
            flush=True,
        )
        for row in report.operators:
            print(f"  {row['path']} {row['seconds']:.2f} s, error {row['error']:.4f}", flush=True)


if __name__ == "__main__":
    main()
