"""The entry points of the op: checks, the choice of an implementation, and the derivative."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vptq_jax.array import VQArray
from vptq_jax.pallas import device
from vptq_jax.pallas.vq_matmul import layout, mosaic, reference, xla
from vptq_jax.pallas.vq_matmul.layout import KernelArray
from vptq_jax.pallas.vq_matmul.norm import RMS

Implementation = Literal["reference", "xla", "mosaic"]
Weight: TypeAlias = VQArray | KernelArray

_logger = logging.getLogger(__name__)
_FLOATS = ("codebook", "res_codebook", "outlier_codebook", "scale", "offset")


def vq_matmul(
    x: Float[Array, "*batch in"], weight: Weight, *, implementation: Implementation | None = None, out_dtype: Any = None
) -> Float[Array, "*batch out"]:
    """`x @ weight.dequantize().T`, differentiable in x, codebooks, scale and offset.

    Args:
        x: activations [..., in_features], any float dtype.
        weight: the quantized weight; a `KernelArray` (see `relayout`) for the GPU kernels.
        implementation: None picks by device and weight; "xla" runs everywhere; "mosaic" is the kernel for Hopper GPUs
            (a `VQArray` is laid out anew at each call); "reference" dequantizes and multiplies, to test the others.
        out_dtype: dtype of the result, such as float32 for logits or before a bias; None takes that of x.

    Returns:
        [..., out_features]; products accumulate in float32 and are rounded once.

    Raises:
        ValueError: x does not fit the weight, or is not floating point.
        NotImplementedError: the implementation asked for cannot run here; the message says why.
    """
    return vq_matmuls(x, (weight,), implementation=implementation, out_dtype=out_dtype)[0]


def vq_matmuls(
    x: Float[Array, "*batch in"],
    weights: Sequence[Weight],
    *,
    norm: RMS | None = None,
    implementation: Implementation | None = None,
    out_dtype: Any = None,
) -> tuple[Float[Array, "*batch out"], ...]:
    """`vq_matmul` of one x with several weights (q/k/v, gate/up): one kernel launch where they are alike.

    Args, returns and errors are those of `vq_matmul`, and `norm`, which is applied to x first: by the
    kernel itself where it stages x (few rows). Weights are alike when they share spec, in_features and
    kernel order.
    """
    for weight in weights:
        _check(x, weight)
    if norm is not None and norm.weight.shape != x.shape[-1:]:
        raise ValueError(f"norm.weight has shape {norm.weight.shape}; expected in_features = {x.shape[-1]}")
    if implementation is not None and implementation not in get_args(Implementation):
        names = ", ".join(map(repr, get_args(Implementation)))
        raise NotImplementedError(f"implementation {implementation!r} does not exist; choose None or one of {names}")
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    rows = math.prod(x.shape[:-1])
    reasons = [_why_not_mosaic(x, weight, rows) for weight in weights]
    reason = next((reason for reason in reasons if reason), None)
    if implementation == "mosaic":
        if reason:
            raise NotImplementedError(f"implementation 'mosaic' cannot run: {reason}")
        prepared = [
            weight if isinstance(weight, KernelArray) else layout.relayout(weight, dtype=x.dtype) for weight in weights
        ]
        return _matmuls(x, prepared, norm, out_dtype)
    in_kernel_order = [weight for weight in weights if isinstance(weight, KernelArray)]
    if implementation is None and not reason and len(in_kernel_order) == len(weights):
        _log_choice("mosaic", "the weight is in kernel order and the device runs the kernels")
        return _matmuls(x, in_kernel_order, norm, out_dtype)
    if implementation is None:
        _log_choice("xla", reason or "the weight is in checkpoint order")
    product = reference.vq_matmul if implementation == "reference" else xla.vq_matmul
    return _portable(product, x, norm, weights, out_dtype)


def _check(x: Array, weight: Weight) -> None:
    if x.ndim < 1 or x.shape[-1] != weight.layout.in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its last axis must be in_features = {weight.layout.in_features}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; expected a floating-point dtype")


def _why_not_mosaic(x: Array, weight: Weight, rows: int) -> str | None:
    reason = device.why_no_mosaic() or layout.unsupported(weight.layout, x.dtype)
    if reason:
        return reason
    if isinstance(weight, KernelArray) and x.dtype != weight.dtype:
        return f"x is {x.dtype} but the weight was laid out for {weight.dtype}"
    return "there are no rows to multiply" if rows == 0 else None


@functools.cache
def _log_choice(implementation: str, reason: str) -> None:
    _logger.info("vq_matmul runs as %r: %s", implementation, reason)


def _portable(
    product: Callable[..., Array], x: Array, norm: RMS | None, weights: Sequence[Weight], out_dtype: np.dtype
) -> tuple[Array, ...]:
    x = x if norm is None else norm(x)
    in_checkpoint_order = (layout.restore(weight) if isinstance(weight, KernelArray) else weight for weight in weights)
    return tuple(product(x, weight, out_dtype=out_dtype) for weight in in_checkpoint_order)


def _matmuls(x: Array, weights: Sequence[KernelArray], norm: RMS | None, out_dtype: np.dtype) -> tuple[Array, ...]:
    flat = x.reshape(-1, x.shape[-1])
    floats = tuple(tuple(getattr(weight, name) for name in _FLOATS) for weight in weights)
    if mosaic.one_launch(weights):
        products = _differentiable(out_dtype, flat, norm, floats, tuple(weights))
    else:
        flat = flat if norm is None else norm(flat)
        products = tuple(
            _differentiable(out_dtype, flat, None, floats[i : i + 1], (weight,))[0] for i, weight in enumerate(weights)
        )
    return tuple(product.reshape(*x.shape[:-1], -1) for product in products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(
    out_dtype: np.dtype, x: Array, norm: RMS | None, floats: Any, weights: tuple[KernelArray, ...]
) -> tuple[Array, ...]:
    """The kernel's product; `floats` are the parameters among the leaves of `weights`, named for the derivative."""
    return _batchable(out_dtype)(x, norm, weights)


