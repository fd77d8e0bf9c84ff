"""Changes to files: bytes and JSON values that nobody should have written."""

import json
import random
from typing import Any

NASTY = [
    None, [], {}, "", "x", -1, 0, 1, 2, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**400, 1 << 31, 1 << 63, True,
    "x" * 5000, "\x1b[31mred\x07", "../../../escaped", "a\x00b", "\ud800", [None], [1] * 50, {"a": {"b": [1, {}]}},
    False, [[[[]]]], "float16", "int4", "7", -(1 << 62), 1e-300,
]  # fmt: skip


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one fault: flipped bits, a cut, a piece inserted, removed, repeated or overwritten."""
    if not data:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
    # Headers matter more than data.
    at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 400))
    size = rng.choice([1, 2, 4, 8, 64, 1000])
    piece = data[at : at + size]
    kind = rng.choice(["flip", "cut", "insert", "remove", "repeat", "overwrite", "number"])
    if kind == "flip":
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + bytes(rng.randrange(256) for _ in range(size)) + data[at:]
    if kind == "remove":
        return data[:at] + data[at + size :]
    if kind == "repeat":
        return data[:at] + piece * rng.randrange(2, 5) + data[at + size :]
    if kind == "number":
        number = rng.choice([0, 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
        return data[:at] + number.to_bytes(8, "little") + data[at + 8 :]
    return data[:at] + bytes(rng.choice([0, 255]) for _ in piece) + data[at + size :]


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A JSON value with one place changed: another value, a key less, a key more, a key renamed."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    owner, key = rng.choice(places)
    kind = rng.choice(["value", "value", "value", "value", "delete", "rename", "number"])
    if kind == "delete":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[rng.choice(["x", "\x1b[2J", "y" * 3000, str(key).upper(), f"{key} "])] = owner.pop(key)
    elif kind == "number" and isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
        owner[key] = rng.choice(
            [owner[key] + 1, owner[key] * 2, -owner[key], owner[key] * 1000, float(owner[key]) + 0.5]
        )
    else:
        owner[key] = rng.choice(NASTY)
    return value


def _places(value: Any):
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in entries:
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def dumps(value: Any) -> bytes:
    """JSON as a file holds it; surrogates stay escapes."""
    return json.dumps(value).encode()
