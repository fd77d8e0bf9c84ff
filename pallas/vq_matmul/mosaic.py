"""The Mosaic GPU implementation around the kernel: activations in, partial sums out, offset and outliers added."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from vptq_jax.pallas import dispatch
from vptq_jax.pallas.vq_matmul import packed
from vptq_jax.pallas.vq_matmul.dequantize import DecodeConfig, DecodePlan, transposed_weight
from vptq_jax.pallas.vq_matmul.kernel import Operands, partial_products
from vptq_jax.pallas.vq_matmul.norm import RMS
from vptq_jax.pallas.vq_matmul.packed import Packed
from vptq_jax.pallas.vq_matmul.plan import MAX_ROWS, MAX_ROWS_SHARED_TAIL, Config, Plan

_UNROLLED = 32
_KINDS: dict[Any, Literal["bf16", "f16"]] = {jnp.dtype(jnp.bfloat16): "bf16", jnp.dtype(jnp.float16): "f16"}


def one_launch(weights: Sequence[Packed]) -> bool:
    """Whether one launch can run these weights: alike but for their number of outputs."""
    first = weights[0]

    def likeness(weight: Packed) -> Any:
        return (
            dataclasses.replace(weight.format, out_features=1),
            weight.order,
            weight.table.dtype,
            weight.centred_offset is None,
            weight.columns is None,
        )

    return all(likeness(weight) == likeness(first) for weight in weights)


def make_plan(weights: Sequence[Packed], rows: int, config: Config | None = None, norm: RMS | None = None) -> Plan:
    """The division of the work of one launch; it normalizes x itself (`Plan.norm_eps`) where it can."""
    first = weights[0]
    plan = Plan(
        formats=tuple(weight.format for weight in weights),
        order=first.order,
        rows=rows,
        kind=_KINDS[jnp.dtype(first.table.dtype)],
        config=config or Config(blocks=dispatch.num_processors()),
        # For more rows, and for pairs of columns that no aligned load reads, XLA multiplies the offset.
        offsets=first.centred_offset is not None and rows <= 8 and first.format.in_features % 2 == 0,
    )
    if norm is None or norm.weight.dtype != first.dtype:
        return plan
    # What XLA multiplies needs a normalized x.
    outside = any(
        weight.outlier_indices is not None or (weight.centred_offset is not None and not plan.offsets)
        for weight in weights
    )
    normalizing = dataclasses.replace(plan, norm_eps=norm.eps)
    return normalizing if normalizing.stage_x and not outside else plan


def make_decode_plan(weight: Packed, config: DecodeConfig | None = None) -> DecodePlan:
    """The division of the work of the launch that decodes a weight."""
    return DecodePlan(
        formats=(weight.format,),
        order=weight.order,
        rows=1,
        kind=_KINDS[jnp.dtype(weight.table.dtype)],
        config=config or DecodeConfig(blocks=dispatch.num_processors()),
    )


def matmul(
    x: Float[Array, "m in"],
    weights: Sequence[Packed],
    config: Config | None = None,
    *,
    norm: RMS | None = None,
    out_dtype: Any = None,
) -> tuple[Float[Array, "m _out"], ...]:
    """`norm(x) @ w.T` for each weight: in one launch for few rows, through the decoded weight for many.

    The configuration may be a `DecodeConfig` for many rows; another one says nothing about them. Results are in
    float32 for few rows, in `out_dtype` (by default that of x) for many.
    """
    if x.shape[0] <= MAX_ROWS:
        return _fused(x, weights, config, norm)
    x = x if norm is None else norm(x)
    return tuple(_dense_product(x, weight, config, jnp.dtype(out_dtype or x.dtype)) for weight in weights)


def _fused(
    x: Float[Array, "m in"], weights: Sequence[Packed], config: Config | None, norm: RMS | None
) -> tuple[Float[Array, "m _out"], ...]:
    plan = make_plan(weights, x.shape[0], config, norm)
    if norm is not None and plan.norm_eps is None:
        x, norm = norm(x), None
    if plan.shared_tail and x.shape[0] > MAX_ROWS_SHARED_TAIL:
        pieces = (x[:MAX_ROWS_SHARED_TAIL], x[MAX_ROWS_SHARED_TAIL:])
        halves = [_fused(piece, weights, config, norm) for piece in pieces]
        return tuple(jnp.concatenate(rows) for rows in zip(*halves, strict=True))
    partials, offset_shares = partial_products(plan, _operands(plan, x, weights, norm))
    products: list[Array] = []
    start = 0
    for i, weight in enumerate(weights):
        stop = start + weight.format.out_features
        product = _added(partials[:, :, start:stop])
        if offset_shares is not None:
            product = product + _added(offset_shares[i, :, :, None])
        elif weight.centred_offset is not None:
            product = product + jnp.sum(x.astype(jnp.float32) * weight.centred_offset, axis=1, keepdims=True)
        if weight.outlier_indices is not None:
            product = product + packed.outlier_product(x, weight)
        products.append(product)
        start = stop
    return tuple(products)


def _operands(plan: Plan, x: Float[Array, "m in"], weights: Sequence[Packed], norm: RMS | None) -> Operands:
    operands = Operands([weight.words for weight in weights], [_tables(weight) for weight in weights])
    if plan.stage_x or plan.offsets:
        operands = operands._replace(x=x)
    if plan.offsets:
        operands = operands._replace(offsets=[weight.centred_offset for weight in weights])
    if not plan.stage_x:
        return operands._replace(runs=[_column_runs(x, weight) for weight in weights])
    if norm is not None:
        operands = operands._replace(norm=norm.weight)
    columns = [weight.columns for weight in weights if weight.columns is not None]
    return operands._replace(columns=columns, column_scales=[weight.column_scale for weight in weights])


def _tables(weight: Packed) -> list[Array]:
    return [table for table in (weight.table, weight.res_table, weight.tail_table) if table is not None]


def _added(terms: Float[Array, "terms *shape"]) -> Float[Array, "*shape"]:
    """The sum over the first axis, as additions: they join whatever reads it, a reduction is a launch of its own."""
    return functools.reduce(operator.add, list(terms)) if terms.shape[0] <= _UNROLLED else terms.sum(axis=0)


def decode_operands(weight: Packed) -> Operands:
    """What the launch that decodes a weight takes."""
    return Operands(
        [weight.words],
        [_tables(weight)],
        columns=[] if weight.columns is None else [weight.columns],
        column_scales=[weight.column_scale],
        offsets=[] if weight.centred_offset is None else [weight.centred_offset],
    )


def _dense_product(x: Float[Array, "m in"], weight: Packed, config: Config | None, out_dtype: Any) -> Array:
    """The product [m, out] with the weight written out in the dtype of its tables."""
    config = config if isinstance(config, DecodeConfig) else None
    dense = transposed_weight(make_decode_plan(weight, config), decode_operands(weight))
    if weight.outlier_indices is not None:
        columns, values = packed.outlier_weight(weight)
        padding = ((0, 0), (0, dense.shape[1] - weight.format.out_features))
        dense = dense.at[columns].set(jnp.pad(values, padding).astype(dense.dtype), unique_indices=True)
    return jnp.dot(x, dense, preferred_element_type=out_dtype)[:, : weight.format.out_features]


def _column_runs(x: Float[Array, "m in"], weight: Packed) -> Float[Array, "blocks m 32"]:
    columns = packed.kernel_columns(x, weight)
    return columns.reshape(x.shape[0], -1, 32).transpose(1, 0, 2)
