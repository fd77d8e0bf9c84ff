"""Optional dependencies: whoever needs one says which extra of the package brings it."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from typing import Any

_EXTRAS = {
    "datasets": "data",
    "gguf": "gguf",
    "huggingface_hub": "lm",
    "jinja2": "lm",
    "matplotlib": "plot",
    "rich": "cli",
    "tokenizers": "lm",
    "tqdm": "lm",
    "transformers": "lm",
    "typer": "cli",
}
"""The extra of pyproject.toml that brings a module."""


def need(module: str, purpose: str) -> None:
    """Makes sure that an optional module can be imported.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        found = find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise ImportError(
            f"{purpose} needs {module}, which is not installed: pip install 'vptq_jax[{_EXTRAS[module]}]'"
        )


class ProgressBar(contextlib.nullcontext[Any]):
    """The progress bar that is not shown."""

    def __enter__(self) -> ProgressBar:
        return self

    def update(self, steps: int = 1) -> object:
        """Goes on by some steps."""

    def set_postfix_str(self, text: str) -> None:
        """Says what is being done."""


def progress_bar(shown: bool, **options: Any) -> Any:
    """A progress bar, for `with`; one that does nothing where it is not shown.

    Args:
        shown: whether there is one.
        options: those of tqdm.

    Raises:
        ImportError: tqdm is not installed.
    """
    if not shown:
        return ProgressBar()
    need("tqdm", "a progress bar (leave it out with progress=False)")
    from tqdm.auto import tqdm

    return tqdm(**options)


def byte_bar(shown: bool, total: int, what: str) -> Any:
    """`progress_bar` over the bytes of files that are read or written."""
    return progress_bar(shown, total=total, unit="B", unit_scale=True, desc=what)
