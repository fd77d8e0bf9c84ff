"""`vptq-jax tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vptq_jax.cli import common
from vptq_jax.cli.options import options_of
from vptq_jax.tune.config import DEFAULTS, TuneConfig


@options_of(TuneConfig)
def tune(
    model: common.ModelArgument,
    teacher: Annotated[
        str, typer.Option(metavar="MODEL", help="The model that it was quantized from.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="New directory for the tuned model.", show_default=False)],
    text: Annotated[
        str,
        typer.Option(
            help="What to train on: self (what the teacher writes when it is given short starts), self+FILE (with "
            "starts from a file), or real text: wikitext2, c4, builtin, a UTF-8 file."
        ),
    ] = "self",
    length: Annotated[int, typer.Option(min=16, help="Tokens of a row.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 8,
    tuning: TuneConfig = DEFAULTS,
    seed: Annotated[int, typer.Option(min=0, help="Of the text that the teacher writes.")] = 0,
    workdir: Annotated[
        Path | None,
        typer.Option(
            help="Where text and progress wait, so that the same command continues after an interruption; OUT.partial "
            "when not given.",
            show_default=False,
        ),
    ] = None,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
) -> None:
    """Tunes a quantized model: its codebooks, scales and norms learn to predict what the full-precision model does.

    The model keeps its size. Half of what quantization to 2 bits costs comes back within 5 million tokens, a minute
    of a large GPU for a model of 135 million weights.

    Examples:

        vptq-jax tune out --teacher path/to/model --out tuned

        vptq-jax tune out --teacher model.gguf --out tuned --tokens 20000000 --batch-size 32 --text self+notes.txt
    """
    from vptq_jax.cli.tune_run import Text, run

    history = run(
        model,
        teacher,
        out,
        tuning,
        text=Text(text, length, batch_size, seed),
        workdir=workdir or common.workdir_of(out),
        overwrite=overwrite,
        quiet=json,
    )
    first, best = history.rows[0], history.rows[history.best]
    if json:
        common.print_json({"model": model, "output": str(out), **history.as_json()})
        return
    print(
        f"KL to the teacher {first['kl']:.4f} before, {best['kl']:.4f} now; the same most likely token after "
        f"{first['top1']:.1%} of the text before, {best['top1']:.1%} now; saved in {out}"
    )
