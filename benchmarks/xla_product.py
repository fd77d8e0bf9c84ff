"""The portable product beside the dense one and the oracle, and the decode loop of a small model, on the host's CPU.

python benchmarks/xla_product.py --specs v8-k256-256 v2-k256
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vptq_jax.cli import benchmarking as bench
from vptq_jax.pallas import vq_matmul
from vptq_jax.spec import VQSpec


def milliseconds(function: Callable[[], jax.Array]) -> float:
    """Median of eleven calls after two."""
    times = []
    for _ in range(13):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def main() -> None:
    """Parses the arguments and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--specs", nargs="+", default=["v8-k256-256", "v6-k4096", "v2-k256", "v8-k65536-256"])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    size, key = arguments.size, jax.random.key(0)
    x, dense = jax.random.normal(key, (1, size)), jax.random.normal(key, (size, size))
    product = jax.jit(lambda x, w: jnp.einsum("ri,oi->ro", x, w))
    print(bench.environment())
    print(f"| {size} x {size}, one row | ms | oracle ms |\n|---|---|---|")
    print(f"| dense float32 | {milliseconds(lambda: product(x, dense)):.1f} | |")
    for spec in arguments.specs:
        weight = bench.random_weight(VQSpec.parse(spec).layout(size, size), key, jnp.float32)
        times = []
        for implementation in ("xla", "reference"):
            run = jax.jit(lambda x, w, name=implementation: vq_matmul(x, w, implementation=name))
            times.append(milliseconds(lambda run=run, weight=weight: run(x, weight)))
        print(f"| {spec} | {times[0]:.1f} | {times[1]:.1f} |", flush=True)
    print("\n| SmolLM2-135M shape | tokens/s |\n|---|---|")
    for speed in bench.bench_decode(
        "smollm2-135m", ["v2-k256", "v8-k256-256"], new_tokens=arguments.tokens, dtype=jnp.float32
    ):
        print(f"| {speed.spec} | {speed.tokens_per_second:.1f} |")


if __name__ == "__main__":
    main()
