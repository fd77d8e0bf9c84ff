"""Chunks against the whole text at once, and conversations with a prompt cache against the same without."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import NumpySource
from reference_models import random_model, random_tokens
from test_architectures import OPTIONS, options
from test_models_logits import YARN, rope

import vptq_jax as vq
from vptq_jax.lm.cache import LayerCache
from vptq_jax.lm.generation import ContextFull, generate, stream
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.prompt_cache import RING_SPARE
from vptq_jax.lm.registry import build
from vptq_jax.lm.sampling import Sampling

module = importlib.import_module("vptq_jax.lm.generation")  # the package's attribute of this name is the function

CONTEXT, ANSWER, WINDOW = 256, 6, 5
# Mistral has rings alone, three others keep full and sliding layers side by side.
MODELS = {family: (family, options(family)) for family in OPTIONS}
for family in ("llama", "mistral"):  # all layers are alike
    MODELS[family][1]["num_hidden_layers"] = 1
ROPES = {
    "dynamic": ("llama", {"num_hidden_layers": 1, "max_position_embeddings": 16, **rope("dynamic", factor=4.0)}),
    "yarn": ("llama", {"num_hidden_layers": 1, **rope("yarn", **YARN)}),
}


@functools.cache
def model_of(family):
    return random_model(family, **(MODELS[family][1] | {"max_position_embeddings": CONTEXT}))


@functools.cache
def small():
    """One layer, for whatever does not depend on the architecture."""
    return random_model("llama", num_hidden_layers=1, vocab_size=300, max_position_embeddings=CONTEXT)


forward = jax.jit(lambda model, tokens: model(tokens))


def expected(model, prompt, count=ANSWER, penalty=1.0, penalized=None):
    """Greedy tokens by whole texts, without any cache."""
    ids, seen = list(prompt), set(prompt if penalized is None else penalized)
    for _ in range(count):
        row = np.array(forward(model, jnp.asarray([ids + [0] * (CONTEXT - len(ids))]))[0, len(ids) - 1])
        for token in seen:
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        ids.append(int(row.argmax()))
        seen.add(ids[-1])
    return ids[len(prompt) :]


def ids(length, seed=0):
    return random_tokens(length, seed=seed).tolist()


def ask(model, prompt, prompt_cache, **settings):
    settings = {"max_new_tokens": ANSWER, "stop_tokens": (), **settings}
    return generate(model, prompt, prompt_cache=prompt_cache, return_result=True, **settings)


prefill = jax.jit(
    lambda model, tokens, start, spare: model.prefill(tokens, start, capacity=64, spare=spare),
    static_argnums=3,
)
extend = jax.jit(lambda model, tokens, length, cache: model.extend(tokens, length, cache))
step = jax.jit(lambda model, tokens, cache: model.step(tokens, cache))


@pytest.mark.parametrize("name", [*MODELS, "yarn"])
def test_logits_of_chunks_are_those_of_the_whole_text(name):
    family, options = (MODELS | ROPES)[name]
    model, spare = random_model(family, **options), 2
    tokens = random_tokens(2, 60)
    whole = np.asarray(model(tokens))
    start = np.array([1, 3])  # rows of 3 tokens and of 1, so from here on at different positions
    prompts = np.stack([np.pad(row[: 4 - first], (first, 0)) for row, first in zip(tokens, start, strict=True)])
    first, begun = prefill(model, prompts, start, spare)

    def following(done, count):
        return np.stack([row[4 - at + done : 4 - at + done + count] for row, at in zip(tokens, start, strict=True)])

    def close(logits, done):
        for row, at in enumerate(start):
            np.testing.assert_allclose(np.asarray(logits)[row], whole[row, 4 - at + done - 1], atol=1e-4)

    def read(tokens, cache, padding):
        """One program for up to 16 tokens a row."""
        chunk = np.pad(tokens, ((0, 0), (0, 16 - tokens.shape[1])), constant_values=padding)
        return extend(model, chunk, np.int32(tokens.shape[1]), cache)

    @settings(max_examples=10)
    @given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, spare + 1), st.integers(0, 96)), max_size=8))
    def check(chunks):
        logits, cache, done = first, begun, 0
        close(logits, done)
        for count, wrong, junk in chunks:
            if done + count + 1 > 56:
                break
            if wrong:  # tokens that are taken back
                _, ahead = read(np.full((2, wrong), junk), cache, junk)
                cache = ahead.back_to(4 + done)
            logits, cache = read(following(done, count), cache, junk)
            close(logits, done + count)
            logits, cache = step(model, following(done + count, 1)[:, 0], cache)
            done += count + 1
            close(logits, done)

    check()


def test_a_chunk_longer_than_its_window():
    model = model_of("mistral")
    tokens = jnp.asarray(random_tokens(1, 60))
    _, cache = prefill(model, tokens[:, :9], jnp.zeros(1, jnp.int32), 0)
    logits, cache = extend(model, tokens[:, 9:59], jnp.int32(50), cache)
    assert [keys.shape[2] for keys in cache.keys] == [WINDOW]
    np.testing.assert_allclose(logits, model(tokens)[:, 58], atol=1e-4)
    np.testing.assert_allclose(step(model, tokens[:, 59], cache)[0], model(tokens)[:, 59], atol=1e-4)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.tuples(st.integers(1, 7), st.integers(0, 3)), max_size=5))
def test_a_ring_holds_the_last_slots_after_chunks(size, prompt, chunks):
    # Every key holds its own slot number, so the ring can be read off.
    def slots(first, count):
        return np.arange(first, first + count, dtype=np.float32).reshape(1, 1, count, 1)

    first = jnp.asarray(slots(0, prompt))
    cache = LayerCache.from_prompt(first, first, jnp.array([0]), size)
    for length, padding in chunks:
        new = slots(int(cache.slot), length + padding)
        new[:, :, length:] = -1
        cache = cache.extend(jnp.asarray(new), jnp.asarray(10 * new), jnp.int32(length))
    held, last = np.asarray(cache.keys)[0, 0, :, 0], int(cache.slot)
    positions = np.asarray(cache.positions())[0]
    np.testing.assert_array_equal(held[positions >= 0], positions[positions >= 0])
    assert sorted(held[positions >= 0]) == list(range(max(0, last - size), last))
    if chunks and chunks[-1][0] >= size:
        np.testing.assert_array_equal(cache.values, 10 * cache.keys)


@pytest.mark.parametrize("family", MODELS)
def test_a_conversation_says_the_same_and_reads_only_what_is_new(family):
    # With a short first turn the caches of all layers grow, and later the rings go round; with a long one they have.
    turns = [20, 2, 27, 1, 40] if family == "mistral" else [70, 3, 4]
    model, prompt_cache, text = model_of(family), vq.PromptCache(), []
    for turn, length in enumerate(turns):
        text += ids(length, seed=turn)
        result = ask(model, text, prompt_cache)
        assert result.tokens[0] == expected(model, text)
        # The last token of an answer is chosen and not read.
        assert result.prompt_tokens_read == [length + (turn > 0)]
        assert result.prompt_tokens == [len(text)]
        text += result.tokens[0]
        assert prompt_cache.tokens == text[:-1]
    assert len(text) > WINDOW + RING_SPARE + 20


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@pytest.mark.parametrize(("back", "kept"), [(RING_SPARE + 1, True), (RING_SPARE + 2, False)])
def test_a_ring_that_has_gone_round_takes_back_what_it_has_to_spare(family, back, kept):
    model, prompt_cache = model_of(family), vq.PromptCache()
    text = ids(117)
    ask(model, text, prompt_cache)
    held = prompt_cache.tokens
    assert len(held) == 117 + ANSWER - 1
    prompt = [*held[:-back], (held[-back] + 1) % 97, *ids(9, seed=1)]
    result = ask(model, prompt, prompt_cache)
    assert result.prompt_tokens_read == [10 if kept else len(prompt)]
    assert result.tokens[0] == expected(model, prompt)


def test_what_a_template_drops_is_forgotten():
    model, prompt_cache = small(), vq.PromptCache()
    system, turns = ids(15), [ids(20, seed=seed) for seed in range(1, 4)]
    for number in range(1, 3):
        ask(model, sum(turns[:number], system), prompt_cache)
    prompt = [*system, *turns[1], *turns[2]]  # the oldest turn is left out
    result = ask(model, prompt, prompt_cache)
    assert result.prompt_tokens_read == [40]
    assert result.tokens[0] == expected(model, prompt)
    for same in (prompt, prompt[:30]):  # a prompt that is in the cache to its end, or beyond
        result = ask(model, same, prompt_cache)
        assert result.prompt_tokens_read == [1]
        assert result.tokens[0] == expected(model, same)
    other = [(prompt[0] + 1) % 97, *prompt[1:]]
    result = ask(model, other, prompt_cache)
    assert result.prompt_tokens_read == [len(other)]
    assert result.tokens[0] == expected(model, other)
    assert prompt_cache.tokens == [*other, *result.tokens[0][:-1]]


def test_keys_that_a_dynamic_rope_would_turn_otherwise_are_read_again():
    model, prompt_cache = random_model(ROPES["dynamic"][0], **ROPES["dynamic"][1]), vq.PromptCache()
    text, counts = ids(4), []
    for turn in range(4):
        result = ask(model, text, prompt_cache, max_new_tokens=3)
        assert result.tokens[0] == generate(model, text, max_new_tokens=3)
        counts += result.prompt_tokens_read
        text += [*result.tokens[0], *ids(3, seed=turn)]
    assert counts == [4, 4, 4, 22]  # the third prompt ends at the trained 16 tokens


def test_another_model_starts_anew():
    config = small().config
    first, second = (build(config, NumpySource(seed, np.float32, 0.3)) for seed in (0, 1))
    prompt_cache, text = vq.PromptCache(), ids(40)
    for model, count in [(first, 40), (second, 40), (LanguageModel(second), 1), (first, 40)]:
        result = ask(model, text, prompt_cache)
        assert result.prompt_tokens_read == [count]
        assert result.tokens[0] == expected(LanguageModel.of(model).module, text)
    first.norm.weight[...] = first.norm.weight[...] * jnp.linspace(-1, 2, config.hidden_size)
    result = ask(first, text, prompt_cache)
    assert result.prompt_tokens_read == [40]
    assert result.tokens[0] == expected(first, text)


def test_no_model_is_kept_alive():
    model = build(small().config, NumpySource(2, np.float32, 0.3))
    prompt_cache = vq.PromptCache()
    ask(model, ids(40), prompt_cache)
    weight = weakref.ref(model.norm.weight.get_value())
    del model
    gc.collect()
    assert weight() is None
    assert len(prompt_cache.tokens) == 45
    assert ask(small(), ids(40), prompt_cache).prompt_tokens_read == [40]


def test_the_repetition_penalty_is_that_of_the_whole_prompt():
    model, prompt_cache, text = small(), vq.PromptCache(), ids(40)
    sampling = Sampling(repetition_penalty=1.5)
    differ = 0
    for seed in range(1, 9):
        ask(model, text, prompt_cache, max_new_tokens=1)
        prompt = text + ids(7, seed=seed)
        result = ask(model, prompt, prompt_cache, sampling=sampling)
        assert result.prompt_tokens_read == [7]
        assert result.tokens[0] == expected(model, prompt, penalty=1.5)
        differ += result.tokens[0] != expected(model, prompt, penalty=1.5, penalized=prompt[-7:])
    assert differ


def test_seeds_give_the_same_tokens():
    model, prompt_cache, text = small(), vq.PromptCache(), ids(40)
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=5)
    for turn in range(3):
        result = ask(model, text, prompt_cache, sampling=sampling)
        assert result.tokens[0] == generate(model, text, max_new_tokens=ANSWER, stop_tokens=(), sampling=sampling)
        assert result.prompt_tokens_read == [40 if turn == 0 else 5]
        text += [*result.tokens[0], *ids(4, seed=turn)]


def test_few_programs_serve_turns_of_every_length():
    model = random_model("llama", num_hidden_layers=1, vocab_size=61, max_position_embeddings=512)
    prompt_cache, text = vq.PromptCache(), []
    before = [program._cache_size() for program in (module._prefill, module._extend, module._decode)]
    for turn, length in enumerate([*range(1, 19), 33, 34]):
        text += (np.array(ids(length, seed=turn)) % 61).tolist()
        result = ask(model, text, prompt_cache, max_new_tokens=2)
        assert result.prompt_tokens_read == [length + (turn > 0)]
        text += result.tokens[0]
    assert len(text) > 256
    added = [program._cache_size() for program in (module._prefill, module._extend, module._decode)] - np.array(before)
    # Caches of 64, 160 and 320 slots; chunks of 32, and of 64 in the larger ones.
    assert added[0] == 1
    assert added[1] <= 5
    assert added[2] <= 3


def test_the_context_ends_a_conversation_and_leaves_its_cache():
    model, prompt_cache, text = small(), vq.PromptCache(), ids(CONTEXT - 10)
    result = ask(model, text, prompt_cache)
    text += [*result.tokens[0], 1]
    result = ask(model, text, prompt_cache)
    assert (result.finish_reasons, result.prompt_tokens_read) == (["context"], [2])
    assert result.tokens[0] == expected(model, text, CONTEXT - len(text))
    held = prompt_cache.tokens
    assert len(held) == CONTEXT - 1
    with pytest.raises(ContextFull):
        ask(model, [1] * CONTEXT, prompt_cache)
    assert prompt_cache.tokens == held
    assert ask(model, text, prompt_cache).prompt_tokens_read == [1]


def test_logits_that_are_not_finite_leave_nothing():
    model = build(small().config, NumpySource(0, np.float32, 0.3))
    model.embed_tokens.weight[...] = model.embed_tokens.weight[...].at[96].set(jnp.nan)
    model.set_linear("lm_head", small().lm_head)
    prompt_cache, text = vq.PromptCache(), [token % 96 for token in ids(40)]
    ask(model, text, prompt_cache)
    with pytest.raises(ValueError, match=r"the logits after token 42 of prompt 0 are not finite.*embed_tokens"):
        ask(model, [*text, 96, 1], prompt_cache)
    assert prompt_cache.tokens == []
    result = ask(model, text, prompt_cache, max_new_tokens=1)
    assert (result.tokens[0], result.prompt_tokens_read) == (expected(model, text, 1), [40])


def test_an_interrupted_step_leaves_nothing(monkeypatch):
    model, prompt_cache, text = small(), vq.PromptCache(), ids(40)
    decode = module._decode

    def interrupted(*arguments, **settings):
        decode(*arguments, **settings)  # which uses the state up
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(model, text, prompt_cache)
    assert prompt_cache.tokens == []
    monkeypatch.undo()
    result = ask(model, text, prompt_cache)
    assert (result.tokens[0], result.prompt_tokens_read) == (expected(model, text), [40])


@pytest.fixture(scope="module")
def talker(tiny_hf):
    """A model with a tokenizer and a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_hf)
    assert len(tokenizer) == small().config.vocab_size
    return LanguageModel(small(), tokenizer)


