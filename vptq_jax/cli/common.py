"""What several commands share: options, checks made before work starts, and output."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from vptq_jax.lm.language_model import LanguageModel
    from vptq_jax.lm.streamed import StreamedModel

# In a file or a pipe a table takes the width that it needs.
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
"""Results, on standard output."""

log = Console(stderr=True, soft_wrap=True)
"""What happens meanwhile, on standard error, so that a program may read the results."""

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face directory or hub id, a directory in VPTQ format, a .gguf file, "
        "or a directory saved by this program.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a model that is already at the output.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="bfloat16|float32",
        help="Type of the parameters that are not quantized; as stored when not given.",
        show_default=False,
    ),
]


def parse_dtype(text: str | None) -> Any:
    """The JAX type of a `--dtype`, None for none.

    Raises:
        ValueError: another type than bfloat16 and float32.
    """
    if text not in (None, "bfloat16", "float32"):
        raise ValueError(f"--dtype is {text!r}; expected bfloat16 or float32")
    import jax.numpy as jnp

    return None if text is None else jnp.dtype(text)


def load_model(path: str, dtype: str | None = None) -> LanguageModel:
    """The model, with a line about it on standard error while it is read."""
    target = parse_dtype(dtype)
    from vptq_jax.convert.loading import load

    with log.status(f"Loading {path}"):
        return load(path, dtype=target)


def open_model(path: str, dtype: str | None = None) -> LanguageModel | StreamedModel:
    """The model to be quantized: where its format allows it, weights are read one by one as they are needed.

    Raises:
        ValueError: besides what `load` raises, all weights that are not finite: better now than when
            their turn comes.
    """
    target = parse_dtype(dtype)
    from vptq_jax.convert.gguf import open_gguf
    from vptq_jax.convert.hf import open_hf
    from vptq_jax.convert.loading import open_streamed, recognize
    from vptq_jax.problems import raise_problems

    kind, _ = recognize(path)
    if kind not in ("hf", "gguf"):
        return load_model(path, dtype)
    with log.status(f"Checking the weights of {path}"):
        opened = open_hf(path) if kind == "hf" else open_gguf(path)
        raise_problems(f"{path} cannot be quantized", opened.content_problems())
        return open_streamed(path, dtype=target)


def tokenizer_of(model: LanguageModel | StreamedModel, path: str) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: it came without one.
    """
    if model.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer; put tokenizer.json and tokenizer_config.json beside the weights")
    return model.tokenizer


def context_for(model: LanguageModel, context: int | None) -> int:
    """The context asked for, or the usual 2048 where the model allows it."""
    return min(2048, model.config.context_length) if context is None else context


def workdir_of(output: Path) -> Path:
    """The work directory of a command that is given none."""
    return output.with_name(f"{output.name}.partial")


@contextlib.contextmanager
def hint(text: str) -> Iterator[None]:
    """Says how to go on after an interrupt."""
    try:
        yield
    except KeyboardInterrupt:
        log.print(text, highlight=False)
        raise


def megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def print_json(value: Any) -> None:
    """One JSON object on standard output; dataclasses become objects, NaN and infinity become null."""
    print(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
