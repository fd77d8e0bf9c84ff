"""Sampling against a plain NumPy account of each filter, and its distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vptq_jax.lm.next_token import SamplingArrays, next_token, penalize, restrict
from vptq_jax.lm.sampling import Sampling

VOCAB = 23
NO_SEEN = jnp.zeros((1, VOCAB), bool)


def kept_by_numpy(logits: np.ndarray, sampling: Sampling) -> set[int]:
    order = list(np.argsort(-logits, kind="stable"))
    scaled = logits.astype(np.float64) / sampling.temperature
    probability = np.exp(scaled - scaled.max())
    order = order[: sampling.top_k or len(order)]
    probability /= probability[order].sum()
    if sampling.top_p is not None and sampling.top_p < 1:
        before = np.cumsum(probability[order]) - probability[order]
        order = [token for token, mass in zip(order, before, strict=True) if mass < sampling.top_p]
    if sampling.min_p is not None:
        order = [token for token in order if probability[token] >= sampling.min_p * probability.max()]
    return set(order)


@given(
    st.integers(0, 10**6),
    st.one_of(st.none(), st.integers(1, 40)),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
    st.one_of(st.none(), st.floats(0.0, 1.0)),
    st.floats(0.1, 5.0),
)
def test_filters_keep_what_numpy_keeps(seed, top_k, top_p, min_p, temperature):
    # Distinct logits on a coarse grid, so that no comparison hangs on the last bit.
    logits = np.random.default_rng(seed).permutation(VOCAB).astype(np.float32) / 4
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    filtered = np.asarray(restrict(jnp.asarray(logits)[None], SamplingArrays.of(sampling, VOCAB)))[0]
    kept = {int(token) for token in np.flatnonzero(np.isfinite(filtered))}
    expected = kept_by_numpy(logits, sampling)
    if kept != expected:  # Only a sum that meets top_p, or a ratio that meets min_p, to float32 rounding may differ.
        near = [Sampling(temperature=temperature, top_k=top_k, **edge) for edge in edges(top_p, min_p)]
        assert kept in [kept_by_numpy(logits, other) for other in near]
    np.testing.assert_allclose(
        filtered[list(kept)], (logits[list(kept)] - logits.max()) / temperature, rtol=1e-5, atol=1e-6
    )


def edges(top_p: float | None, min_p: float | None):
    for shift in (-1e-5, 1e-5):
        yield {
            "top_p": None if top_p is None else float(np.clip(top_p + shift, 1e-6, 1)),
            "min_p": None if min_p is None else float(np.clip(min_p + shift, 0, 1)),
        }


def test_draws_follow_the_distribution():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=VOCAB), jnp.float32)
    sampling = Sampling(temperature=0.7, top_k=9, top_p=0.9, min_p=0.02)
    filtered = np.asarray(restrict(logits[None], SamplingArrays.of(sampling, VOCAB)))[0].astype(np.float64)
    expected = np.exp(filtered) / np.exp(filtered).sum()
    count = 20_000
    rows = jnp.broadcast_to(logits, (count, VOCAB))
    seen = jnp.zeros((count, VOCAB), bool)
    tokens = next_token(rows, seen, SamplingArrays.of(sampling, VOCAB), jax.random.key(1), greedy=False)
    drawn = np.bincount(np.asarray(tokens), minlength=VOCAB) / count
    assert (drawn[expected == 0] == 0).all()
    # Five standard deviations of a frequency.
    assert (np.abs(drawn - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()


def test_seeds_reproduce_and_differ():
    logits = jnp.zeros((64, VOCAB))
    seen = jnp.zeros((64, VOCAB), bool)
    sampling = SamplingArrays.of(Sampling(temperature=1.0), VOCAB)

    def draw(seed: int) -> np.ndarray:
        return np.asarray(next_token(logits, seen, sampling, jax.random.key(seed), greedy=False))

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    assert len(set(draw(0))) > 1  # Rows are independent.


def test_neutral_settings_change_nothing():
    logits = np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32)
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=VOCAB, top_p=1.0, min_p=0.0)):
        filtered = np.asarray(restrict(jnp.asarray(logits), SamplingArrays.of(sampling, VOCAB)))
        np.testing.assert_allclose(filtered, logits - logits.max(-1, keepdims=True), atol=1e-6)


def test_extreme_logits_stay_finite():
    logits = jnp.asarray([[-3e38, 3e38, 0.0, *[-1e30] * (VOCAB - 3)]])
    for temperature in (1e-3, 1.0, 100.0):
        token = next_token(
            logits,
            NO_SEEN,
            SamplingArrays.of(Sampling(temperature=temperature), VOCAB),
            jax.random.key(0),
            greedy=False,
        )
        assert token.tolist() == [1]


def test_repetition_penalty_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(0).normal(size=(2, VOCAB)).astype(np.float32)
    tokens = np.array([[1, 2, 2, 5], [7, 8, 9, 9]])
    seen = jnp.zeros((2, VOCAB), bool).at[np.arange(2)[:, None], tokens].set(True)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(tokens), torch.tensor(logits)).numpy()
    np.testing.assert_allclose(penalize(jnp.asarray(logits), seen, jnp.float32(1.3)), theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; expected 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"top_k": 0}, "top_k is 0; expected a whole number of at least 1, or None"),
        ({"top_p": 0.0}, "top_p is 0.0; expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -1.0}, "min_p is -1.0; expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected a number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"repetition_penalty": 1e30}, "repetition_penalty is 1e.30; expected"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected"),
        ({"top_k": 1.5}, "top_k is 1.5; expected a whole number"),
        ({"min_p": float("nan")}, "min_p is nan; expected"),
        ({"seed": 0.5}, "seed is 0.5; expected a whole number"),
        ({"seed": 2**70}, "seed is 1180591620717411303424; expected"),
        ({"seed": "x"}, "seed is 'x'; expected"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