def test_streams_of_a_chat_say_the_same(talker):
    prompt_cache, messages = vq.PromptCache(), [{"role": "system", "content": "a fox"}]
    for question in ["the quick brown dog", "and?"]:
        messages.append({"role": "user", "content": question})
        prompt = vq.chat_prompt(talker, messages)
        answer = "".join(stream(talker, prompt, max_new_tokens=10, prompt_cache=prompt_cache))
        assert answer == generate(talker, prompt, max_new_tokens=10)
        assert prompt_cache.tokens[: len(prompt)] == prompt
        messages.append({"role": "assistant", "content": answer})


def test_a_stop_token_is_not_in_the_cache(talker):
    prompt_cache, text = vq.PromptCache(), ids(40)
    free = expected(talker.module, text, 8)
    place = next(place for place, token in enumerate(free) if place and token not in free[:place])
    result = ask(talker, text, prompt_cache, stop_tokens=[free[place]])
    assert result.finish_reasons == ["stop"]
    assert prompt_cache.tokens == [*text, *free[:place]]
    text += [*free[: place + 1], *ids(5, seed=1)]
    result = ask(talker, text, prompt_cache)
    assert (result.tokens[0], result.prompt_tokens_read) == (expected(talker.module, text), [6])


@pytest.mark.parametrize("end", ["not begun", "dropped", "closed", "interrupted"])
def test_a_stream_that_is_given_up_leaves_what_it_has_read(talker, end):
    prompt_cache, text = vq.PromptCache(), ids(40)
    pieces = stream(talker, text, max_new_tokens=32, stop_tokens=(), prompt_cache=prompt_cache)
    if end != "not begun":
        for _ in range(3):
            next(pieces)
    if end == "closed":
        pieces.close()
    if end == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            pieces.throw(KeyboardInterrupt)
    del pieces
    held = prompt_cache.tokens
    assert held == [*text, *expected(talker.module, text, len(held) - 40)]
    assert len(held) == 40 if end == "not begun" else len(held) > 40
    text = [*held, *ids(5, seed=1)]
    result = ask(talker, text, prompt_cache)
    assert (result.tokens[0], result.prompt_tokens_read) == (expected(talker.module, text), [5])