def _forward(
    out_dtype: np.dtype, x: Array, norm: RMS | None, floats: Any, weights: tuple[KernelArray, ...]
) -> tuple[tuple[Array, ...], Any]:
    return _batchable(out_dtype)(x, norm, weights), (x, norm, floats, weights)


def _backward(out_dtype: np.dtype, residuals: Any, cotangents: tuple[Array, ...]) -> tuple[Array, Any, Any, None]:
    x, norm, floats, weights = residuals

    def products(x: Array, norm: RMS | None, floats: Any) -> tuple[Array, ...]:
        replaced = [
            dataclasses.replace(weight, **dict(zip(_FLOATS, values, strict=True)))
            for weight, values in zip(weights, floats, strict=True)
        ]
        return _portable(xla.vq_matmul, x, norm, replaced, out_dtype)

    return *jax.vjp(products, x, norm, floats)[1](cotangents), None


_differentiable.defvjp(_forward, _backward)


@functools.cache
def _batchable(out_dtype: np.dtype) -> Callable[..., tuple[Array, ...]]:
    """The kernel's product for results of a dtype: rows of a batch become rows of one product."""

    @jax.custom_batching.custom_vmap
    def product(x: Array, norm: RMS | None, weights: tuple[KernelArray, ...]) -> tuple[Array, ...]:
        return tuple(y.astype(out_dtype) for y in mosaic.matmul(x, weights, norm=norm, out_dtype=out_dtype))

    @product.def_vmap
    def batched(
        size: int, in_batched: Any, x: Array, norm: RMS | None, weights: tuple[KernelArray, ...]
    ) -> tuple[Any, Any]:
        x_batched, *others_batched = in_batched
        outputs = (True,) * len(weights)
        if not any(jax.tree.leaves(others_batched)):
            products = product(x.reshape(-1, x.shape[-1]), norm, weights)
            return tuple(y.reshape(size, x.shape[1], -1) for y in products), outputs

        def one(i: Array) -> tuple[Array, ...]:
            def take(leaf: Array, batched: bool) -> Array:
                return leaf[i] if batched else leaf

            return product(take(x, x_batched), *jax.tree.map(take, [norm, weights], others_batched))

        return jax.lax.map(one, jnp.arange(size)), outputs

    return product
