"""Products with packed weights beside dense ones, as a Markdown table; `--tune` sweeps the kernel's configuration.

python benchmarks/matmul.py --rows 1 8 64 2048
python benchmarks/matmul.py --tune --specs v8-k256-256 --shapes 14336x4096
"""

from __future__ import annotations

import argparse
import itertools

import jax
import jax.numpy as jnp

from vptq_jax.cli import benchmarking as bench
from vptq_jax.pallas.vq_matmul import mosaic
from vptq_jax.pallas.vq_matmul.dequantize import DecodeConfig
from vptq_jax.pallas.vq_matmul.plan import MAX_ROWS, Config

SPECS = ["v8-k256-256", "v8-k4096", "v6-k4096", "v8-k4096-4096", "v12-k4096-4096", "v8-k65536", "v8-k65536-256"]
SHAPES = ["14336x4096", "4096x14336", "4096x4096", "1024x4096"]


def print_table(specs: list[str], shapes: list[tuple[int, int]], rows: list[int]) -> None:
    """Microseconds of the product's kernel (of all its launches) by shape and rows, one column a format."""
    print("| out x in, rows | " + " | ".join(["bf16", *specs]) + " |")
    print("|---" * (len(specs) + 2) + "|", flush=True)
    for shape in shapes:
        times = {(t.rows, t.spec): t for t in bench.bench_matmul(specs, [shape], rows)}
        for count in rows:
            found = [times[count, spec] for spec in ("bf16", *specs)]
            values = " | ".join(f"{t.microseconds:.1f} ({t.total_microseconds:.1f})" for t in found)
            print(f"| {shape[0]} x {shape[1]}, {count} | {values} |", flush=True)


def tune(spec: str, shape: tuple[int, int], rows: int) -> list[tuple[float, Config]]:
    """Every configuration of a small sweep with its microseconds, fastest first.

    For up to 64 rows the time of the kernel, for more that of decoding and dense product.
    """
    x = jax.random.normal(jax.random.key(0), (rows, shape[1]), jnp.bfloat16)
    weights = bench.packed_weights(spec, *shape, jnp.bfloat16, seed=0)
    blocks = mosaic.dispatch.num_processors()
    if rows <= MAX_ROWS:
        sweep = itertools.product((1, 2, 4, 8, 16), (1, 2), (1024, 4096))
        configs = [Config(blocks, *values) for values in sweep]
    else:
        sweep = itertools.product((1, 2), (4, 8, 16))
        configs = [DecodeConfig(n * blocks, team=team) for n, team in sweep]
    found = []
    for config in configs:
        run = bench.product_of_each(lambda x, w, config=config: mosaic.matmul(x, [w], config)[0], x, weights)
        found.append((bench.product_time(run, len(weights))[0 if rows <= MAX_ROWS else 1], config))
    return sorted(found, key=lambda pair: pair[0])


def main() -> None:
    """Parses the arguments and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=[1])
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    shapes = [(int(out), int(columns)) for out, columns in (shape.split("x") for shape in arguments.shapes)]
    print(bench.environment())
    if not arguments.tune:
        print_table(arguments.specs, shapes, arguments.rows)
        return
    for spec, shape, rows in itertools.product(arguments.specs, shapes, arguments.rows):
        for time, config in tune(spec, shape, rows)[:3]:
            print(f"{spec} {shape} {rows} rows: {time:.2f} us {config}")


if __name__ == "__main__":
    main()
