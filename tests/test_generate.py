"""Generation against transformers, token for token; and everything around the decode loop."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_models import random_vqarray
from reference_models import jax_model, random_model, random_tokens, torch_model
from test_models_logits import LLAMA3, YARN, rope

from vptq_jax.lm.generation import bucket, cache_capacity, chat_prompt, generate, stream
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.sampling import Sampling
from vptq_jax.lm.tokens import TextStream
from vptq_jax.nn.linear import Linear, VQLinear

module = importlib.import_module("vptq_jax.lm.generation")  # The package's attribute of this name is the function.

MODELS = {
    "llama": ("llama", {}),
    "llama3 rope": ("llama", {"tie_word_embeddings": True, **LLAMA3}),
    "yarn": ("llama", rope("yarn", **YARN)),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "qwen2, mixed": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
}


def prompts(*lengths: int) -> list[list[int]]:
    return [random_tokens(length, seed=length).tolist() for length in lengths]


def torch_greedy(model, rows: list[list[int]], count: int, **options) -> list[list[int]]:
    """transformers' own generate, the batch padded on the left."""
    import torch

    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        output = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            **options,
        )
    return output[:, width:].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_transformers_singly_and_as_a_padded_batch(name):
    family, options = MODELS[name]
    reference = torch_model(family, max_position_embeddings=128, **options)
    model = jax_model(reference)
    rows = prompts(3, 11, 29)
    expected = [torch_greedy(reference, [row], 30)[0] for row in rows]
    assert [generate(model, row, max_new_tokens=30) for row in rows] == expected
    assert generate(model, rows, max_new_tokens=30) == expected
    assert torch_greedy(reference, rows, 30) == expected


def test_dynamic_rope_beyond_the_trained_context_equals_transformers():
    # A batch is left out: there transformers lets the longest row stretch the frequencies of all.
    reference = torch_model("llama", max_position_embeddings=24, **rope("dynamic", factor=4.0))
    model = jax_model(reference)
    rows = prompts(3, 11)
    expected = [torch_greedy(reference, [row], 40)[0] for row in rows]
    assert [generate(model, row, max_new_tokens=40) for row in rows] == expected
    assert generate(model, rows, max_new_tokens=40) == expected


def test_repetition_penalty_equals_transformers():
    reference = torch_model("llama")
    row = prompts(9)[0]
    expected = torch_greedy(reference, [row], 30, repetition_penalty=1.4)[0]
    assert generate(jax_model(reference), row, max_new_tokens=30, sampling=Sampling(repetition_penalty=1.4)) == expected
    assert expected != torch_greedy(reference, [row], 30)[0]


def test_stop_tokens_end_rows_one_by_one():
    model = random_model("llama")
    rows = prompts(3, 11)
    free = generate(model, rows, max_new_tokens=20)
    stop = [free[0][4], free[1][9]]
    expected = [row[: min(row.index(token) for token in stop if token in row)] for row in free]
    result = generate(model, rows, max_new_tokens=20, stop_tokens=stop, return_result=True)
    assert result.tokens == expected
    assert result.finish_reasons == ["stop", "stop"]
    model.config = dataclasses.replace(model.config, eos_token_id=tuple(stop))
    assert generate(model, rows, max_new_tokens=20) == expected
    assert generate(model, rows, max_new_tokens=20, stop_tokens=()) == free
    model.config = dataclasses.replace(model.config, eos_token_id=())
    lm = LanguageModel(model, generation_config={"eos_token_id": stop})
    assert generate(lm, rows, max_new_tokens=20) == expected


def test_result_counts_and_times():
    model = random_model("llama")
    result = generate(model, prompts(3, 11), max_new_tokens=7, return_result=True)
    assert result.texts is None
    assert [len(row) for row in result.tokens] == [7, 7]
    assert result.prompt_tokens == [3, 11]
    assert result.finish_reasons == ["length", "length"]
    assert result.decode_tokens == 12  # The first token of each row comes from the prefill.
    assert result.tokens_per_second == pytest.approx(12 / result.decode_seconds)
    assert result.implementation == "dense"
    assert generate(model, prompts(3), max_new_tokens=1, return_result=True).tokens_per_second == 0


def test_the_context_ends_generation():
    model = random_model("llama")  # context 64
    result = generate(model, prompts(60, 30), max_new_tokens=20, return_result=True)
    assert [len(row) for row in result.tokens] == [4, 20]
    assert result.finish_reasons == ["context", "length"]


def test_seeds_reproduce():
    model = random_model("llama")
    row = prompts(5)[0]

    def draw(seed: int, **options) -> list[int]:
        return generate(model, row, max_new_tokens=20, sampling=Sampling(temperature=1.5, seed=seed, **options))

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0, top_k=1) == generate(model, row, max_new_tokens=20)


