"""Measured speed on the device at hand: one product, a whole decode loop, one quantization.

Times of products are device times from the profiler; host clocks would add the launch.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vptq_jax.array import VQArray
from vptq_jax.format import Format
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.params import DenseSource
from vptq_jax.nn.inference import inference_form
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.pallas import dispatch
from vptq_jax.pallas.vq_matmul import choose_order, pack, vq_matmul
from vptq_jax.spec import SearchOptions, VQSpec

_CACHE_BYTES = 150_000_000  # Weights of one measurement take more, so that none stays in a GPU's L2.
_MOST_WEIGHTS = 256
_TRACED_RUNS = 5

SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32},
    "llama2-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_layers": 40, "num_heads": 40},
    "llama2-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_layers": 80, "num_heads": 64, "num_kv_heads": 8,
    },
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8,
        "vocab_size": 128256,
    },
    "mistral-7b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3,
        "vocab_size": 49152,
    },
}  # fmt: skip


def model_config(shape: str) -> ModelConfig:
    """A model's shape by name, one of `SHAPES`.

    Raises:
        ValueError: no such name.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; expected one of {', '.join(SHAPES)}")
    facts = {"vocab_size": 32000, "model_type": "llama", "max_position_embeddings": 4096, **SHAPES[shape]}
    facts.setdefault("num_kv_heads", facts["num_heads"])
    return ModelConfig(head_dim=facts["hidden_size"] // facts["num_heads"], **facts)


def environment() -> dict[str, str]:
    """Device and versions, to be written beside every figure."""
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


@dataclasses.dataclass(frozen=True)
class MatmulTime:
    """One product `x @ w.T`.

    Attributes:
        spec: of the weight, or "bf16" for a dense product.
        out_features, in_features, rows: shape of the product.
        microseconds: median device time of the product's main kernel.
        total_microseconds: device time of everything the product launches.
        bytes: of the weight on the device.
    """

    spec: str
    out_features: int
    in_features: int
    rows: int
    microseconds: float
    total_microseconds: float
    bytes: int

    @property
    def gigabytes_per_second(self) -> float:
        """Weight bytes over the main kernel's time."""
        return self.bytes / self.microseconds / 1e3


@dataclasses.dataclass(frozen=True)
class DecodeSpeed:
    """One run of the library's own decode loop.

    Attributes:
        shape, spec, batch, new_tokens: what ran; spec "bf16" is the dense model.
        tokens_per_second: over all rows.
        model_bytes: of all parameters; `cache_bytes` of keys and values.
        resident_bytes: device memory in use beside the cache, None where the device does not say.
        compile_seconds: prefill and decode programs, first call.
    """

    shape: str
    spec: str
    batch: int
    new_tokens: int
    tokens_per_second: float
    model_bytes: int
    cache_bytes: int
    resident_bytes: int | None
    compile_seconds: float


def bench_matmul(
    specs: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int] = (1,),
    *,
    dtype: Any = jnp.bfloat16,
    seed: int = 0,
) -> list[MatmulTime]:
    """Times products with random weights, and the dense product of the same shape in the same run.

    Args:
        specs: specs of the weights; the dense product is always among the results.
        shapes: (out_features, in_features).
        rows: rows of x.
        dtype: of activations and codebooks.
        seed: of the random weights.
    """
    _check_profiler()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Compiling takes far longer than running.
        return [time for shape in shapes for time in _shape_times(pool, ("bf16", *specs), shape, rows, dtype, seed)]


def _shape_times(
    pool: Executor, specs: Sequence[str], shape: tuple[int, int], rows: Sequence[int], dtype: Any, seed: int
) -> list[MatmulTime]:
    def weights(spec: str) -> list[Any]:
        return _dense_weights(*shape, dtype, seed) if spec == "bf16" else packed_weights(spec, *shape, dtype, seed)

    def program(case: tuple[str, int]) -> Callable[[], Any]:
        spec, count = case
        x = jax.random.normal(jax.random.key(seed), (count, shape[1]), dtype)
        return product_of_each(_dense if spec == "bf16" else vq_matmul, x, made[spec])

    made = dict(zip(specs, pool.map(weights, specs), strict=True))
    cases = [(spec, count) for spec in specs for count in rows]
    times = []
    for (spec, count), run in zip(cases, pool.map(program, cases), strict=True):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(made[spec])) // len(made[spec])
        times.append(MatmulTime(spec, *shape, count, *product_time(run, len(made[spec])), size))
    return times


