"""Text for calibration and evaluation, and its cut into windows of tokens."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer

from vptq_jax.extras import need

Part = Literal["calibration", "evaluation"]

NAMED_TEXTS = ("builtin", "wikitext2", "c4")
C4_DOCUMENTS = 1100
"""Documents of C4 that are joined, as many as the GPTQ evaluation joins."""


def load_text(source: str | Path, part: Part = "evaluation") -> str:
    """The text of a named data set or of a UTF-8 file.

    Args:
        source: `builtin` (Python's own documentation topics, no download), `wikitext2`, `c4`, or
            the path of a text file.
        part: which half or split of a named data set; a file is the same for both. No paragraph
            of `builtin` is in both halves. WikiText-2 gives its train or test split, C4 the
            first documents of its first train or validation shard.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty or not UTF-8.
        ConnectionError: a data set cannot be downloaded.
    """
    match str(source):
        case "builtin":
            return builtin_text()[part]
        case "wikitext2":
            return _wikitext2(part)
        case "c4":
            return _c4(part)
        case _:
            return _read_file(Path(source))


def check_source(source: str | Path) -> None:
    """Raises what `load_text` would raise for a file, without reading or downloading anything.

    Raises:
        FileNotFoundError: `source` is neither a named text nor a file.
    """
    if str(source) not in NAMED_TEXTS and not Path(source).is_file():
        raise FileNotFoundError(
            f"text {str(source)!r}: no such file; expected a UTF-8 text file or one of {', '.join(NAMED_TEXTS)}"
        )


def builtin_text() -> dict[Part, str]:
    """Two texts without a common paragraph, made from the documentation topics inside Python.

    Topics quote each other, so a paragraph counts for the longest topic that has it; topics then
    go, longest first, to the shorter text. About 180,000 characters each; the wording depends
    on the Python version.

    Raises:
        FileNotFoundError: this Python was built without `pydoc_data`.
    """
    texts: dict[Part, list[str]] = {"calibration": [], "evaluation": []}
    length: dict[Part, int] = {"calibration": 0, "evaluation": 0}
    seen: set[str] = set()
    topics = _documentation_topics()
    for topic in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        fresh = []
        for paragraph in topics[topic].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                fresh.append(paragraph.strip("\n"))
        part: Part = "calibration" if length["calibration"] <= length["evaluation"] else "evaluation"
        texts[part] += fresh
        length[part] += sum(map(len, fresh))
    return {"calibration": "\n\n".join(texts["calibration"]), "evaluation": "\n\n".join(texts["evaluation"])}


def _documentation_topics() -> dict[str, str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        raise FileNotFoundError(
            "text 'builtin': this Python comes without pydoc_data.topics; "
            "install the full standard library, or name a text file instead"
        ) from None
    return topics


def _wikitext2(part: Part) -> str:
    split = {"calibration": "train", "evaluation": "test"}[part]
    rows = _dataset("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    return "\n\n".join(row["text"] for row in rows)


def _c4(part: Part) -> str:
    split, shards = {"calibration": ("train", 1024), "evaluation": ("validation", 8)}[part]
    files = {split: f"en/c4-{split}.00000-of-{shards:05d}.json.gz"}
    rows = _dataset("c4", "allenai/c4", data_files=files, split=split, streaming=True)
    return " ".join(row["text"] for row in itertools.islice(rows, C4_DOCUMENTS))


def _dataset(name: str, *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
    need("datasets", f"text {name!r}")
    from datasets import load_dataset

    try:
        yield from load_dataset(*args, **options)
    except OSError as error:  # What `datasets` and the hub client raise without a network derives from it.
        raise ConnectionError(
            f"text {name!r}: {args[0]} cannot be downloaded ({error}); name a text file or 'builtin' instead"
        ) from error


def _read_file(path: Path) -> str:
    check_source(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text {str(path)!r} is not UTF-8 (byte {error.object[error.start]:#04x} at offset {error.start}); "
            "expected a plain text file"
        ) from None
    if not text.strip():
        raise ValueError(f"text {str(path)!r} is empty; expected some text")
    return text


def tokenize(tokenizer: Any, text: str) -> Int[np.ndarray, "tokens"]:
    """All tokens of a text, without special tokens, as perplexity and calibration take them."""
    # `verbose=False`: a text longer than the model's context is what is wanted here.
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def windows(
    tokens: Integer[Array | np.ndarray, "tokens"], length: int, count: int | None = None, *, first: int | None = None
) -> Int[np.ndarray, "n length"]:
    """Consecutive non-overlapping windows; what does not fill a window is left out.

    Args:
        tokens: integers [T].
        length: tokens of a window.
        count: at most this many windows, from the start; None for all.
        first: a token that begins every window, before `length - 1` tokens of the text (`ModelConfig.first_token`).

    Returns:
        int32 [n, length], n at least 1.

    Raises:
        ValueError: the tokens do not fill one window, or a number is below 1.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
        raise ValueError(f"tokens have shape {tokens.shape}; expected one axis")
    if not np.issubdtype(tokens.dtype, np.integer) and tokens.size:
        raise ValueError(f"tokens have dtype {tokens.dtype}; expected integers")
    if length < 1 or (count is not None and count < 1):
        raise ValueError(f"window length is {length} and count is {count}; expected at least 1 of each")
    if first is not None:
        if length < 2:
            raise ValueError(f"window length is {length}; expected at least 2, one of them the first token")
        rest = windows(tokens, length - 1, count)
        return np.concatenate([np.full((len(rest), 1), first, np.int32), rest], axis=1)
    if len(tokens) < length:
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than one window of {length}; "
            "give a longer text or a shorter window"
        )
    n = min(len(tokens) // length, count or len(tokens))
    return tokens[: n * length].reshape(n, length).astype(np.int32)


def batches(rows: Int[np.ndarray, "n length"], batch_size: int = 1) -> list[Int[Array, "_B length"]]:
    """Rows in runs of `batch_size`, the last one possibly shorter, as the model takes them.

    Raises:
        ValueError: the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; expected at least 1")
    return [jnp.asarray(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
