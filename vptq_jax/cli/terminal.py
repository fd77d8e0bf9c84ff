"""Text of unknown origin, made fit for a terminal."""

from __future__ import annotations

import sys
import unicodedata

_LONGEST = 480  # characters of a line


def printable(text: str) -> str:
    """One line of at most 480 characters without control characters: the beginning and the end of a longer text."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    line = "; ".join(line for line in lines if line).replace(":; ", ": ")
    line = "".join(character if _is_visible(character) else "\ufffd" for character in line)
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST * 2 // 3]} ... {line[-(_LONGEST // 3 - 5) :]}"
    return line


def shown(text: str) -> str:
    """What a model wrote: on a terminal without the characters that steer it, elsewhere as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def _is_visible(character: str) -> bool:
    """Whether a character is none that steers a terminal, reverses the direction of text or cannot be encoded."""
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs")
