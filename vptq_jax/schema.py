"""Typed and bounded reads of what comes from outside: JSON objects of checkpoints, metadata of GGUF files.

A `Reader` gathers problems, so that a checkpoint's faults are reported together, in words for whoever holds the file.
(pydantic and msgspec stop at the first fault of a structure, or word it for programmers, and every importer would have
to install them; what is needed of them is this page.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

REQUIRED = object()
"""Default of a field that must be there."""

INT32 = (1 << 31) - 1
_SHOWN = 80


def short(value: Any) -> str:
    """A value for a message: `repr`, which has no control characters, without the kilobytes that it may have."""
    if isinstance(value, str) and len(value) > 2 * _SHOWN:
        value = value[: 2 * _SHOWN]
    text = ascii(value) if _has_surrogates(value) else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _has_surrogates(value: Any) -> bool:
    return isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def bounds(value: int, low: int, high: int) -> str:
    """What was expected of a number that lies outside."""
    return f"a whole number of at least {low}" if value < low else f"a whole number of at most {high}"


class Reader:
    """Reads the fields of one object; a field that is not as expected is noted in `problems` and read as its default.

    Args:
        raw: the object.
        prefix: what its field names begin with in messages, such as `rope_parameters.`.
        problems: where they go; a new list by default.
    """

    def __init__(self, raw: Mapping[str, Any], prefix: str = "", problems: list[str] | None = None):
        self.raw, self.prefix = raw, prefix
        self.problems: list[str] = [] if problems is None else problems

    def read(self, key: str, kinds: tuple[type, ...], expected: str, default: Any = REQUIRED) -> Any:
        """A value of one of some types; None where a required one is missing or wrong."""
        value = self.raw.get(key, default)
        if value is REQUIRED:
            self.problems.append(f"{self.prefix}{key} is missing; expected {expected}")
            return None
        if value is default or (value is None and default is None):
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return self.refuse(key, expected, default)
        return value

    def refuse(self, key: str, expected: str, default: Any = None) -> Any:
        """Notes that a field is not what was expected."""
        self.problems.append(f"{self.prefix}{key} is {short(self.raw.get(key))}; expected {expected}")
        return None if default is REQUIRED else default

    def integer(self, key: str, default: Any = REQUIRED, *, low: int = -INT32, high: int = INT32) -> Any:
        """A whole number from `low` to `high`."""
        value = self.read(key, (int,), "a whole number", default)
        if value is None or value is default or low <= value <= high:
            return value
        return self.refuse(key, bounds(value, low, high), default)

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A finite number, as a float."""
        value = self.read(key, (int, float), "a number", default)
        if value is None or value is default:
            return value
        return float(value) if is_finite(value) else self.refuse(key, "a finite number", default)

    def boolean(self, key: str, default: Any = REQUIRED) -> Any:
        """True or false."""
        return self.read(key, (bool,), "true or false", default)

    def string(self, key: str, default: Any = REQUIRED) -> Any:
        """A text."""
        return self.read(key, (str,), "a text", default)

    def items(self, key: str, kinds: tuple[type, ...], expected: str, default: Any = REQUIRED) -> Any:
        """A list whose entries are all of some types."""
        value = self.read(key, (list,), f"a list of {expected}", default)
        if value is None or value is default:
            return value
        wrong = next(
            (e for e in value if not isinstance(e, kinds) or (isinstance(e, bool) and bool not in kinds)), None
        )
        if wrong is None and all(entry is not None for entry in value):
            return value
        self.problems.append(f"{self.prefix}{key} holds {short(wrong)}; expected a list of {expected}")
        return None if default is REQUIRED else default

    def object(self, key: str, default: Any = None) -> Reader | None:
        """A reader of an object inside this one."""
        value = self.read(key, (Mapping,), "a JSON object", default)
        return None if value is None else Reader(value, f"{self.prefix}{key}.", self.problems)
