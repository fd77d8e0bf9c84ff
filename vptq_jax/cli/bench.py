"""`vptq-jax bench`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vptq_jax.cli import common

if TYPE_CHECKING:
    import rich.table

app = typer.Typer(
    no_args_is_help=True,
    help="Measures speed on this machine, with random weights.\n\n"
    "Examples:\n\n"
    "    vptq-jax bench matmul --spec v8-k256-256 --spec v8-k65536 --shape 14336x4096 --rows 1 --rows 8\n\n"
    "    vptq-jax bench decode --shape llama2-7b --spec v8-k256-256 --batch 1 --batch 8\n\n"
    "    vptq-jax bench quantize --spec v6-k4096 --shape 4096x4096",
)

Specs = Annotated[list[str] | None, typer.Option("--spec", help="Format of the weights; may be repeated.")]
Shapes = Annotated[list[str] | None, typer.Option("--shape", metavar="OUTxIN", help="May be repeated.")]
Seed = Annotated[int, typer.Option(help="Of the random weights.")]


@app.command()
def matmul(
    spec: Specs = None,
    shape: Shapes = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Rows of the input; may be repeated.")] = None,
    seed: Seed = 0,
    json: common.JsonOption = False,
) -> None:
    """Times products with quantized weights beside bf16 ones, in device time (needs a GPU)."""
    shapes = [_parse_shape(text) for text in shape or ["14336x4096"]]
    specs = _check_specs(spec or ["v8-k256-256"])
    from vptq_jax.cli import benchmarking as bench

    times = bench.bench_matmul(specs, shapes, rows or [1], seed=seed)
    results = [dataclasses.asdict(time) | {"gigabytes_per_second": time.gigabytes_per_second} for time in times]
    _report(bench.environment(), results, json=json)


@app.command()
def decode(
    shape: Annotated[str, typer.Option(help="A model's shape, such as llama2-7b; weights are random.")] = "llama2-7b",
    spec: Specs = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Texts at a time; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after one prompt token.")] = 256,
    dense: Annotated[bool, typer.Option(help="Also time the model in bf16.")] = True,
    seed: Seed = 0,
    json: common.JsonOption = False,
) -> None:
    """Times the decode loop of a whole model: tokens per second and memory."""
    specs = _check_specs(spec or ["v8-k256-256"])
    from vptq_jax.cli import benchmarking as bench

    speeds = bench.bench_decode(shape, specs, batches=batch or [1], new_tokens=tokens, dense=dense, seed=seed)
    _report(bench.environment(), [dataclasses.asdict(speed) for speed in speeds], json=json)


@app.command()
def quantize(
    spec: Specs = None,
    shape: Annotated[str, typer.Option(metavar="OUTxIN", help="Of the weight.")] = "4096x4096",
    seed: Seed = 0,
    json: common.JsonOption = False,
) -> None:
    """Times the quantization of one weight, compilation excluded."""
    out_features, in_features = _parse_shape(shape)
    specs = _check_specs(spec or ["v8-k256-256"])
    from vptq_jax.cli import benchmarking as bench

    _report(bench.environment(), bench.bench_quantize(specs, out_features, in_features, seed=seed), json=json)


def _parse_shape(text: str) -> tuple[int, int]:
    out_features, _, in_features = text.partition("x")
    if not (out_features.isdigit() and in_features.isdigit() and int(out_features) and int(in_features)):
        raise ValueError(f"--shape is {text!r}; expected OUTxIN, such as 14336x4096")
    return int(out_features), int(in_features)


def _check_specs(specs: Sequence[str]) -> list[str]:
    from vptq_jax.spec import VQSpec

    return [str(VQSpec.parse(spec)) for spec in specs]


def _report(environment: dict[str, str], results: list[dict[str, Any]], *, json: bool) -> None:
    if json:
        common.print_json({**environment, "results": results})
        return
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    common.out.print(_table(results))


def _table(results: list[dict[str, Any]]) -> rich.table.Table:
    from rich.table import Table

    table = Table()
    for name in results[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for result in results:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in result.values()))
    return table