def test_one_program_serves_lengths_calls_and_settings():
    model = random_model("llama", vocab_size=61)  # a shape that no other test compiles
    programs = (module._prefill, module._decode)
    generate(model, [1, 2, 3], max_new_tokens=20, sampling=Sampling(temperature=1.0))
    before = [program._cache_size() for program in programs]
    for length, count, settings in [
        (1, 20, {"temperature": 0.5}),
        (17, 3, {"temperature": 1.0, "top_k": 5, "seed": 3}),
        (32, 25, {"temperature": 2, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2}),
        (9, 31, {"temperature": 1.0}),
    ]:
        stop = [1, 2, 3][: length % 4]
        generate(
            model, list(range(length)), max_new_tokens=count, sampling=Sampling(**settings), stop_tokens=stop or None
        )
    assert [program._cache_size() for program in programs] == before
    generate(model, [1, 2, 3], max_new_tokens=20)
    assert [program._cache_size() for program in programs] == [count + 1 for count in before]  # greedy is its own


def test_the_cache_is_donated():
    model = random_model("llama")
    run = module._Run.start(LanguageModel(model), prompts(5), 8, Sampling(), ())
    keys = run.state.cache.keys
    run.decode(3)
    assert all(array.is_deleted() for array in keys)


def test_quantized_model_generates_what_its_dense_weights_generate():
    models = [random_model("llama", num_hidden_layers=1) for _ in range(2)]
    for path, layer in models[0].linears().items():
        weight = random_vqarray("v4-k16-8", *layer.shape, seed=1)
        models[0].set_linear(path, VQLinear(weight))
        models[1].set_linear(path, Linear(weight.dequantize()))
    rows = prompts(4, 9)
    result = generate(models[0], rows, max_new_tokens=12, return_result=True)
    assert result.tokens == generate(models[1], rows, max_new_tokens=12)
    assert result.implementation != "dense"


@given(st.integers(1, 100_000))
def test_buckets(length):
    assert bucket(length) >= max(length, 32)
    assert bucket(length) < max(2 * length, 33)
    assert bucket(bucket(length)) == bucket(length)
    assert length <= cache_capacity(length) <= max(32, 1.25 * length + 32)