def bench_decode(
    shape: str,
    specs: Sequence[str],
    *,
    batches: Sequence[int] = (1,),
    new_tokens: int = 256,
    dtype: Any = jnp.bfloat16,
    dense: bool = True,
    seed: int = 0,
) -> list[DecodeSpeed]:
    """Times the decode loop of random models: one prompt token, then `new_tokens` (the paper's measurement).

    Args:
        shape: one of `SHAPES`.
        specs: specs of the decoder's linear layers.
        batches: rows decoded together.
        new_tokens: tokens generated.
        dtype: of activations, codebooks and dense weights.
        dense: also run the dense model, first.
        seed: of the random weights.
    """
    config = model_config(shape)
    speeds = []
    for spec in (*(["bf16"] if dense else []), *specs):
        model = random_model(config, None if spec == "bf16" else spec, dtype, seed)
        speeds += [_decode_speed(model, shape, spec, batch, new_tokens) for batch in batches]
        del model
        gc.collect()
    return speeds


def bench_quantize(
    specs: Sequence[str], out_features: int, in_features: int, *, seed: int = 0, options: SearchOptions | None = None
) -> list[dict[str, Any]]:
    """Times `quantize_weight` on a random weight and Hessian, twice: only the first run compiles.

    Returns:
        one row a spec: spec, first_seconds, and of the second run seconds, weights_per_second and the relative
        proxy error.
    """
    from vptq_jax.quantization.search import quantize_weight

    keys = jax.random.split(jax.random.key(seed), 3)
    weight = 0.02 * jax.random.normal(keys[0], (out_features, in_features))
    hessian = random_hessian(keys[1], in_features)
    rows = []
    for spec in specs:
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            array, stats = quantize_weight(weight, hessian, spec, key=keys[2], options=options or SearchOptions())
            jax.block_until_ready(array)
            seconds.append(time.perf_counter() - begin)
        first, second = seconds
        speed = out_features * in_features / second
        rows.append(
            {
                "spec": spec,
                "first_seconds": first,
                "seconds": second,
                "weights_per_second": speed,
                "error": stats["error"],
            }
        )
    return rows


def device_times(run: Callable[[], Any], repeats: int = _TRACED_RUNS) -> dict[str, list[float]]:
    """Device time of every kernel that `run` launches, in microseconds by kernel name, over `repeats` calls.

    Raises:
        NotImplementedError: the default device is no GPU; its profiler names no kernels.
    """
    _check_profiler()
    jax.block_until_ready(run())
    times: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                result = run()
            jax.block_until_ready(result)
        trace = next(Path(folder).rglob("*.xplane.pb"))
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        times[event.name].append(event.duration_ns / 1e3)
    return dict(times)


def _check_profiler() -> None:
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"device times need a GPU; the default device is {jax.default_backend()!r}")


@functools.partial(jax.jit, static_argnums=1)
def random_hessian(key: Array, features: int) -> Array:
    """Second moment, float32 [features, features], of correlated inputs whose sizes differ as a real layer's do."""
    keys = jax.random.split(key, 4)
    common = jax.random.normal(keys[0], (2 * features, 64)) @ jax.random.normal(keys[1], (64, features)) / 8
    inputs = (jax.random.normal(keys[2], common.shape) + common) * jnp.exp(jax.random.normal(keys[3], (features,)))
    return jnp.dot(inputs.T, inputs, precision=jax.lax.Precision.HIGHEST) / len(inputs)


def random_model(config: ModelConfig, spec: str | None, dtype: Any = jnp.bfloat16, seed: int = 0) -> Any:
    """A decoder with random weights made on the device, dense or quantized, in kernel order where a kernel runs."""
    from vptq_jax.lm.registry import build

    model = build(config, _RandomSource(jax.random.key(seed), dtype, spec))
    return inference_form(model, donate=True)


