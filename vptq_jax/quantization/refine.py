"""Refinement after the column pass: refit the codebooks, revisit the indices, never raising the loss.

Both steps work on the loss tr((W - W^) H (W - W^)^T) itself. With the indices fixed it is quadratic
in all codebooks together; with all but one column fixed, each vector of that column has one best
target. Neither is part of the paper.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from vptq_jax.quantization.columns import Codes, Segment, decode, decode_all, encode_column, group_books
from vptq_jax.quantization.linalg import dot, proxy_loss

_CG_ITERATIONS = 32
_CG_TOLERANCE = 1e-5  # Of the right-hand side's norm.


def refine(
    W: Float[Array, "slots rows"],
    H: Float[Array, "slots slots"],
    codes: tuple[Codes, ...],
    segments: tuple[Segment, ...],
    *,
    descend: bool | Bool[Array, ""] = True,
) -> tuple[tuple[Codes, ...], Float[Array, ""]]:
    """One round: coordinate descent on the indices (if `descend`), then a refit of the codebooks to them.

    Returns:
        (codes, their loss). A step that does not lower the loss is not taken.
    """
    loss = proxy_loss(W - decode_all(segments, codes), H)
    for step in (
        lambda codes: lax.cond(descend, lambda: descend_indices(W, H, codes, segments), lambda: codes),
        lambda codes: refit_codebooks(W, H, codes, segments),
    ):
        proposal = step(codes)
        proposed_loss = proxy_loss(W - decode_all(segments, proposal), H)
        pick = functools.partial(jnp.where, proposed_loss < loss)
        codes, loss = jax.tree.map(pick, (proposal, proposed_loss), (codes, loss))
    return codes, loss


def refit_codebooks(
    W: Float[Array, "slots rows"],
    H: Float[Array, "slots slots"],
    codes: tuple[Codes, ...],
    segments: tuple[Segment, ...],
) -> tuple[Codes, ...]:
    """The codebooks that minimise the loss under fixed indices, by preconditioned conjugate gradients.

    Starts from the present ones and solves for the change. The matrix is gather, times H,
    scatter-add by index; the preconditioner is its diagonal without the couplings between columns. Centroids
    that no vector uses have a zero row and stay where they are.
    """

    def books(codes: tuple[Codes, ...]) -> list[tuple[Array, ...]]:
        return [(c.codebook,) if c.res_codebook is None else (c.codebook, c.res_codebook) for c in codes]

    def with_books(books: list[tuple[Array, ...]]) -> tuple[Codes, ...]:
        return tuple(
            dataclasses.replace(c, codebook=b[0], res_codebook=b[1] if len(b) > 1 else None)
            for c, b in zip(codes, books, strict=True)
        )

    def gather(change: list[tuple[Array, ...]]) -> Array:
        return decode_all(segments, with_books(change))

    def scatter(columns: Array) -> list[tuple[Array, ...]]:
        return jax.vjp(gather, books(codes))[1](columns)[0]

    def matvec(change: list[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
        return scatter(dot(H, gather(change)))

    diagonal = scatter(jnp.broadcast_to(jnp.diag(H)[:, None], W.shape))

    def precondition(gradient: list[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
        return jax.tree.map(lambda g, d: jnp.where(d > 0, g / jnp.where(d > 0, d, 1), 0), gradient, diagonal)

    gradient = scatter(dot(H, W - decode_all(segments, codes)))
    change, _ = jax.scipy.sparse.linalg.cg(matvec, gradient, M=precondition, tol=_CG_TOLERANCE, maxiter=_CG_ITERATIONS)
    return with_books(jax.tree.map(jnp.add, books(codes), change))


def descend_indices(
    W: Float[Array, "slots rows"],
    H: Float[Array, "slots slots"],
    codes: tuple[Codes, ...],
    segments: tuple[Segment, ...],
) -> tuple[Codes, ...]:
    """Coordinate descent on the indices: every column in turn goes to its best target given all others."""
    residual = W - decode_all(segments, codes)
    result = []
    for segment, code in zip(segments, codes, strict=True):
        code, residual = _descend_segment(H, residual, code, segment)
        result.append(code)
    return tuple(result)


def _descend_segment(
    H: Float[Array, "slots slots"], residual: Float[Array, "slots rows"], codes: Codes, segment: Segment
) -> tuple[Codes, Float[Array, "slots rows"]]:
    size = segment.block
    present = decode(segment, codes)

    def block_step(b, state):
        residual, index, res_index = state
        first = segment.start + b * size
        rows = lax.dynamic_slice_in_dim(H, first, size)
        # (W - W^) H for the block's columns, before any of them changes.
        gradient = dot(rows, residual)
        within = lax.dynamic_slice_in_dim(rows, first, size, axis=1)
        old, old_index = (lax.dynamic_slice_in_dim(x, b * size, size) for x in (present, index))
        old_res = None if res_index is None else lax.dynamic_slice_in_dim(res_index, b * size, size)

        def column_step(change, j):
            slot = b * size + j
            pull = gradient[j] - dot(within[j], change)
            target = old[j] + pull / jnp.maximum(within[j, j], jnp.finfo(jnp.float32).tiny)
            chosen, res_chosen, decoded = encode_column(segment, target, *group_books(segment, codes, slot))
            # Greedy pairs can be farther than what is there, and an empty slot has no target.
            nearer = _squared(segment, target - decoded) < _squared(segment, target - old[j])
            nearer = nearer & (slot < segment.size)
            chosen = jnp.where(nearer, chosen, old_index[j])
            if old_res is not None and res_chosen is not None:
                res_chosen = jnp.where(nearer, res_chosen, old_res[j])
            moved = segment.join(jnp.where(nearer[:, None], segment.split(decoded - old[j]), 0))
            return change.at[j].set(moved), (chosen, res_chosen)

        change, (chosen, res_chosen) = lax.scan(column_step, jnp.zeros_like(old), jnp.arange(size))
        index = lax.dynamic_update_slice_in_dim(index, chosen, b * size, axis=0)
        if res_index is not None:
            res_index = lax.dynamic_update_slice_in_dim(res_index, res_chosen, b * size, axis=0)
        block = lax.dynamic_slice_in_dim(residual, first, size) - change
        return lax.dynamic_update_slice_in_dim(residual, block, first, axis=0), index, res_index

    state = (residual, codes.index, codes.res_index)
    residual, index, res_index = lax.fori_loop(0, segment.slots // size, block_step, state)
    return dataclasses.replace(codes, index=index, res_index=res_index), residual


def _squared(segment: Segment, column: Float[Array, " rows"]) -> Float[Array, " n"]:
    return jnp.sum(jnp.square(segment.split(column)), axis=-1)
