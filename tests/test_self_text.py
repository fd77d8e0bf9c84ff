"""Text that a model writes: its distribution, its shape, and that it repeats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import CONFIG, random_model

import vptq_jax as vq

STARTS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 50)
OPTIONS = {"length": 16, "start_length": 3, "batch_size": 64}


def test_rows_begin_with_snippets_and_go_on_as_the_model_would():
    model = random_model(dataclasses.replace(CONFIG, num_layers=1))
    rows = vq.self_text(model, 64 * 16 * 3 - 5, STARTS, **OPTIONS)
    assert rows.shape == (192, 16)
    assert rows.dtype == np.int32
    snippets = {tuple(STARTS[i : i + 3]) for i in range(48)}
    assert {tuple(row[:3]) for row in rows.tolist()} <= snippets
    assert len({tuple(row) for row in rows.tolist()}) == 192
    # Text of a model costs it its own entropy on average, and what it did not write costs it more.
    logs = jax.nn.log_softmax(model(jnp.asarray(rows)))
    entropy = -(jnp.exp(logs) * logs).sum(-1)[:, 2:-1]
    cost = -jnp.take_along_axis(logs[:, :-1], jnp.asarray(rows)[:, 1:, None], axis=-1)[:, 2:, 0]
    error = float(jnp.std(cost) / cost.size**0.5)
    assert abs(float(cost.mean() - entropy.mean())) < 4 * error
    assert np.array_equal(rows, vq.self_text(model, 64 * 16 * 3 - 5, STARTS, **OPTIONS))
    assert not np.array_equal(rows, vq.self_text(model, 64 * 16 * 3 - 5, STARTS, seed=1, **OPTIONS))


def test_bad_input():
    model = random_model()
    for changes, message in (
        ({"length": 3}, "start_length is 3 and length 3"),
        ({"length": CONFIG.context_length + 1}, f"at most the model's context of {CONFIG.context_length}"),
        ({"batch_size": 0}, "batch_size 0; expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            vq.self_text(model, 10, STARTS, **(OPTIONS | changes))
    with pytest.raises(ValueError, match=r"starts have shape \[2\]; expected at least 3 tokens"):
        vq.self_text(model, 10, STARTS[:2], **OPTIONS)
