"""Texts and windows."""

from __future__ import annotations

import sys

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vptq_jax.lm import data


def paragraphs(text: str) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def test_builtin_halves_share_no_paragraph():
    halves = data.builtin_text()
    assert not paragraphs(halves["calibration"]) & paragraphs(halves["evaluation"])


def test_builtin_halves_are_long_and_balanced():
    lengths = [len(text) for text in data.builtin_text().values()]
    assert min(lengths) > 150_000
    assert max(lengths) < 1.05 * min(lengths)


def test_builtin_does_not_depend_on_the_order_of_the_topics(monkeypatch):
    before = data.builtin_text()
    topics = data._documentation_topics()
    monkeypatch.setattr(data, "_documentation_topics", lambda: dict(reversed(topics.items())))
    assert data.builtin_text() == before


def test_builtin_without_topics(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match=r"pydoc_data\.topics.*name a text file"):
        data.load_text("builtin")


@pytest.mark.parametrize(("part", "split"), [("calibration", "train"), ("evaluation", "test")])
def test_wikitext2_joins_lines_with_blank_lines(monkeypatch, part, split):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return [{"text": "one\n"}, {"text": ""}, {"text": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.load_text("wikitext2", part) == "one\n\n\n\n\ntwo"
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": split})]


def test_c4_streams_one_shard_and_joins_the_first_documents(monkeypatch):
    taken = []

    def load_dataset(name, *, data_files, split, streaming):
        assert (name, split, streaming) == ("allenai/c4", "validation", True)
        assert data_files == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
        for number in range(10**9):
            taken.append(number)
            yield {"text": f"document {number}"}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = data.load_text("c4", "evaluation")
    assert text.startswith("document 0 document 1 ")
    assert text.endswith(f" document {data.C4_DOCUMENTS - 1}")
    assert len(taken) == data.C4_DOCUMENTS


def test_no_network_names_the_way_out(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"'wikitext2'.*cannot reach the hub.*'builtin' instead"):
        data.load_text("wikitext2")


def test_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Füchse\n", encoding="utf-8")
    assert data.load_text(file, "calibration") == data.load_text(str(file), "evaluation") == "Füchse\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"ab\xff\xfe", "not UTF-8 .byte 0xff at offset 2")],
)
def test_file_that_is_no_text(tmp_path, content, message):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load_text(file)


def test_missing_file_lists_the_named_texts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file; .*builtin, wikitext2, c4"):
        data.load_text(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.load_text(tmp_path)


@given(st.integers(1, 9), st.integers(1, 60), st.one_of(st.none(), st.integers(1, 9)))
def test_windows_are_the_text_in_order(length, total, count):
    tokens = np.arange(total)
    if total < length:
        with pytest.raises(ValueError, match=f"{total} tokens, fewer than one window of {length}"):
            data.windows(tokens, length, count)
        return
    result = data.windows(tokens, length, count)
    assert result.dtype == np.int32
    assert len(result) == min(total // length, count or total)
    np.testing.assert_array_equal(result.ravel(), np.arange(result.size))


def test_windows_with_a_first_token():
    found = data.windows(np.arange(10), 4, first=99)
    np.testing.assert_array_equal(found, [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]])
    assert found.dtype == np.int32
    with pytest.raises(ValueError, match="window length is 1; expected at least 2, one of them the first token"):
        data.windows(np.arange(10), 1, first=99)
    with pytest.raises(ValueError, match="the text has 3 tokens, fewer than one window of 4"):
        data.windows(np.arange(3), 5, first=99)


def test_windows_of_an_empty_text():
    with pytest.raises(ValueError, match="0 tokens, fewer than one window of 8"):
        data.windows(np.asarray([]), 8)


@pytest.mark.parametrize(("length", "count"), [(0, None), (-1, 3), (4, 0)])
def test_windows_refuse_numbers_below_one(length, count):
    with pytest.raises(ValueError, match="expected at least 1"):
        data.windows(np.arange(9), length, count)


def test_windows_refuse_what_is_no_row_of_integers():
    with pytest.raises(ValueError, match="expected one axis"):
        data.windows(np.zeros((2, 3), np.int32), 2)
    with pytest.raises(ValueError, match="expected integers"):
        data.windows(np.zeros(6), 2)


@given(st.integers(1, 7), st.integers(1, 20))
def test_batches_are_the_rows_in_order(batch_size, rows):
    values = np.arange(rows * 3).reshape(rows, 3)
    parts = data.batches(values, batch_size)
    assert {len(part) for part in parts[:-1]} <= {batch_size}
    np.testing.assert_array_equal(np.concatenate(parts), values)


def test_batches_of_nothing():
    with pytest.raises(ValueError, match="batch size is 0; expected at least 1"):
        data.batches(np.zeros((2, 3), np.int32), 0)


def test_tokenize_adds_no_special_tokens(tiny_hf):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_hf)
    tokens = data.tokenize(tokenizer, "the quick fox")
    assert tokens.dtype == np.int32
    assert not np.isin(tokens, tokenizer.all_special_ids).any()
    assert tokenizer.decode(tokens) == "the quick fox"
