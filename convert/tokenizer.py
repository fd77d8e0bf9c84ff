"""The files of a tokenizer: reading and writing them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vptq_jax.extras import need
from vptq_jax.json_files import TOKENIZER_FILES
from vptq_jax.schema import short

_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


def load_tokenizer(directory: str | Path) -> Any | None:
    """The tokenizer whose files lie in a directory, or None if there are none.

    Raises:
        ValueError: the files are there but unusable, or name a chat template as no file may be named.
    """
    directory = Path(directory)
    if not any((directory / name).is_file() for name in (*TOKENIZER_FILES[:2], "vocab.json")):
        return None
    need("transformers", f"the tokenizer in {directory}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        tokenizer("a text")  # settings of the wrong type are met here, not at the first prompt
    except Exception as error:  # transformers and tokenizers raise bare Exceptions too
        raise ValueError(
            f"the tokenizer files in {directory} cannot be used ({type(error).__name__}: {short(str(error))}); "
            "restore or delete them"
        ) from error
    _check_template_names(tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Writes a tokenizer's files.

    Raises:
        ValueError: a chat template has a name that leads out of the directory.
        OSError: they cannot be written.
    """
    _check_template_names(tokenizer)
    try:
        tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions when a disk is full
        raise OSError(f"the tokenizer cannot be written to {directory}: {short(str(error))}") from error


def _check_template_names(tokenizer: Any) -> None:
    """Chat templates are saved in files of their names (some versions of transformers do not look at them)."""
    templates = getattr(tokenizer, "chat_template", None)
    for name in templates if isinstance(templates, Mapping) else ():
        if not isinstance(name, str) or not _TEMPLATE_NAME.fullmatch(name):
            raise ValueError(
                f"the tokenizer has a chat template named {short(name)}; expected letters, digits, '_' and '-'"
            )
