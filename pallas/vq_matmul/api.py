"""The entry points of the op: checks, the choice of an implementation, and the derivative."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from vptq_jax.array import VQArray
from vptq_jax.meshes import automatic, spec_of
from vptq_jax.pallas import dispatch
from vptq_jax.pallas.partition import over_rows
from vptq_jax.pallas.vq_matmul import mosaic, packed, reference, xla
from vptq_jax.pallas.vq_matmul.norm import RMS
from vptq_jax.pallas.vq_matmul.packed import Packed

Implementation = Literal["reference", "xla", "mosaic"]
Weight: TypeAlias = VQArray | Packed


def vq_matmul(
    x: Float[Array | np.ndarray, "*batch in"],
    weight: Weight,
    *,
    implementation: Implementation | None = None,
    out_dtype: Any = None,
) -> Float[Array, "*batch out"]:
    """`x @ weight.dequantize().T`, differentiable in x; with a `VQArray` in codebooks, scale and offset too.

    Args:
        x: activations [..., in_features], any float dtype. Kernels read float32 as bfloat16.
        weight: the quantized weight; a `Packed` (see `pack`) for the GPU kernels.
        implementation: None picks by device and weight, and warns once where a kernel could be expected and does not
            run; "xla" runs everywhere; "mosaic" is the kernel for Hopper GPUs (a `VQArray` is packed anew at each
            call); "reference" dequantizes and multiplies, to test the others.
        out_dtype: dtype of the result, such as float32 for logits or before a bias; None takes that of x.

    Returns:
        [..., out_features]; products accumulate in float32 and are rounded once.

    Raises:
        ValueError: x does not fit the weight, or is not floating point.
        NotImplementedError: the implementation asked for cannot run here; the message says why.
        TypeError: a gradient with respect to a `Packed` weight is asked for, which has none.

    Example:
        >>> from vptq_jax.format import Format
        >>> weight = VQArray.random(jax.random.key(0), Format.of("v8-k256-256", (64, 32)))
        >>> x = jax.random.normal(jax.random.key(1), (3, 32))
        >>> y = vq_matmul(x, weight)
        >>> y.shape, y.dtype, bool(jnp.allclose(y, x @ weight.dequantize().T, atol=1e-4))
        ((3, 64), dtype('float32'), True)
    """
    return vq_matmuls(x, (weight,), implementation=implementation, out_dtype=out_dtype)[0]


def vq_matmuls(
    x: Float[Array | np.ndarray, "*batch in"],
    weights: Sequence[Weight],
    *,
    norm: RMS | None = None,
    implementation: Implementation | None = None,
    out_dtype: Any = None,
) -> tuple[Float[Array, "*batch _out"], ...]:
    """`vq_matmul` of one x with several weights (q/k/v, gate/up): one kernel launch where they are alike.

    Args, returns and errors are those of `vq_matmul`, and `norm`, which is applied to x first: by the
    kernel itself where it stages x (few rows). Weights are alike when they share spec, in_features and
    kernel order.
    """
    x = jnp.asarray(x)
    for weight in weights:
        _check(x, weight)
    if norm is not None and norm.weight.shape != x.shape[-1:]:
        raise ValueError(f"norm.weight has shape {norm.weight.shape}; expected in_features = {x.shape[-1]}")
    if implementation is not None and implementation not in get_args(Implementation):
        names = ", ".join(map(repr, get_args(Implementation)))
        raise NotImplementedError(f"implementation {implementation!r} does not exist; choose None or one of {names}")
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    rows = math.prod(x.shape[:-1])
    if implementation in ("xla", "reference"):
        product = reference.vq_matmul if implementation == "reference" else xla.vq_matmul
        return _portable(product, x, norm, weights, out_dtype)
    ahead = implementation == "mosaic" and _all_traced(x, weights)
    reasons = [_why_not_mosaic(x, weight, rows, ahead) for weight in weights]
    reason = next((reason for reason in reasons if reason), None)
    in_kernel_order = [weight for weight in weights if isinstance(weight, Packed)]
    if implementation == "mosaic":
        if reason:
            raise NotImplementedError(f"implementation 'mosaic' cannot run: {reason}")
        ready = [weight if isinstance(weight, Packed) else packed.pack(weight, dtype=x.dtype) for weight in weights]
        return _matmuls(x, ready, norm, out_dtype)
    if not reason and len(in_kernel_order) == len(weights):
        return _matmuls(x, in_kernel_order, norm, out_dtype)
    if rows:
        if in_kernel_order:
            dispatch.warn_fallback("vq_matmul of a packed weight", reason or "others beside it are not packed", _UNPACK)
        elif dispatch.why_no_mosaic(dispatch.devices_of(x, weights)) is None:
            dispatch.warn_fallback("vq_matmul", reason or "the weight is a VQArray", _PACK)
    return _portable(xla.vq_matmul, x, norm, weights, out_dtype)


_PACK = "pack(weight, dtype=jnp.bfloat16) once for the kernel, or choose implementation='xla'"
_UNPACK = "unpack(weight), which XLA reads faster, or change what the reason names"


def _all_traced(*arguments: Any) -> bool:
    """Whether no array is bound to a device yet, as when a program is lowered for another machine."""
    return all(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))


def _check(x: Array, weight: Weight) -> None:
    if x.ndim < 1 or x.shape[-1] != weight.format.in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its last axis must be in_features = {weight.format.in_features}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; expected a floating-point dtype")


def _why_not_mosaic(x: Array, weight: Weight, rows: int, ahead: bool = False) -> str | None:
    """Why no kernel runs, or None; `ahead`: whatever machine the program is for has the device."""
    if not (ahead and isinstance(weight, Packed)) and (
        reason := dispatch.why_no_mosaic(dispatch.devices_of(x, weight))
    ):
        return reason
    if isinstance(weight, Packed):
        if x.dtype not in (weight.dtype, jnp.float32) or (x.dtype == jnp.float32 and weight.dtype != jnp.bfloat16):
            return f"x is {x.dtype} but the weight was packed for {weight.dtype}"
    elif reason := packed.unsupported(weight.format, x.dtype):
        return reason
    return "there are no rows to multiply" if rows == 0 else None


def _portable(
    product: Callable[..., Array], x: Array, norm: RMS | None, weights: Sequence[Weight], out_dtype: np.dtype
) -> tuple[Array, ...]:
    def one(x: Array, norm: RMS | None, weight: VQArray) -> Array:
        return product(x if norm is None else norm(x), weight, out_dtype=out_dtype)

    products = []
    for weight in weights:
        array = packed.unpack(weight) if isinstance(weight, Packed) else weight
        out_spec = PartitionSpec(*spec_of(x)[:-1], spec_of(array.indices)[-2])
        products.append(automatic(one, out_spec, x, norm, array))
    return tuple(products)


def _matmuls(x: Array, weights: Sequence[Packed], norm: RMS | None, out_dtype: np.dtype) -> tuple[Array, ...]:
    def by_kernel(x: Array, norm: RMS | None, weights: tuple[Packed, ...]) -> tuple[Array, ...]:
        flat = x.reshape(-1, x.shape[-1]).astype(weights[0].dtype)
        if mosaic.one_launch(weights):
            products = _differentiable(out_dtype, flat, norm, weights)
        else:
            flat = flat if norm is None else norm(flat)
            products = tuple(_differentiable(out_dtype, flat, None, (weight,))[0] for weight in weights)
        return tuple(product.reshape(*x.shape[:-1], -1) for product in products)

    return automatic(by_kernel, PartitionSpec(*spec_of(x)[:-1]), x, norm, tuple(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(out_dtype: np.dtype, x: Array, norm: RMS | None, weights: tuple[Packed, ...]) -> tuple[Array, ...]:
    """The kernel's product, with a derivative in x and the norm."""
    return _batchable(out_dtype)(x, norm, weights)


