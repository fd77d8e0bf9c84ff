"""Text to token ids, and token ids back to text piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# How many tokens of the prompt are decoded along: enough for a word's leading space, or the
# first bytes of a character that the prompt ends within.
_CONTEXT = 8
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True, what: str = "the prompt") -> list[int]:
    """Token ids of a text, by default with the special tokens that the tokenizer adds; errors call it `what`.

    Raises:
        ValueError: there is no tokenizer, or the text is empty or holds half of a character.
    """
    if tokenizer is None:
        raise ValueError(
            f"the model has no tokenizer, so {what} must be given as token ids; or in a LanguageModel with one"
        )
    if not text:
        raise ValueError(f"{what} is empty; expected some text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds {text[error.start]!a} at position {error.start}, which is no character; expected UTF-8"
        ) from None
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


class TextStream:
    """Turns a growing list of token ids into text, never ending inside a character.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the token ids before; they decide about leading spaces.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._context = list(prompt[-_CONTEXT:])
        self._tokens: list[int] = []
        self._text = ""

    def push(self, tokens: Sequence[int]) -> str:
        """All tokens so far in, the text that is new and complete out."""
        self._tokens = list(tokens)
        return self._emit(self._decoded().rstrip(_INCOMPLETE))

    def finish(self) -> str:
        """The text that is left, which may end in replacement characters."""
        return self._emit(self._decoded())

    def _emit(self, text: str) -> str:
        new = text[len(self._text) :] if text.startswith(self._text) else ""
        self._text += new
        return new

    def _decoded(self) -> str:
        before = self._decode(self._context)
        whole = self._decode([*self._context, *self._tokens])
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
