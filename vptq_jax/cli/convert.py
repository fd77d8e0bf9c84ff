"""`vptq-jax convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vptq_jax.cli import common

if TYPE_CHECKING:
    from vptq_jax.convert.export import ExportPlan
    from vptq_jax.models.decoder import Decoder

FORMATS = ("orbax", "hf-vptq", "hf")


def convert(
    model: common.ModelArgument,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New directory.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMATS),
            help="orbax: this program's own. hf-vptq: the VPTQ community's. hf: plain Hugging Face, dequantized.",
        ),
    ] = "orbax",
    check: Annotated[
        bool, typer.Option("--check", help="Say what would be done and what is in the way; write nothing.")
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
    if to not in FORMATS:
        raise ValueError(f"--to is {to!r}; expected one of {', '.join(FORMATS)}")
    _check_destination(output, to, overwrite)
    # Parameters take another type on the way in, unless quantized layers become dense on the way out.
    loaded = common.load_model(model, None if to == "hf" else dtype)
    plan = None if to == "orbax" else _plan(loaded, to, dtype)
    facts = {"model": model, "output": str(output), "to": to, "bytes": _size(loaded, plan)}
    facts |= {"problems": plan.problems if plan else [], "notes": plan.notes if plan else []}
    if not check:
        facts["files"] = _write(loaded, model, output, plan, overwrite=overwrite, quiet=json)
    if json:
        common.print_json(facts)
    else:
        _print(facts, check=check)
    if check and facts["problems"]:
        raise typer.Exit(1)


def _check_destination(output: Path, to: str, overwrite: bool) -> None:
    from vptq_jax.convert.export import check_destination

    if to == "orbax":
        common.check_output(output, overwrite=overwrite)
    else:
        check_destination(output, overwrite=overwrite)
        common.check_writable(output)


def _plan(model: Decoder, to: str, dtype: str | None) -> ExportPlan:
    from vptq_jax.convert.export import plan_hf, plan_vptq

    return plan_hf(model, common.parse_dtype(dtype)) if to == "hf" else plan_vptq(model)


def _size(model: Decoder, plan: ExportPlan | None) -> int:
    import jax
    from flax import nnx

    return plan.nbytes if plan else sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def _write(
    model: Decoder, source: str, output: Path, plan: ExportPlan | None, *, overwrite: bool, quiet: bool
) -> list[str]:
    from vptq_jax import checkpoint
    from vptq_jax.convert.export import export

    metadata = checkpoint.read_metadata(source) if checkpoint.is_checkpoint(source) else {}
    if plan is not None:
        return export(model, output, plan, overwrite=overwrite, metadata=metadata, progress=not quiet)
    checkpoint.save(model, output, overwrite=overwrite, metadata=metadata)
    return [checkpoint.MANIFEST]


def _print(facts: dict[str, Any], *, check: bool) -> None:
    verb = "would be written" if check else "written"
    print(f"{facts['model']} -> {facts['output']} ({facts['to']}): {common.megabytes(facts['bytes'])} {verb}")
    for note in facts["notes"]:
        print(f"note: {note}")
    for problem in facts["problems"]:
        print(f"problem: {problem}")
