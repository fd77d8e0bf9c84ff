"""Text that a model writes: its distribution, its shape, and that it repeats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import CONFIG, random_model

import vptq_jax as vq
from vptq_jax.lm import self_text as self_text_module

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


def test_text_that_is_kept_is_not_written_again(tmp_path, monkeypatch):
    model = random_model(dataclasses.replace(CONFIG, num_layers=1))
    written = []
    generate = self_text_module.generate

    def counted(*arguments, **options):
        written.append(1)
        if len(written) == 3:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(self_text_module, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        vq.self_text(model, 64 * 16 * 3, STARTS, directory=tmp_path / "text", **OPTIONS)
    rows = vq.self_text(model, 64 * 16 * 3, STARTS, directory=tmp_path / "text", **OPTIONS)
    assert len(written) == 4
    assert np.array_equal(rows, vq.self_text(model, 64 * 16 * 3, STARTS, **OPTIONS))
    assert np.array_equal(rows[:70], vq.self_text(model, 70 * 16, STARTS, directory=tmp_path / "text", **OPTIONS))
    assert len(written) == 7  # those without a directory
    with pytest.raises(ValueError, match=r"started with other inputs:\n  seed: 0 then, 1 now"):
        vq.self_text(model, 16, STARTS, directory=tmp_path / "text", seed=1, **OPTIONS)
    file = tmp_path / "text/rows-00001.npy"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"rows-00001.npy is damaged .*delete it to have it written again"):
        vq.self_text(model, 64 * 16 * 3, STARTS, directory=tmp_path / "text", **OPTIONS)
    with self_text_module.TextDir(tmp_path / "text") as kept:
        kept.remove()
    assert not (tmp_path / "text").exists()
