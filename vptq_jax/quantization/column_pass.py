"""The column pass: quantize column after column, each error compensated by the columns still to come.

Channel-independent second-order optimization of the VPTQ paper (section 3.1), with the lazy block
updates of GPTQ in a left-looking form: a block first collects what all earlier errors take from
it in one matrix product, so that no column is ever written twice.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vptq_jax.quantization.columns import Codes, Segment, encode_column, group_books
from vptq_jax.quantization.linalg import dot


def column_pass(
    W: Float[Array, "slots rows"],
    U: Float[Array, "slots slots"],
    codes: tuple[Codes, ...],
    segments: tuple[Segment, ...],
) -> tuple[tuple[Codes, ...], Float[Array, "slots rows"]]:
    """Chooses the indices of every column under fixed codebooks.

    Args:
        W: W^T in slots.
        U: upper triangular, H^-1 = U^T U; identity in empty slots.
        codes: one per segment; only the codebooks are read.
        segments: the format of the slots.

    Returns:
        (codes with new indices, compensated column minus its quantized value in every slot: what a residual
        codebook still has to describe).
    """
    errors = jnp.zeros_like(W)
    result = []
    for segment, code in zip(segments, codes, strict=True):
        code, errors = _segment_pass(W, U, errors, code, segment)
        result.append(code)
    return tuple(result), errors * jnp.diag(U)[:, None]


def _segment_pass(
    W: Float[Array, "slots rows"],
    U: Float[Array, "slots slots"],
    errors: Float[Array, "slots rows"],
    codes: Codes,
    segment: Segment,
) -> tuple[Codes, Float[Array, "slots rows"]]:
    size = segment.block
    has_residual = codes.res_codebook is not None
    empty = jnp.zeros((segment.slots, segment.num_vectors), jnp.int32)

    def block_step(b, state):
        errors, index, res_index = state
        first = segment.start + b * size
        factor = lax.dynamic_slice_in_dim(U, first, size, axis=1)
        # U is zero below its diagonal and `errors` in columns still to come.
        block = lax.dynamic_slice_in_dim(W, first, size) - dot(factor.T, errors)
        factor = lax.dynamic_slice_in_dim(factor, first, size)

        def column_step(block_errors, j):
            slot = b * size + j
            column = block[j] - dot(factor[:, j], block_errors)
            chosen, res_chosen, decoded = encode_column(segment, column, *group_books(segment, codes, slot))
            error = jnp.where(slot < segment.size, (column - decoded) / factor[j, j], 0)
            return block_errors.at[j].set(error), (chosen, res_chosen)

        block_errors, (chosen, res_chosen) = lax.scan(
            column_step, jnp.zeros((size, segment.rows), W.dtype), jnp.arange(size)
        )
        index = lax.dynamic_update_slice_in_dim(index, chosen, b * size, axis=0)
        if has_residual:
            res_index = lax.dynamic_update_slice_in_dim(res_index, res_chosen, b * size, axis=0)
        return lax.dynamic_update_slice_in_dim(errors, block_errors, first, axis=0), index, res_index

    state = (errors, empty, empty if has_residual else None)
    errors, index, res_index = lax.fori_loop(0, segment.slots // size, block_step, state)
    return dataclasses.replace(codes, index=index, res_index=res_index), errors
