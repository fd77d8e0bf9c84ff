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
    """Turns a growing list of token ids into text, never ending inside a character, in time linear in its length.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the token ids before; they decide about leading spaces.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # What is decoded: tokens whose text is out, which decide about spaces, and those behind them.
        self._known = list(prompt[-_CONTEXT:])
        self._open: list[int] = []
        self._count = 0  # tokens taken in
        self._out = 0  # characters of the open tokens that are out

    def push(self, tokens: Sequence[int]) -> str:
        """All tokens so far in, the text that is new and complete out."""
        self._open += tokens[self._count :]
        self._count = len(tokens)
        text = self._text()
        whole = text.rstrip(_INCOMPLETE)
        new = whole[self._out :]
        if new and whole == text:  # nothing is left that later tokens could change
            self._known, self._open, self._out = self._open, [], 0
        else:
            self._out += len(new)
        return new

    def finish(self) -> str:
        """The text that is left, which may end in replacement characters."""
        return self._text()[self._out :]

    def _text(self) -> str:
        before = self._decode(self._known)
        whole = self._decode([*self._known, *self._open])
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._open)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
