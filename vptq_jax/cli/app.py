"""The commands put together, and what every one of them does with errors."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from vptq_jax.cli import bench, convert, evaluate, generate, inspect, quantize, quickstart, tune
from vptq_jax.cli.terminal import printable

app = typer.Typer(
    name="vptq-jax",
    help="Quantizes language models to 1 to 4 bits per weight with VPTQ, and runs them. "
    "Begin with [bold]vptq-jax quickstart[/bold]; every command has examples in its own --help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _command in (
    quickstart.quickstart, quantize.quantize, tune.tune, generate.generate, generate.chat,
    evaluate.evaluate, convert.convert, inspect.inspect,
):  # fmt: skip
    app.command(name="eval" if _command is evaluate.evaluate else None)(_command)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"vptq-jax {version('vptq_jax')} (jax {version('jax')}, flax {version('flax')})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere in the command.")
    ] = False,
) -> None:
    # `main` takes --debug out before parsing, so that it works behind a command too; here it is for the help.
    del version, debug


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 done, 1 the input does not work, 2 wrong usage, 130 interrupted.

    Whatever goes wrong becomes one line on standard error; with --debug the traceback is shown instead.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may know fewer characters than a model
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # No advice about PyTorch on the terminal.
    warnings.showwarning = lambda message, *_, **__: _complain(str(message), "warning")
    if not debug:
        _silence_threads()
    try:
        app(args=[word for word in arguments if word != "--debug"], prog_name="vptq-jax")
    except SystemExit as stop:
        if stop.code == 130:
            _complain("interrupted")
        raise
    except KeyboardInterrupt:
        _complain("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # nobody reads the rest, as in `vptq-jax inspect out | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except BaseException as error:  # libraries in Rust end with a kind of their own, which is no Exception
        if debug:
            raise
        _complain(describe(error))
        sys.exit(1)


def _silence_threads() -> None:
    """Keeps threads of libraries from printing tracebacks of their own about what `main` reports in a line."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.excepthook = lambda *_: None
    sys.unraisablehook = lambda *_: None
    threading.excepthook = lambda *_: None


def describe(error: BaseException) -> str:
    """What an error says, in one line that a terminal can show."""
    text = str(error).strip()
    if not isinstance(error, _WORDED) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        text += " (--debug shows where)"
    return printable(text)


_WORDED = (ValueError, OSError, NotImplementedError, ImportError)
"""What the library raises for input that it cannot work with; other errors say what they are."""


def _complain(message: str, kind: str = "error") -> None:
    style = "bold red" if kind == "error" else "yellow"
    line = Text(f"{kind}: ", style=style) + Text(printable(message))
    Console(stderr=True, soft_wrap=True).print(line, highlight=False)