class _RandomSource(DenseSource):
    """Random parameters made on the device; decoder layers packed at once, so that no dense copy ever exists."""

    def __init__(self, key: Array, dtype: Any, spec: str | None):
        self.key, self.dtype = key, dtype
        self.spec = None if spec is None else VQSpec.parse(spec)
        self._count = 0

    def _next_key(self) -> Array:
        self._count += 1
        return jax.random.fold_in(self.key, self._count)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        """Ones for norms, normal values otherwise."""
        if name.endswith("norm.weight"):
            return jnp.ones(shape, self.dtype)
        return _normal(self._next_key(), shape, jnp.dtype(self.dtype))

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool) -> Linear | VQLinear:
        """A quantized layer inside the decoder, a dense one elsewhere."""
        if self.spec is None or not name.endswith("_proj"):
            return super().linear(name, out_features, in_features, bias=bias)
        format = Format.of(self.spec, (out_features, in_features))
        weight = _random_weight(self._next_key(), format, jnp.dtype(self.dtype))
        return VQLinear(weight, self.tensor(f"{name}.bias", (out_features,)) if bias else None)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return (0.02 * jax.random.normal(key, shape, dtype)).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_weight(key: Array, format: Format, dtype: Any) -> VQArray:
    return VQArray.random(key, format, dtype)


def packed_weights(spec: str, out_features: int, in_features: int, dtype: Any, seed: int) -> list[Any]:
    """Random weights, enough that a run over all of them finds none in L2; in kernel order where a kernel runs."""
    format = Format.of(spec, (out_features, in_features))
    size = int(format.nominal_bits * out_features * in_features / 8)
    keys = jax.random.split(jax.random.key(seed), _rotation(size))
    weights = [_random_weight(key, format, jnp.dtype(dtype)) for key in keys]
    if dispatch.why_no_mosaic():
        return weights
    return [pack(weight, choose_order([format]), dtype=dtype) for weight in weights]


def _dense_weights(out_features: int, in_features: int, dtype: Any, seed: int) -> list[Array]:
    keys = jax.random.split(jax.random.key(seed), _rotation(2 * out_features * in_features))
    return [_normal(key, (out_features, in_features), dtype) for key in keys]


def _rotation(size: int) -> int:
    """How many weights of a size are more than L2 holds, as far as one program can hold the products."""
    return min(1 + _CACHE_BYTES // size, _MOST_WEIGHTS)


def _dense(x: Array, weight: Array) -> Array:
    return jnp.einsum("mi,oi->mo", x, weight)


def product_of_each(product: Callable[[Array, Any], Array], x: Array, weights: list[Any]) -> Callable[[], Any]:
    """A compiled program without arguments: one product with each of the weights, one after the other."""

    def products(x: Array, weights: list[Any]) -> list[Array]:
        done = []
        for weight in weights:
            # Behind the last product x is another value to XLA, which merges dense products of one value.
            x, y = jax.lax.optimization_barrier((x, product(x, weight)))
            done.append(y)
        return done

    run = jax.jit(products).lower(x, weights).compile()
    return lambda: run(x, weights)


def product_time(run: Callable[[], Any], products: int) -> tuple[float, float]:
    """Microseconds of the longest kernel of a product (median), and of all its kernels.

    Args:
        run: what `product_of_each` gave.
        products: how many products it runs.
    """
    times = device_times(run)
    longest = max(times.values(), key=sum)
    launches = max(1, round(len(longest) / _TRACED_RUNS / products))
    total = sum(map(sum, times.values())) / _TRACED_RUNS / products
    return float(np.median(longest)) * launches, total


def _decode_speed(model: Any, shape: str, spec: str, batch: int, new_tokens: int) -> DecodeSpeed:
    from vptq_jax.lm.generation import generate

    def run(tokens: int) -> Any:
        return generate(model, [[1]] * batch, max_new_tokens=tokens, stop_tokens=(), return_result=True)

    begin = time.perf_counter()
    run(new_tokens)
    compile_seconds = time.perf_counter() - begin
    results = sorted((run(new_tokens) for _ in range(3)), key=lambda result: result.tokens_per_second)
    memory = jax.devices()[0].memory_stats() or {}
    config = model.config
    return DecodeSpeed(
        shape=shape,
        spec=spec,
        batch=batch,
        new_tokens=new_tokens,
        tokens_per_second=results[1].tokens_per_second,
        model_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(model)),
        cache_bytes=2 * config.num_layers * batch * config.num_kv_heads * (new_tokens + 1) * config.head_dim * 2,
        resident_bytes=memory.get("bytes_in_use"),
        compile_seconds=compile_seconds,
    )
