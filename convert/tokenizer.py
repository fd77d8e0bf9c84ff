"""Tokenizers: from a checkpoint's own files, or rebuilt from a GGUF file's metadata (without PyTorch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vptq_jax.convert.files import TOKENIZER_FILES

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

# How text is cut before byte-pair merges, by tokenizer.ggml.pre. These are the published rules of each vocabulary.
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "tekken")
_GPT2_LIKE = ("gpt-2", "default", "smollm")


def load_tokenizer(directory: str | Path) -> Any | None:
    """The tokenizer whose files lie in a directory, or None if there are none.

    Raises:
        ValueError: the files are there but unusable.
    """
    directory = Path(directory)
    if not any((directory / name).is_file() for name in (*TOKENIZER_FILES[:2], "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions too
        raise ValueError(
            f"the tokenizer files in {directory} cannot be used ({type(error).__name__}: {error}); "
            "restore or delete them"
        ) from error


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Any | None:
    """The tokenizer that a GGUF file's `tokenizer.*` metadata describes, or None if there is none.

    Byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`) vocabularies, with special tokens,
    BOS and EOS rules and the chat template.

    Raises:
        ValueError: metadata that is missing or does not fit together.
        NotImplementedError: another vocabulary type or pre-tokenizer.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    tokens = _tokens(metadata)
    builders: dict[str, Callable[[Mapping[str, Any], list[str]], Tokenizer]] = {"gpt2": _byte_level, "llama": _spm}
    if kind not in builders:
        raise NotImplementedError(
            f"the GGUF tokenizer is of type {kind!r}; supported are {', '.join(builders)}. "
            "Convert from the Hugging Face checkpoint instead"
        )
    tokenizer = builders[kind](metadata, tokens)
    _add_special_tokens(tokenizer, metadata, tokens)
    special = _special_names(metadata, tokens)
    _add_template(tokenizer, metadata, special, sentencepiece=kind == "llama")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError("tokenizer.ggml.tokens is missing or no list of strings")
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens holds {len(tokens) - len(set(tokens))} duplicates; expected none")
    return tokens


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    rule = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = next((m for m in merges if len(m) != 2 or m[0] not in vocabulary or m[1] not in vocabulary), None)
    if unknown is not None:
        raise ValueError(f"tokenizer.ggml.merges holds {' '.join(unknown)!r}, whose parts are not in the vocabulary")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule in _WHOLE_WORDS_FIRST))
    if rule in _SPLITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLITS[rule]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif rule in _GPT2_LIKE:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if rule == "smollm" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        raise NotImplementedError(
            f"the GGUF pre-tokenizer {rule!r} is not supported; supported are {', '.join([*_GPT2_LIKE, *_SPLITS])}. "
            "Convert from the Hugging Face checkpoint instead"
        )
    if rule in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spm(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores is missing or not of length {len(tokens)}, the vocabulary's")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_from_scores(vocabulary, scores),
            unk_token=_token(tokens, unknown, "unknown_token_id"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if prefix else []))
    return tokenizer


def _merges_from_scores(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first: what SentencePiece BPE does at run time."""
    merges = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]


def _token(tokens: list[str], index: Any, what: str) -> str:
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ValueError(f"tokenizer.ggml.{what} is {index!r}; expected an id below {len(tokens)}")
    return tokens[index]


def _special_names(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    found = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: _token(tokens, index, keys[name]) for name, index in found.items() if index is not None}


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type has {len(kinds)} entries; expected {len(tokens)}")

    def of_kind(kind: int) -> list[AddedToken]:
        special = kind == _CONTROL
        return [
            AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == kind
        ]

    tokenizer.add_special_tokens(of_kind(_CONTROL))
    tokenizer.add_tokens(of_kind(_USER_DEFINED))


def _add_template(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], special: dict[str, str], *, sentencepiece: bool
) -> None:
    """BOS and EOS around every text, where the file (or the vocabulary's custom) says so."""
    rule = metadata.get("tokenizer.ggml.pre")
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", sentencepiece or rule in _WHOLE_WORDS_FIRST)
    before = [special["bos_token"]] if adds_bos and "bos_token" in special else []
    after = [special["eos_token"]] if metadata.get("tokenizer.ggml.add_eos_token") and "eos_token" in special else []
    steps: list[Any] = [] if sentencepiece else [processors.ByteLevel(trim_offsets=False)]
    if before or after:
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(before + after)]
        pair = [f"{token}:1" for token in before] + ["$B:1"] + [f"{token}:1" for token in after]
        steps.append(
            processors.TemplateProcessing(
                single=[*before, "$A", *after], pair=[*before, "$A", *after, *pair], special_tokens=ids
            )
        )
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