def test_a_later_call_takes_the_cache_over(talker):
    prompt_cache, text = vq.PromptCache(), ids(40)
    pieces = stream(talker, text, max_new_tokens=32, stop_tokens=(), prompt_cache=prompt_cache)
    next(pieces)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):  # a call that never begins takes nothing
        ask(talker, text, prompt_cache, max_new_tokens=0)
    next(pieces)
    result = ask(talker, text, prompt_cache)
    assert result.prompt_tokens_read == [1]
    with pytest.raises(RuntimeError, match="another call has taken this prompt cache over"):
        list(pieces)
    assert prompt_cache.tokens == [*text, *result.tokens[0][:-1]]
    assert result.tokens[0] == expected(talker.module, text)


def test_threads_get_right_tokens_or_an_error():
    model, prompt_cache = small(), vq.PromptCache()
    texts = [[*ids(40), *ids(5 + number, seed=number)] for number in range(6)]
    ask(model, texts[0], prompt_cache)
    ask(model, texts[1], prompt_cache)
    outcomes = [[] for _ in texts]

    def talk(number):
        for _ in range(5):
            with contextlib.suppress(RuntimeError):
                outcomes[number].append(ask(model, texts[number], prompt_cache).tokens[0])

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text, found in zip(texts, outcomes, strict=True):
        assert all(tokens == expected(model, text) for tokens in found)
    assert any(outcomes)
    assert ask(model, texts[0], prompt_cache).tokens[0] == expected(model, texts[0])


def test_odd_requests_are_refused():
    with pytest.raises(ValueError, match="a prompt cache is one conversation's, and there are 2 prompts"):
        generate(small(), [[1], [2]], prompt_cache=vq.PromptCache())
    with pytest.raises(TypeError, match="prompt_cache is 7; expected a PromptCache, or None"):
        generate(small(), [1], prompt_cache=7)
    assert vq.PromptCache().tokens == []
