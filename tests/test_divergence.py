"""KL and agreement of two models' predictions, against float64 NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from random_models import CONFIG, random_model

import vptq_jax as vq

ROWS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (5, 11))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_kl_and_agreement_are_those_of_the_distributions():
    teacher, model = random_model(specs=(None,)), random_model(specs=("v6-k16-4",))
    p, q = (log_softmax(each(jnp.asarray(ROWS))) for each in (teacher, model))
    for batch_size in (1, 2, 8):
        found = vq.divergence(model, teacher, ROWS, batch_size=batch_size)
        assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
        assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
        assert found.tokens == ROWS.size


def test_a_model_agrees_with_itself():
    model = random_model()
    found = vq.divergence(vq.LanguageModel(model), model, ROWS)
    assert abs(found.kl) < 1e-6
    assert found.top1 == 1


def test_bad_input():
    model = random_model()
    other = random_model(dataclasses.replace(CONFIG, vocab_size=41))
    with pytest.raises(ValueError, match="a vocabulary of 40 tokens and its teacher one of 41"):
        vq.divergence(model, other, ROWS)
    with pytest.raises(ValueError, match="rows: token id 40 at row 0, column 0"):
        vq.divergence(model, model, np.full((1, 2), 40))
    model.norm.weight[...] = model.norm.weight[...].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="logits that are not finite"):
        vq.divergence(random_model(), model, ROWS)
