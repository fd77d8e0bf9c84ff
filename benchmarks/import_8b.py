"""Imports a synthetic 8B-shaped checkpoint: time, peak memory, and optionally generation speed.

Makes a sharded checkpoint in the community's format with the shapes of Llama 3.1 8B, every linear
layer of the decoder at v8-k65536-256 (3 bits nominal), random contents, bfloat16; then loads it in a
process of its own and prints one JSON object. Random weights: only speed and finiteness count.

    python benchmarks/import_8b.py --directory /tmp/llama8b              # 4.8 GB; make it once, then import it
    python benchmarks/import_8b.py --directory /tmp/llama8b --layers 4   # a slice of it
    python benchmarks/import_8b.py --directory /tmp/llama8b --generate 128
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SPEC = "v8-k65536-256"
_SCALE = 0.02


def config(layers: int) -> Any:
    """Llama 3.1 8B, or its first layers."""
    from vptq_jax.lm.config import ModelConfig, RopeConfig

    rope = RopeConfig(500000.0, "llama3", 8.0, 8192)
    return ModelConfig(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=layers, num_heads=32,
        num_kv_heads=8, head_dim=128, rms_norm_eps=1e-5, rope=rope, max_position_embeddings=131072, bos_token_id=128000,
        eos_token_id=(128009,), dtype="bfloat16",
    )  # fmt: skip


def make(directory: Path, layers: int, spec: str, seed: int = 0) -> None:
    """Writes the checkpoint tensor by tensor; nothing but the largest tensor is ever in memory."""
    from vptq_jax.convert.export import MAX_SHARD_BYTES, plan_vptq
    from vptq_jax.convert.safetensors_writer import write_sharded
    from vptq_jax.files import new_directory

    plan = plan_vptq(_abstract(config(layers), spec))
    rng = np.random.default_rng(seed)
    tensors = {
        name: dataclasses.replace(tensor, read=lambda name=name, tensor=tensor: _contents(name, tensor, rng))
        for name, tensor in plan.tensors.items()
    }
    with new_directory(directory) as temporary:
        write_sharded(temporary, tensors, max_bytes=min(MAX_SHARD_BYTES, 2_000_000_000))
        (temporary / "config.json").write_text(json.dumps(plan.config, indent=1))


def _abstract(model_config: Any, spec: str) -> Any:
    from vptq_jax.array import VQArray
    from vptq_jax.format import Format
    from vptq_jax.lm.params import AbstractSource
    from vptq_jax.lm.registry import build
    from vptq_jax.nn.linear import VQLinear

    model = build(model_config, AbstractSource(ml_dtypes.bfloat16))
    for path, layer in model.linears().items():
        format = Format.of(spec, layer.shape)
        model.set_linear(path, VQLinear(VQArray.abstract(format, ml_dtypes.bfloat16)))
    return model


def _contents(name: str, tensor: Any, rng: np.random.Generator) -> np.ndarray:
    """Random bits for indices (every one of them is an index), small normal numbers, ones for norms and scales."""
    if name.endswith(".perm"):
        return rng.permutation(tensor.shape[0]).astype(np.uint16).view(np.int16)
    if name.endswith("indices"):
        bits = np.iinfo(tensor.dtype)
        return rng.integers(bits.min, bits.max, tensor.shape, tensor.dtype, endpoint=True)
    if name.endswith(("norm.weight", "weight_scale")):
        return np.ones(tensor.shape, tensor.dtype)
    if name.endswith("weight_bias"):
        return np.zeros(tensor.shape, tensor.dtype)
    result = np.empty(math.prod(tensor.shape), tensor.dtype)
    step = 1 << 24
    for start in range(0, result.size, step):
        part = result[start : start + step]
        part[:] = _SCALE * rng.standard_normal(part.size, np.float32)
    return result.reshape(tensor.shape)


class _PeakMemory:
    """The highest resident memory while the block runs, sampled; the kernel's own mark also counts what was before."""

    def __enter__(self) -> _PeakMemory:
        self.before = self.peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(directory: Path, tokens: int) -> dict[str, Any]:
    """Loads the checkpoint, and generates `tokens` tokens if asked to."""
    import jax

    from vptq_jax.convert.loading import load

    jax.devices()
    stored = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    with _PeakMemory() as memory:
        start, busy = time.perf_counter(), time.process_time()
        model = load(directory)
        jax.block_until_ready(jax.tree.leaves(model.module))
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
    row = {
        "device": jax.devices()[0].device_kind,
        "layers": model.config.num_layers,
        "stored_bytes": stored,
        "import_seconds": round(seconds, 2),
        "import_cpu_seconds": round(busy, 2),  # tells a busy machine from slow code
        "peak_host_bytes": memory.peak - memory.before,
        "peak_over_stored": round((memory.peak - memory.before) / stored, 3),
    }
    return row | _generate(model, tokens) if tokens else row


def _generate(model: Any, count: int) -> dict[str, Any]:
    from vptq_jax.lm.generation import generate

    prompt = list(range(1000, 1032))
    result = generate(model, prompt, max_new_tokens=count, stop_tokens=(), return_result=True)
    logits = np.asarray(model(np.asarray([prompt], np.int32)))
    return {
        "tokens_per_second": round(result.tokens_per_second, 2),
        "implementation": result.implementation,
        "logits_finite": bool(np.isfinite(logits).all()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the checkpoint is, or is to be made")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (32 make the 8B model)")
    parser.add_argument("--spec", default=SPEC, help="format of the linear layers")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="also generate N tokens")
    parser.add_argument("--measure-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_only:
        print(json.dumps(measure(options.directory, options.generate)))
        return
    if not options.directory.exists():
        start = time.perf_counter()
        make(options.directory, options.layers, options.spec)
        print(f"made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    # In a process of its own, so that making the checkpoint does not count.
    command = [sys.executable, __file__, "--measure-only", "--directory", str(options.directory)]
    subprocess.run([*command, "--generate", str(options.generate)], check=True)


if __name__ == "__main__":
    main()
