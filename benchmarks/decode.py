"""The library's own decode loop on random models, as a Markdown table.

python benchmarks/decode.py --shape llama2-7b --specs v8-k256-256 v6-k4096 --batches 1 8
"""

from __future__ import annotations

import argparse

from vptq_jax.cli import benchmarking as bench


def main() -> None:
    """Parses the arguments and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama2-7b", choices=list(bench.SHAPES))
    parser.add_argument("--specs", nargs="*", default=["v8-k256-256"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--no-dense", action="store_true", help="leave out the bf16 model")
    arguments = parser.parse_args()
    print(bench.environment())
    print("| shape, spec | batch | tokens/s | model GB | cache GB |\n|---|---|---|---|---|")
    speeds = bench.bench_decode(
        arguments.shape,
        arguments.specs,
        batches=arguments.batches,
        new_tokens=arguments.tokens,
        dense=not arguments.no_dense,
    )
    for s in speeds:
        sizes = f"{s.model_bytes / 1e9:.2f} | {s.cache_bytes / 1e9:.2f}"
        print(f"| {s.shape}, {s.spec} | {s.batch} | {s.tokens_per_second:.0f} | {sizes} |")


if __name__ == "__main__":
    main()