@pytest.fixture(scope="module")
def talker(tiny_hf):
    """A model with a tokenizer and a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_hf)
    model = random_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    return LanguageModel(model, tokenizer)


def test_text_in_text_out(talker):
    ids = talker.tokenizer("the quick")["input_ids"]
    tokens = generate(talker, ids, max_new_tokens=12, return_result=True).tokens[0]
    text = generate(talker, "the quick", max_new_tokens=12)
    assert text == talker.tokenizer.decode(tokens, skip_special_tokens=True)
    assert generate(talker, ["the quick", ids], max_new_tokens=12) == [text, text]
    assert generate(talker, ids, max_new_tokens=12) == text


@pytest.mark.parametrize("settings", [{}, {"sampling": Sampling(temperature=1.0, seed=3)}, {"max_new_tokens": 1}])
def test_stream_is_generate_in_pieces(talker, settings):
    settings = {"max_new_tokens": 40, "stop_tokens": (), **settings}
    pieces = list(stream(talker, "the lazy dog", **settings))
    assert "".join(pieces) == generate(talker, "the lazy dog", **settings)
    assert all(pieces)
    assert len(pieces) > 2 or settings["max_new_tokens"] == 1


@given(st.text(min_size=1, max_size=20))
def test_no_piece_ends_inside_a_character(tokenizer_alone, text):
    ids = tokenizer_alone(text, add_special_tokens=False)["input_ids"]
    tokens = TextStream(tokenizer_alone)
    pieces = [tokens.push(ids[: count + 1]) for count in range(len(ids))]
    whole = tokenizer_alone.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) + tokens.finish() == whole
    assert "\N{REPLACEMENT CHARACTER}" in whole or not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.fixture(scope="module")
def tokenizer_alone(talker):
    return talker.tokenizer


@given(st.text(min_size=1, max_size=30), st.lists(st.integers(1, 5), min_size=1))
def test_pieces_of_every_size_make_the_whole(tokenizer_alone, text, sizes):
    ids = tokenizer_alone(text, add_special_tokens=False)["input_ids"]
    ends = [*(end for end in np.cumsum(sizes) if end < len(ids)), len(ids)]
    tokens = TextStream(tokenizer_alone)
    pieces = [tokens.push(ids[:end]) for end in ends]
    assert "".join(pieces) + tokens.finish() == tokenizer_alone.decode(ids, skip_special_tokens=True)


def test_streamed_text_is_decoded_in_linear_time(tokenizer_alone):
    ids = tokenizer_alone("the quick brown fox 🌧 " * 100, add_special_tokens=False)["input_ids"]
    decoded = []

    class Counting:
        def decode(self, tokens, **options):
            decoded.append(len(tokens))
            return tokenizer_alone.decode(tokens, **options)

    tokens = TextStream(Counting())
    text = "".join(tokens.push(ids[:end]) for end in range(0, len(ids) + 8, 8))
    assert text == tokenizer_alone.decode(ids, skip_special_tokens=True)
    assert sum(decoded) <= 6 * len(ids)


def test_a_stream_flattens_its_model_once(talker, monkeypatch):
    flattened = []
    flatten = jax.tree_util.tree_flatten
    monkeypatch.setattr(jax.tree, "flatten", lambda tree, **o: flattened.append(type(tree)) or flatten(tree, **o))
    assert len(list(stream(talker, "the lazy dog", max_new_tokens=60, stop_tokens=()))) > 4
    assert flattened.count(type(talker.module)) == 1


def test_broken_characters_come_at_the_end(talker):
    ids = talker.tokenizer("a 🌧", add_special_tokens=False)["input_ids"][:-1]
    tokens = TextStream(talker.tokenizer)
    assert tokens.push(ids) == "a "
    assert set(tokens.finish()) == {"\N{REPLACEMENT CHARACTER}"}


def test_chat_prompt_is_the_template(talker):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "hm"},
    ]
    expected = talker.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_prompt(talker, messages) == expected
    assert talker.tokenizer.decode(chat_prompt(talker, "hi")) == "user: hi\nassistant: "


def test_chat_prompt_refuses(talker):
    with pytest.raises(ValueError, match="no tokenizer, which chat needs"):
        chat_prompt(random_model("llama"), "hi")
    with pytest.raises(ValueError, match="expected at least one"):
        chat_prompt(talker, [])
    with pytest.raises(ValueError, match="message 1 is 'ho'; expected an object with 'role' and 'content'"):
        chat_prompt(talker, [{"role": "user", "content": "hi"}, "ho"])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "there is no prompt; expected at least one"),
        ([[]], {}, "prompt 0 is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ("hello", {}, "no tokenizer, so the prompt must be given as token ids"),
        ([97], {}, "prompt 0: token id 97 .* outside the vocabulary; expected 0 to 96"),
        ([[1], [-1]], {}, "prompt 1: token id -1"),
        ([[1.5]], {}, r"prompt 0 is \[1.5\]; expected a text or a list of token ids"),
        ([1, "a"], {}, "prompt 0 is 1; expected a text or a list of token ids"),
        ([1] * 64, {}, "prompt 0 has 64 tokens and the model's context holds 64.*at most 63 tokens"),
        ([1] * 100, {}, "prompt 0 has 100 tokens"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number of at least 1"),
        ([1], {"max_new_tokens": -3}, "max_new_tokens is -3"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ([1], {"stop_tokens": [97]}, "stop token 97 is outside the vocabulary"),
        ([1], {"stop_tokens": ["</s>"]}, "no tokenizer, so a stop token must be given as token ids"),
        ([1], {"stop_tokens": 3}, "stop_tokens is 3; expected a list"),
    ],
)
def test_bad_input_is_refused_before_work(monkeypatch, prompt, options, message):
    monkeypatch.setattr(module, "_prefill", None)
    with pytest.raises(ValueError, match=message):
        generate(random_model("llama"), prompt, **options)


def test_empty_text_is_refused(talker):
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(talker, "")
    with pytest.raises(ValueError, match="the prompt is empty"):
        stream(talker, "")


def test_stream_refuses_what_it_cannot_do(talker):
    with pytest.raises(ValueError, match="no tokenizer, which streaming text needs"):
        stream(random_model("llama"), [1, 2])
    with pytest.raises(ValueError, match="one prompt; call generate for a batch"):
        stream(talker, ["a", "b"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_an_error_that_names_its_place(temperature):
    model = random_model("llama")
    weight = model.layers[1].mlp.up_proj.weight[...]
    model.set_linear("model.layers.1.mlp.up_proj", Linear(weight.at[0, 0].set(jnp.nan)))
    message = "logits after token 3 of prompt 0 are not finite.*the weight model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=message):
        generate(model, [1, 2, 3], max_new_tokens=4, sampling=Sampling(temperature=temperature))


def test_nan_that_comes_later_is_found():
    model = random_model("llama", tie_word_embeddings=False)
    rows = prompts(3, 5)
    free = generate(model, rows, max_new_tokens=10)
    bad = next(token for token in free[1][2:] if token not in rows[0] + rows[1] + free[0] + free[1][:2])
    table = model.embed_tokens.weight[...]
    model.set_linear("model.embed_tokens", Linear(table.at[bad].set(jnp.inf)))
    place = 5 + free[1].index(bad) + 1
    with pytest.raises(ValueError, match=f"logits after token {place} of prompt 1 are not finite.*embed_tokens"):
        generate(model, rows, max_new_tokens=10)


def test_numpy_prompts():
    model = random_model("llama")
    rows = np.array(prompts(5, 5))
    assert generate(model, rows, max_new_tokens=3) == generate(model, rows.tolist(), max_new_tokens=3)
    assert generate(model, rows[0], max_new_tokens=3) == generate(model, rows[0].tolist(), max_new_tokens=3)
