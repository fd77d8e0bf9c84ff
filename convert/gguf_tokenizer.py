"""Tokenizers rebuilt from a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vptq_jax.problems import raise_problems
from vptq_jax.schema import Reader, is_integer, short

_MOST_WORK = 1 << 30  # characters that are compared to find the merges of a vocabulary
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


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Any | None:
    """The tokenizer that a GGUF file's `tokenizer.*` metadata describes, or None if there is none.

    Byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`) vocabularies, with special tokens,
    BOS and EOS rules and the chat template.

    Raises:
        ValueError: metadata that is missing or does not fit together.
        NotImplementedError: another vocabulary type or pre-tokenizer.
    """
    if metadata.get("tokenizer.ggml.model") is None:
        return None
    _check_types(metadata)
    kind = metadata["tokenizer.ggml.model"]
    tokens = metadata["tokenizer.ggml.tokens"]
    builders: dict[str, Callable[[Mapping[str, Any], list[str]], Tokenizer]] = {"gpt2": _byte_level, "llama": _spm}
    if kind not in builders:
        raise NotImplementedError(
            f"the GGUF tokenizer is of type {short(kind)}; supported are {', '.join(builders)}. "
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


def _check_types(metadata: Mapping[str, Any]) -> None:
    """Raises ValueError unless everything under `tokenizer.` has the type and the length that it has to have."""
    fields = Reader(metadata)
    tokens = fields.items("tokenizer.ggml.tokens", (str,), "texts")
    fields.string("tokenizer.ggml.model")
    fields.string("tokenizer.ggml.pre", "default")
    fields.string("tokenizer.chat_template", None)
    fields.items("tokenizer.ggml.merges", (str,), "texts", [])
    scores = fields.items("tokenizer.ggml.scores", (int, float), "numbers", [])
    types = fields.items("tokenizer.ggml.token_type", (int,), "whole numbers", [])
    for key in ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"):
        fields.integer(f"tokenizer.ggml.{key}", None, low=0, high=len(tokens or ()) - 1)
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        fields.boolean(f"tokenizer.ggml.{key}", False)
    if tokens is not None and not tokens:
        fields.problems.append("tokenizer.ggml.tokens is empty; expected the vocabulary")
    for name, values in (("scores", scores), ("token_type", types)):
        if tokens and values and len(values) != len(tokens):
            fields.problems.append(f"tokenizer.ggml.{name} has {len(values)} entries; expected {len(tokens)}")
    if tokens and len(set(tokens)) != len(tokens):
        fields.problems.append(
            f"tokenizer.ggml.tokens holds {len(tokens) - len(set(tokens))} duplicates; expected none"
        )
    raise_problems("the GGUF tokenizer cannot be used", fields.problems)


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    rule = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = next((m for m in merges if len(m) != 2 or m[0] not in vocabulary or m[1] not in vocabulary), None)
    if unknown is not None:
        merge = short(" ".join(unknown))
        raise ValueError(f"tokenizer.ggml.merges holds {merge}, whose parts are not in the vocabulary")
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
            f"the GGUF pre-tokenizer {short(rule)} is not supported; "
            f"supported are {', '.join([*_GPT2_LIKE, *_SPLITS])}. Convert from the Hugging Face checkpoint instead"
        )
    if rule in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spm(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores:
        raise ValueError(f"tokenizer.ggml.scores is missing; expected {len(tokens)} numbers, one for each token")
    work = sum(len(token) ** 2 for token in tokens)
    if work > _MOST_WORK:
        raise ValueError(
            f"tokenizer.ggml.tokens holds texts of up to {max(map(len, tokens))} characters; expected words"
        )
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
    if not is_integer(index) or not 0 <= index < len(tokens):
        raise ValueError(f"tokenizer.ggml.{what} is {short(index)}; expected an id below {len(tokens)}")
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
