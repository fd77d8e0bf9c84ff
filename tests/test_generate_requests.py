"""Odd requests, many batch sizes, and what a terminal gets to see."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import CONFIG, random_model

from vptq_jax import programs
from vptq_jax.cli import terminal
from vptq_jax.lm.evaluation import perplexity
from vptq_jax.lm.generation import _decode, _prefill, _programs, generate
from vptq_jax.lm.sampling import GREEDY, Sampling

MODEL = random_model()
ONE_BLOCK = random_model(dataclasses.replace(CONFIG, num_layers=1))  # compiles in half the time
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [5], [6, 7], [8, 9, 10]]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, top_k=20, seed=3)])
def test_rows_that_fill_a_batch_up_change_nothing(sampling):
    result = generate(MODEL, PROMPTS, max_new_tokens=6, stop_tokens=(), return_result=True, sampling=sampling)
    assert result.prompt_tokens == [3, 1, 2, 4, 1, 2, 3]
    assert [len(row) for row in result.tokens] == [6] * 7
    assert result.decode_tokens == 7 * 5
    assert result.finish_reasons == ["length"] * 7
    whole = generate(MODEL, [*PROMPTS, [3, 4]], max_new_tokens=6, stop_tokens=(), sampling=sampling)
    assert whole[:7] == result.tokens
    if sampling.greedy:
        for prompt, row in zip(PROMPTS, result.tokens, strict=True):
            assert generate(MODEL, prompt, max_new_tokens=6, stop_tokens=()) == row


def test_many_batch_sizes_share_few_programs():
    jax.clear_caches()
    for size in range(1, 41):
        rows = generate(ONE_BLOCK, [[5, 6, 7]] * size, max_new_tokens=2, stop_tokens=())
        assert len(rows) == size
    assert _prefill._cache_size() + _decode._cache_size() <= 14


def test_programs_are_forgotten_where_mappings_run_low(monkeypatch, tmp_path):
    requests = [(row, Sampling(temperature=heat)) for row in [PROMPTS[0], [5] * 40] for heat in (0.0, 1.0)]
    expected = [generate(ONE_BLOCK, row, max_new_tokens=2, sampling=sampling) for row, sampling in requests]
    limit = tmp_path / "max_map_count"
    limit.write_text("100")
    monkeypatch.setattr(programs, "_MAP_LIMIT", limit)
    monkeypatch.setattr(programs, "_FEWEST", 3)
    monkeypatch.setattr(_programs, "_checked", 0)
    for (row, sampling), tokens in zip(requests, expected, strict=True):
        assert generate(ONE_BLOCK, row, max_new_tokens=2, sampling=sampling) == tokens
        assert _programs.count <= 4
    monkeypatch.setattr(programs, "_MAP_LIMIT", tmp_path / "gone")  # a system that does not say
    assert not programs.mappings_run_low()


def test_perplexity_is_the_same_for_every_batch_size():
    tokens = np.arange(13 * 16) % 40
    alone = perplexity(MODEL, tokens, context=16)
    for size in (3, 7, 13):
        found = perplexity(MODEL, tokens, context=16, batch_size=size)
        np.testing.assert_allclose(found.value, alone.value, rtol=1e-5)
        assert found.windows == 13


def test_a_perplexity_beyond_any_number_is_an_error():
    model = random_model()
    model.norm.weight[...] = model.norm.weight[...] * 1e7
    with pytest.raises(ValueError, match=r"mean loss of .* nats a token"):
        perplexity(model, np.arange(64) % 40, context=16)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (None, {}, "the prompt is None; expected a text"),
        (7, {}, "the prompt is 7; expected a text"),
        ([None], {}, "prompt 0 is None; expected a text or a list"),
        ([[1, [2]]], {}, r"prompt 0 is \[1, \[2\]\]; expected"),
        ([[10**30]], {}, "prompt 0 is"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5; expected a whole number"),
        ([1], {"max_new_tokens": True}, "max_new_tokens is True; expected a whole number"),
        ([1], {"stop_tokens": [10**30]}, "stop token 10+ is outside the vocabulary"),
        ([1], {"stop_tokens": [1.5]}, "stop token 1.5 is neither"),
        ([1], {"stop_tokens": 3}, "stop_tokens is 3; expected a list"),
        ([1], {"stop_tokens": b"a"}, "stop_tokens is b'a'; expected a list"),
        (np.array(3), {}, r"the prompts are an array of shape \(\); expected"),
        (jnp.array(3), {}, r"the prompts are an array of shape \(\); expected"),
        (np.zeros((1, 1, 1), int), {}, r"shape \(1, 1, 1\); expected"),
        (np.array([1.5]), {}, "prompt 0 is"),
        (b"abc", {}, "the prompt is b'abc'; expected a text"),
    ],
)
def test_odd_requests_are_refused(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, prompt, **options)


def test_settings_are_a_struct():
    with pytest.raises(TypeError, match=r"sampling is .*; expected a Sampling, such as"):
        generate(MODEL, [1], sampling={"temperature": 1.0})


@pytest.mark.parametrize("kind", [tuple, np.array, jnp.array, lambda rows: [jnp.int32(row) for row in rows]])
def test_prompts_of_every_kind(kind):
    expected = generate(MODEL, [3, 4], max_new_tokens=3)
    assert generate(MODEL, kind([3, 4]), max_new_tokens=3) == expected
    assert generate(MODEL, [kind([3, 4])] * 2, max_new_tokens=3) == [expected] * 2
    if kind in (np.array, jnp.array):
        assert generate(MODEL, kind([[3, 4]] * 2), max_new_tokens=3) == [expected] * 2


@pytest.mark.parametrize("top_p", [1e-300, 5e-324, 1e-38])
def test_the_most_likely_token_stays_whatever_top_p_is(top_p):
    expected = generate(MODEL, [3, 4], max_new_tokens=5)
    assert any(expected)
    assert generate(MODEL, [3, 4], max_new_tokens=5, sampling=Sampling(temperature=1.0, top_p=top_p)) == expected


@pytest.mark.parametrize("tokens", [2**40, 2**70])
def test_more_tokens_than_a_context_holds(tokens):
    result = generate(MODEL, [1, 2], max_new_tokens=tokens, stop_tokens=(), return_result=True)
    assert result.finish_reasons == ["context"]
    assert len(result.tokens[0]) == MODEL.config.context_length - 2


def test_half_a_character(tiny_hf):
    from vptq_jax.convert.loading import load

    model = load(tiny_hf)
    with pytest.raises(ValueError, match=r"the prompt holds .* position 3, which is no character; expected UTF-8"):
        generate(model, "abc\ud800def")
    with pytest.raises(ValueError, match=r"a stop token holds .* position 0, which is no character"):
        generate(model, "abc", stop_tokens=["\udc80"])


def test_threads_generate_as_one_does():
    expected = generate(MODEL, PROMPTS, max_new_tokens=5, stop_tokens=())
    results = [None] * 5

    def run(index):
        results[index] = generate(MODEL, PROMPTS, max_new_tokens=5, stop_tokens=())

    threads = [threading.Thread(target=run, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 5


def test_generated_text_cannot_steer_a_terminal(monkeypatch):
    text = "a\x1b[31mb\x07\x9bc\r\n\td\ud800"
    assert terminal.shown(text) == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert terminal.shown(text) == "a\ufffd[31mb\ufffd\ufffdc\ufffd\n\td\ufffd"


def test_a_line_about_an_error_is_short_and_plain():
    line = terminal.printable("bad:\n  x\x1b[2J " + "y" * 3000 + "\n  the end\u202e")
    assert line.startswith("bad: x\ufffd[2J y")
    assert line.endswith("the end\ufffd")
    assert len(line) < 500


def test_settings_that_work():
    assert Sampling(top_k=3, top_p=1, min_p=0, temperature=1, repetition_penalty=1).greedy is False
