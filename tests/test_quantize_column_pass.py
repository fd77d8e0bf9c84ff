"""The column pass and the refinement against float64 NumPy, column by column, without blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vptq_jax.format import Format
from vptq_jax.quantization.column_pass import column_pass
from vptq_jax.quantization.columns import Codes, arrange, decode_all
from vptq_jax.quantization.linalg import proxy_loss
from vptq_jax.quantization.refine import descend_indices, refine, refit_codebooks

SHAPES = [
    ("v4-k8", 16, 20),
    ("v4-k8", 18, 150),  # a partial last vector, more than one block
    ("v4-k8-4", 16, 20),
    ("v3-k8-8-g3", 14, 138),
    ("v4-k8-g2-o5v2k4", 10, 141),
]

run_pass = functools.partial(jax.jit, static_argnames="segments")(column_pass)
run_refit = functools.partial(jax.jit, static_argnames="segments")(refit_codebooks)
run_descent = functools.partial(jax.jit, static_argnames="segments")(descend_indices)
run_refine = functools.partial(jax.jit, static_argnames="segments")(refine)


def problem(spec: str, out_features: int, in_features: int, seed: int = 0):
    """(W^T in slots, H, codes with random codebooks, segments, occupied slots)."""
    rng = np.random.default_rng(seed)
    segments, slot_columns = arrange(Format.of(spec, (out_features, in_features)))
    filled = slot_columns >= 0
    W = np.zeros((len(filled), out_features))
    W[filled] = rng.normal(size=(in_features, out_features))
    x = rng.normal(size=(4 * in_features, in_features)) @ (
        np.eye(in_features) + 0.2 * rng.normal(size=(in_features, in_features)) / np.sqrt(in_features)
    )
    H = np.zeros((len(filled), len(filled)))
    H[np.ix_(filled, filled)] = x.T @ x / len(x)
    codes = []
    for segment in segments:
        residual = segment.num_res_centroids
        empty = jnp.zeros((segment.slots, segment.num_vectors), jnp.int32)
        books = [
            jnp.asarray(size * rng.normal(size=(segment.num_groups, count, segment.vector_len)), jnp.float32)
            for count, size in ((segment.num_centroids, 1), (residual, 0.4))
        ]
        codes.append(Codes(books[0], books[1] if residual else None, empty, empty if residual else None))
    return jnp.asarray(W, jnp.float32), jnp.asarray(H, jnp.float32), tuple(codes), segments, filled


def factor_in_slots(H: np.ndarray, filled: np.ndarray) -> np.ndarray:
    U = np.eye(len(filled))
    U[np.ix_(filled, filled)] = np.linalg.cholesky(np.linalg.inv(np.asarray(H, np.float64)[np.ix_(filled, filled)])).T
    return U


def every_vector(segment, codes, slot):
    """All sums of a centroid and a residual for one slot: ([pairs, v], main index, residual index)."""
    group = int(segment.group(np.asarray(slot)))
    main = np.asarray(codes.codebook[group], np.float64)
    residual = np.zeros((1, main.shape[1])) if codes.res_codebook is None else np.asarray(codes.res_codebook[group])
    a, b = (grid.ravel() for grid in np.meshgrid(range(len(main)), range(len(residual)), indexing="ij"))
    return main[a] + residual[b], a, b


def nearest(segment, codes, slot, column):
    """Decoded column of nearest pairs by exhaustive search, in the rows that exist."""
    pairs, _, _ = every_vector(segment, codes, slot)
    decoded = np.empty_like(column)
    for start in range(0, len(column), segment.vector_len):
        part = column[start : start + segment.vector_len]
        choices = pairs[:, : len(part)]
        decoded[start : start + segment.vector_len] = choices[((choices - part) ** 2).sum(1).argmin()]
    return decoded


@pytest.mark.parametrize(("spec", "out_features", "in_features"), SHAPES)
def test_column_pass_is_the_plain_loop(spec, out_features, in_features):
    W, H, codes, segments, filled = problem(spec, out_features, in_features)
    U = factor_in_slots(H, filled)
    found, errors = run_pass(W, jnp.asarray(U, jnp.float32), codes, segments)
    left = np.asarray(W, np.float64)
    expected, expected_errors = np.zeros_like(left), np.zeros_like(left)
    for segment, code in zip(segments, codes, strict=True):
        for slot in range(segment.size):
            q = segment.start + slot
            expected[q] = nearest(segment, code, slot, left[q])
            expected_errors[q] = left[q] - expected[q]
            left[q + 1 :] -= np.outer(U[q, q + 1 :], expected_errors[q] / U[q, q])
    decoded = np.asarray(decode_all(segments, found))
    np.testing.assert_allclose(decoded[filled], expected[filled], atol=1e-4)
    np.testing.assert_allclose(np.asarray(errors)[filled], expected_errors[filled], atol=1e-3)


@pytest.mark.parametrize(("spec", "out_features", "in_features"), SHAPES)
def test_the_loss_is_the_sum_of_compensated_costs(spec, out_features, in_features):
    W, H, codes, segments, filled = problem(spec, out_features, in_features)
    U = factor_in_slots(H, filled)
    found, errors = run_pass(W, jnp.asarray(U, jnp.float32), codes, segments)
    loss = proxy_loss(W - decode_all(segments, found), H)
    costs = (np.asarray(errors, np.float64)[filled] ** 2).sum(1) / np.diag(U)[filled] ** 2
    assert float(loss) == pytest.approx(costs.sum(), rel=1e-3)


@pytest.mark.parametrize(("spec", "out_features", "in_features"), SHAPES)
def test_refit_solves_the_least_squares_problem(spec, out_features, in_features):
    W, H, codes, segments, filled = problem(spec, out_features, in_features)
    codes, _ = run_pass(W, jnp.asarray(factor_in_slots(H, filled), jnp.float32), codes, segments)
    refitted = run_refit(W, H, codes, segments)
    loss = float(proxy_loss(W - decode_all(segments, refitted), H))
    # The same problem as one dense least-squares problem over all codebook entries, row by row of W^T.
    books = [[c.codebook] if c.res_codebook is None else [c.codebook, c.res_codebook] for c in codes]
    flat, unravel = jax.flatten_util.ravel_pytree(books)

    def gather(flat):
        pairs = zip(codes, unravel(flat), strict=True)
        return decode_all(
            segments,
            tuple(Codes(b[0], b[1] if len(b) > 1 else None, c.index, c.res_index) for c, b in pairs),
        )

    design = np.asarray(jax.jacobian(gather)(flat), np.float64)[filled]
    root = np.linalg.cholesky(np.asarray(H, np.float64)[np.ix_(filled, filled)]).T
    left = np.einsum("pq,qrc->prc", root, design).reshape(-1, flat.size)
    right = (root @ np.asarray(W, np.float64)[filled]).ravel()
    _, residual, *_ = np.linalg.lstsq(left, right, rcond=None)
    optimum = residual[0] if residual.size else np.sum((left @ np.linalg.lstsq(left, right)[0] - right) ** 2)
    assert optimum * 0.999 <= loss <= optimum * 1.01


@pytest.mark.parametrize(("spec", "out_features", "in_features"), SHAPES)
def test_descent_is_the_plain_loop(spec, out_features, in_features):
    W, H, codes, segments, filled = problem(spec, out_features, in_features)
    codes, _ = run_pass(W, jnp.asarray(factor_in_slots(H, filled), jnp.float32), codes, segments)
    found = decode_all(segments, run_descent(W, H, codes, segments))
    W64, H64 = np.asarray(W, np.float64), np.asarray(H, np.float64)
    present = np.asarray(decode_all(segments, codes), np.float64)
    for segment, code in zip(segments, codes, strict=True):
        for slot in range(segment.size):
            q = segment.start + slot
            target = present[q] + (H64[q] @ (W64 - present)) / H64[q, q]
            present[q] = nearest(segment, code, slot, target)
    np.testing.assert_allclose(np.asarray(found)[filled], present[filled], atol=1e-4)


@pytest.mark.parametrize(("spec", "out_features", "in_features"), SHAPES)
def test_refinement_never_raises_the_loss(spec, out_features, in_features):
    W, H, codes, segments, filled = problem(spec, out_features, in_features)
    codes, _ = run_pass(W, jnp.asarray(factor_in_slots(H, filled), jnp.float32), codes, segments)
    losses = [float(proxy_loss(W - decode_all(segments, codes), H))]
    for _ in range(4):
        codes, loss = run_refine(W, H, codes, segments)
        losses.append(float(loss))
        assert float(loss) == pytest.approx(float(proxy_loss(W - decode_all(segments, codes), H)), rel=1e-4)
    assert (np.diff(losses) <= 0).all()
    assert losses[-1] < 0.9 * losses[0]


def test_refinement_at_an_exact_solution_stays_there():
    W, H, codes, segments, _ = problem("v4-k8", 16, 20)
    rng = np.random.default_rng(0)
    codes = (Codes(codes[0].codebook, None, jnp.asarray(rng.integers(8, size=codes[0].index.shape)), None),)
    W = decode_all(segments, codes)
    refined, loss = run_refine(W, H, codes, segments)
    assert float(loss) <= 1e-6
    np.testing.assert_array_equal(refined[0].index, codes[0].index)