def _forward(out_dtype: np.dtype, *primals: Any) -> tuple[tuple[Array, ...], Any]:
    if any(leaf.perturbed for leaf in jax.tree.leaves(primals[2], is_leaf=_is_primal)):
        raise TypeError(
            "a packed weight has no gradient: its tables were made of the codebooks when it was packed; "
            "unpack(weight) to train codebooks, scale and offset, or take it out of what is differentiated"
        )
    x, norm, weights = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=_is_primal)
    return _batchable(out_dtype)(x, norm, weights), (x, norm, weights)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _backward(out_dtype: np.dtype, residuals: Any, cotangents: tuple[Any, ...]) -> tuple[Array, Any, None]:
    x, norm, weights = residuals

    def products(x: Array, norm: RMS | None) -> tuple[Array, ...]:
        return _portable(xla.vq_matmul, x, norm, weights, out_dtype)

    zeros = jax.custom_derivatives.SymbolicZero
    filled = tuple(jnp.zeros(ct.shape, ct.dtype) if isinstance(ct, zeros) else ct for ct in cotangents)
    return *jax.vjp(products, x, norm)[1](filled), None


_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.cache
def _batchable(out_dtype: np.dtype) -> Callable[..., tuple[Array, ...]]:
    """The kernel's product for results of a dtype: rows of a batch become rows of one product."""

    def on_one_device(x: Array, whole: tuple[RMS | None, tuple[Packed, ...]]) -> tuple[Array, ...]:
        norm, weights = whole
        return tuple(y.astype(out_dtype) for y in mosaic.matmul(x, weights, norm=norm, out_dtype=out_dtype))

    @jax.custom_batching.custom_vmap
    def product(x: Array, norm: RMS | None, weights: tuple[Packed, ...]) -> tuple[Array, ...]:
        return over_rows(on_one_device, x, (norm, weights))

    @product.def_vmap
    def batched(size: int, in_batched: Any, x: Array, norm: RMS | None, weights: tuple[Packed, ...]) -> tuple[Any, Any]:
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
