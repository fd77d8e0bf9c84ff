"""`vptq-jax convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vptq_jax.cli import common
from vptq_jax.cli.terminal import printable

if TYPE_CHECKING:
    from vptq_jax.convert.api import ConvertReport


def convert(
    model: common.ModelArgument,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New directory.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            metavar="orbax|hf-vptq|hf",
            help="orbax: this program's own. hf-vptq: the VPTQ community's. hf: plain Hugging Face, dequantized.",
        ),
    ] = "orbax",
    check: Annotated[
        bool, typer.Option("--check", help="Read everything, say what would be done and what is in the way.")
    ] = False,
    dtype: common.DtypeOption = None,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
) -> None:
    """Converts a model from any format that this program reads.

    Examples:

        vptq-jax convert model.gguf out

        vptq-jax convert path/to/vptq-checkpoint out

        vptq-jax convert out out-vptq --to hf-vptq --check

        vptq-jax convert out out-dense --to hf --dtype bfloat16
    """
    target = common.parse_dtype(dtype)
    from vptq_jax.convert.api import convert as convert_checkpoint

    report = convert_checkpoint(
        model,
        output,
        to=to,  # type: ignore[arg-type]  # checked there
        check=check,
        dtype=target,
        overwrite=overwrite,
        progress=not json,
    )
    if json:
        common.print_json(report.to_dict())
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(1)


def _print(report: ConvertReport) -> None:
    if report.ok:
        done = "written to" if report.written else "would be written to"
        print(f"{common.megabytes(report.bytes)} {done} {report.destination} ({report.kind} -> {report.to})")
        print(
            f"{report.model_type}, {report.quantized_layers} quantized and {report.dense_layers} dense layers, "
            f"{report.weights / 1e6:.1f} M weights"
        )
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"problem: {printable(problem)}")
