"""`vptq-jax inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vptq_jax.cli import common

if TYPE_CHECKING:
    import rich.table


def inspect(
    model: common.ModelArgument,
    layers: Annotated[bool, typer.Option("--layers", help="One line for every layer, also where many agree.")] = False,
    json: common.JsonOption = False,
) -> None:
    """Prints a model's layers, their formats and their bits, without reading its weights.

    Bits are counted as stored, over the number of weights; "nominal" counts the indices alone.

    Examples:

        vptq-jax inspect out

        vptq-jax inspect path/to/vptq-model --layers --json
    """
    from vptq_jax.convert.inspect import inspect as inspect_checkpoint

    facts = inspect_checkpoint(model)
    if json:
        common.print_json(facts)
        return
    print(
        f"{facts['model_type']} ({facts['kind']}): {facts['num_layers']} layers, hidden size {facts['hidden_size']}, "
        f"vocabulary {facts['vocab_size']}, context {facts['max_position_embeddings']}, "
        f"{facts['weights'] / 1e6:.1f} M weights, {common.megabytes(facts['bytes'])}"
    )
    common.out.print(_table(facts["layers"] if layers else _merge(facts["layers"])))
    print(
        f"decoder layers: {facts['bits_total']:.3f} bits per weight with everything included, "
        f"{facts['bits_nominal']:.3f} nominal"
    )


def _merge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same kind, shape and format as one, with `*` for the layer number and a count."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        kind = ".".join("*" if part.isdigit() else part for part in row["path"].split("."))
        key = (kind, row["format"], row["out_features"], row["in_features"])
        total = merged.setdefault(key, row | {"path": kind, "bytes": 0, "count": 0, "weights": 0})
        total["count"] += 1
        for field in ("bytes", "weights"):
            total[field] += row[field]
        total["bits_total"] = 8 * total["bytes"] / total["weights"]
    return list(merged.values())


def _table(rows: list[dict[str, Any]]) -> rich.table.Table:
    from rich.table import Table

    table = Table()
    table.add_column("layer", no_wrap=True)
    for heading in ("count", "shape", "format", "nominal bits", "stored bits", "size"):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for row in rows:
        table.add_row(
            row["path"],
            str(row.get("count", 1)),
            f"{row['out_features']} x {row['in_features']}",
            row["format"],
            f"{row['bits_nominal']:.3f}",
            f"{row['bits_total']:.3f}",
            common.megabytes(row["bytes"]),
        )
    return table
