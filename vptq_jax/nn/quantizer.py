"""Every linear layer of any module, quantized: rules by path, Hessians by path, a new module."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vptq_jax.array import VQArray
from vptq_jax.extras import progress_bar
from vptq_jax.format import Format
from vptq_jax.nn.einsum import VQEinsum
from vptq_jax.nn.hessians import Hessians
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.nn.surgery import contraction_of, kernel_of, linears, replace
from vptq_jax.quantization.metric import LastMetric
from vptq_jax.quantization.search import check_centroids, check_finite, quantize_weight, store
from vptq_jax.spec import QuantConfig, VQSpec

Model = TypeVar("Model", bound=nnx.Module)


def quantize_module(
    module: Model, config: QuantConfig | VQSpec | str, hessians: Hessians, *, progress: bool = False
) -> tuple[Model, list[dict[str, Any]]]:
    """Quantizes the dense linear layers of a module (`surgery.linears`) in the metric of their Hessians.

    Args:
        module: left as it is.
        config: specs by path, options, seed.
        hessians: from `collect.collect`, by the same paths. A matrix of a stack (an expert) that saw nothing counts
            all its inputs alike.
        progress: show a progress bar.

    Returns:
        A new module, codebooks in float16 where that is wide enough, and a row of facts for each layer: path, spec,
        features, bits, and the stats of `quantize_weight` (of a stack: their means).

    Raises:
        ValueError: before work starts: no layer is to be quantized, a rule matches none, a spec does not fit a layer,
            or a layer has no Hessian of its shape.
    """
    config = config if isinstance(config, QuantConfig) else QuantConfig(config)
    layers = {path: layer for path, layer in linears(module).items() if not isinstance(layer, VQLinear)}
    matrices = {path: contraction_of(layer).matrix(kernel_of(layer)) for path, layer in layers.items()}  # type: ignore[union-attr]
    specs = plan(config, {path: matrix.shape for path, matrix in matrices.items()}, hessians)
    new: dict[str, Any] = {}
    rows, metrics = [], LastMetric()
    with progress_bar(progress, total=len(specs), desc="Quantizing", unit="layer") as bar:
        for path, spec in specs.items():
            bar.set_postfix_str(path)
            array, stats = _quantized(path, matrices[path], hessians.for_module(path), spec, config, metrics)
            new[path] = _layer(layers[path], array)
            rows.append(operator_row(path, spec, array) | stats)
            bar.update()
    return replace(module, new), rows


def plan(
    config: QuantConfig, shapes: Mapping[str, tuple[int, ...]], hessians: Hessians | None = None
) -> dict[str, VQSpec]:
    """The spec of every layer that is to be quantized, by path.

    Args:
        config: specs by path.
        shapes: ([stack,] out_features, in_features) of every dense layer, by path.
        hessians: checked to fit, if given.

    Raises:
        ValueError: see `quantize_module`.
    """
    check_rules(config, shapes)
    specs = {path: spec for path in shapes if (spec := config.spec_for(path)) is not None}
    if not specs:
        raise ValueError(
            f"no layer has a spec: the default spec is None and no rule gives another one; there are "
            f"{', '.join(list(shapes)[:8]) or 'no linear layers'}"
        )
    problems = []
    for path, spec in specs.items():
        *stack, _, columns = shapes[path]
        problems += unfit(path, shapes[path], spec)
        if hessians is not None:
            expected = (*stack, columns, columns)
            if path not in hessians:
                problems.append(f"  {path}: there is no Hessian for it; collect them on this module")
            elif (found := np.shape(hessians.for_module(path))) != expected:
                problems.append(f"  {path}: its Hessian has shape {list(found)}; expected {list(expected)}")
    raise_unfit(problems)
    return specs


def unfit(path: str, shape: tuple[int, ...], spec: VQSpec) -> list[str]:
    """A line about a spec that does not fit a layer of a shape; nothing where it does."""
    try:
        check_centroids(Format.of(spec, shape[-2:]))
    except ValueError as error:
        return [f"  {path} {list(shape)} with spec {spec}: {error}"]
    return []


def raise_unfit(problems: list[str]) -> None:
    """Raises ValueError with all lines about layers that cannot be quantized, if there are any."""
    if problems:
        listed = problems[:20] + ["  ..."] * (len(problems) > 20)
        raise ValueError(f"{len(problems)} layers cannot be quantized as asked:\n" + "\n".join(listed))


def check_rules(config: QuantConfig, paths: Mapping[str, Any]) -> None:
    """Raises ValueError for a rule that matches no path; names what comes near it."""
    for pattern, _ in config.rules:
        if not any(re.search(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, 3, 0.3) or list(paths)[:3]
            raise ValueError(f"rule {pattern!r} matches no layer; near it are {', '.join(near) or 'none'}")


def _quantized(
    path: str,
    matrix: Array,
    hessian: Float[np.ndarray, "..."],
    spec: VQSpec,
    config: QuantConfig,
    metrics: LastMetric,
) -> tuple[VQArray, dict[str, Any]]:
    """One matrix, or a stack of them one after the other (they share a compiled program)."""
    if matrix.ndim == 2:
        return quantize_operator(path, matrix, hessian, spec, config, metrics)
    found = []
    for index, (part, metric) in enumerate(zip(matrix, hessian, strict=True)):
        seen = metric if np.trace(metric) > 0 else np.eye(len(metric), dtype=np.float32)
        found.append(quantize_operator(f"{path}[{index}]", part, seen, spec, config, metrics))
    stats = {name: float(np.mean([each[name] for _, each in found])) for name in ("error", "damping", "dead_columns")}
    return VQArray.stack([array for array, _ in found]), stats


def quantize_operator(
    path: str,
    weight: Float[Array, "out in"],
    hessian: Float[np.ndarray, "in in"],
    spec: VQSpec,
    config: QuantConfig,
    metrics: LastMetric,
) -> tuple[VQArray, dict[str, Any]]:
    """One matrix as a file takes it, and the stats of `quantize_weight` with the error of that form.

    `metrics` spares the factorization of a Hessian that the operator before had too.

    Raises:
        ValueError: see `quantize_weight`; or the stored form is not finite.
    """
    key = operator_key(config.seed, path)
    metric = metrics.of(hessian, weight.shape[-1], path, config.damping, spec.permute)
    array, stats = quantize_weight(weight, metric, spec, key=key, options=config, name=path)
    array, error, wide = store(array, jnp.asarray(weight), metric.H, stats["error"])
    check_finite(array, {"error": error}, path)
    return array, stats | {"error": error} | ({"wide": wide} if wide else {})


def operator_key(seed: int, path: str) -> Array:
    """The PRNG key of one operator: independent of the order of work and of all other operators."""
    name = hashlib.blake2b(path.encode(), digest_size=4).digest()
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(name, "little"))


def operator_row(path: str, spec: VQSpec, array: VQArray) -> dict[str, Any]:
    """What a report says of a quantized matrix, or of a stack of them, beside the stats of its search."""
    out_features, in_features = array.shape[-2:]
    return {
        "path": path,
        "spec": str(spec),
        "out_features": out_features,
        "in_features": in_features,
        "bits_nominal": array.format.nominal_bits,
        "bits_total": array.bits_per_weight,
    }


def _layer(dense: Any, weight: VQArray) -> VQLinear:
    bias = None if dense.bias is None else dense.bias.get_value()
    if isinstance(dense, Linear | nnx.Linear):
        return VQLinear(weight, bias)
    contraction = contraction_of(dense)
    assert contraction is not None
    return VQEinsum(weight, contraction, tuple(dense.kernel_shape), bias)
