"""`vptq-jax inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vptq_jax.cli import common

if TYPE_CHECKING:
    import rich.table

    from vptq_jax.models.decoder import Decoder
    from vptq_jax.models.linear import Linear, VQLinear


def inspect(
    model: common.ModelArgument,
    layers: Annotated[bool, typer.Option("--layers", help="One line for every layer, also where many agree.")] = False,
    json: common.JsonOption = False,
) -> None:
    """Prints a model's layers, their formats and their bits.

    Bits are counted as stored, over the number of weights; "nominal" counts the indices alone.

    Examples:

        vptq-jax inspect out

        vptq-jax inspect path/to/vptq-model --layers --json
    """
    facts = describe(common.load_model(model))
    if json:
        common.print_json({"model": model, **facts})
        return
    print(
        f"{facts['model_type']}: {facts['num_layers']} layers, hidden size {facts['hidden_size']}, "
        f"vocabulary {facts['vocab_size']}, context {facts['max_position_embeddings']}, "
        f"{facts['weights'] / 1e6:.1f} M weights, {common.megabytes(facts['bytes'])}"
    )
    common.out.print(_table(facts["layers"] if layers else _merge(facts["layers"])))
    print(
        f"decoder layers: {facts['bits_total']:.3f} bits per weight with everything included, "
        f"{facts['bits_nominal']:.3f} nominal"
    )


def describe(model: Decoder) -> dict[str, Any]:
    """Shapes, formats and sizes of a model as JSON values; weights of norms and biases are not counted."""
    linears = [_row(path, layer) for path, layer in model.linears().items()]
    tables = [("model.embed_tokens", model.embed_tokens), ("lm_head", model.lm_head)]
    layers = linears + [_row(path, layer) for path, layer in tables if layer is not None]
    weights = sum(row["weights"] for row in linears)
    config = model.config
    return {
        "model_type": config.model_type,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "weights": sum(row["weights"] for row in layers),
        "bytes": sum(row["bytes"] for row in layers),
        "bits_nominal": sum(row["bits_nominal"] * row["weights"] for row in linears) / weights,
        "bits_total": 8 * sum(row["bytes"] for row in linears) / weights,
        "layers": layers,
    }


def _row(path: str, layer: Linear | VQLinear) -> dict[str, Any]:
    from vptq_jax.convert.model_card import describe_layout
    from vptq_jax.models.linear import VQLinear

    out_features, in_features = layer.shape
    weights = out_features * in_features
    if isinstance(layer, VQLinear):
        form, nominal, stored = describe_layout(layer.layout), layer.layout.nominal_bits, layer.weight.nbytes
    else:
        form, stored = str(layer.weight.dtype), layer.weight.nbytes
        nominal = 8 * stored / weights
    return {
        "path": path,
        "format": form,
        "out_features": out_features,
        "in_features": in_features,
        "weights": weights,
        "bytes": stored,
        "bits_nominal": nominal,
        "bits_total": 8 * stored / weights,
    }


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
