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
from vptq_jax.format import Format
from vptq_jax.pallas import vq_matmul


def milliseconds(*functions: Callable[[], jax.Array], calls: int = 25) -> list[float]:
    """Median time of each, called in turn, so that what else the machine does falls on all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for call in range(calls + 2):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            if call >= 2:
                own.append(time.perf_counter() - start)
    return [1e3 * statistics.median(own) for own in times]


def main() -> None:
    """Parses the arguments and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--specs", nargs="+", default=["v8-k256-256", "v8-k4096", "v6-k4096", "v8-k65536", "v2-k256"])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    size, key = arguments.size, jax.random.key(0)
    x, dense = jax.random.normal(key, (1, size)), jax.random.normal(key, (size, size))
    product = jax.jit(lambda x, w: jnp.einsum("ri,oi->ro", x, w))
    print(bench.environment())
    print(f"| {size} x {size}, one row | ms | dense ms | ratio | oracle ms |\n|---|---|---|---|---|")
    for spec in arguments.specs:
        weight = VQArray.random(key, Format.of(spec, (size, size)), jnp.float32)
        run, oracle = (
            jax.jit(lambda x, w, name=implementation: vq_matmul(x, w, implementation=name))
            for implementation in ("xla", "reference")
        )
        here, beside = milliseconds(lambda run=run, weight=weight: run(x, weight), lambda: product(x, dense))
        (slow,) = milliseconds(lambda oracle=oracle, weight=weight: oracle(x, weight), calls=1)
        print(f"| {spec} | {here:.1f} | {beside:.1f} | {here / beside:.2f} | {slow:.0f} |", flush=True)
    print("\n| SmolLM2-135M shape | tokens/s |\n|---|---|")
    for speed in bench.bench_decode(
        "smollm2-135m", ["v2-k256", "v8-k256-256"], new_tokens=arguments.tokens, dtype=jnp.float32
    ):
        print(f"| {speed.spec} | {speed.tokens_per_second:.1f} |")


if __name__ == "__main__":
    main()
