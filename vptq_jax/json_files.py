"""Finding a checkpoint's directory, and reading its JSON files without trusting them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vptq_jax.extras import need
from vptq_jax.schema import short

MAX_JSON_BYTES = 64 << 20
"""No config or shard index comes near this; a hostile file may."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that make up a Hugging Face tokenizer."""

_HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", *TOKENIZER_FILES)


def resolve_directory(path_or_id: str | Path) -> Path:
    """A local checkpoint directory, downloading a hub id (only the files that are needed) if it is not a path.

    Raises:
        FileNotFoundError: neither a local path nor a repository that can be fetched.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    text = str(path_or_id)
    if not _looks_like_hub_id(text):
        raise FileNotFoundError(f"{text!r} does not exist, and is not a hub id of the form 'organization/name'")
    need("huggingface_hub", f"fetching {text} from the Hugging Face hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Some repositories hold the weights a second time, in subfolders or as consolidated.safetensors.
        return Path(
            snapshot_download(text, allow_patterns=list(_HUB_PATTERNS), ignore_patterns=["*/*", "consolidated*"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{text!r} is no local path, and it could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}); "
            "check the spelling, the network, and `hf auth login` for gated models"
        ) from error


def _looks_like_hub_id(text: str) -> bool:
    parts = text.split("/")
    return len(parts) == 2 and all(parts) and not text.startswith((".", "~")) and "\\" not in text


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object, refusing duplicate keys, nonsense nesting and anything that is not an object.

    Raises:
        ValueError: names `what` and the fault.
    """
    try:
        value = json.loads(raw, object_pairs_hook=_no_duplicates, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"{what} nests too deeply to be a checkpoint's JSON") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{what} is not usable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds a JSON {type(value).__name__}; expected an object")
    return value


def _integer(text: str) -> int:
    """A whole number of at most 64 bits: no format has larger ones, and no float holds much larger ones."""
    if len(text) > 20 or abs(int(text)) >= 1 << 64:
        raise ValueError(f"the number {text[:20]}... has more than 64 bits")
    return int(text)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {short(key)} occurs twice in one object")
            seen.add(key)
    return result


def read_json(path: Path) -> dict[str, Any]:
    """`parse_json` of a file of sane size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: too large, or not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; expected at most {MAX_JSON_BYTES} for a JSON file")
    return parse_json(path.read_bytes(), str(path))
