"""`vptq-jax convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vptq_jax.cli import common


def convert(
    model: common.ModelArgument,
    output: Annotated[Path, typer.Argument(help="New directory.", show_default=False)],
    to: Annotated[str, typer.Option(metavar="orbax|hf|hf-vptq", help="Format of the output.")] = "orbax",
    dtype: common.DtypeOption = None,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
) -> None:
    """Converts a model.

    Examples:

        vptq-jax convert model.gguf out
    """
    from vptq_jax import checkpoint

    common.check_output(output, overwrite=overwrite)
    checkpoint.save(common.load_model(model, dtype), output, overwrite=overwrite)
