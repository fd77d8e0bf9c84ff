"""What quantizing a model did: a row per operator as JSON, table and pictures."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from vptq_jax.files import write_atomic

if TYPE_CHECKING:
    import rich.table


@dataclasses.dataclass(frozen=True)
class QuantReport:
    """Outcome of `quantize`.

    Attributes:
        operators: one row per quantized operator in forward order: `path`, `spec`, `out_features`, `in_features`,
            `bits_nominal` and `bits_total` (bits per weight; indices alone, and everything stored), relative
            proxy errors `error_kmeans`, `error_pass`, `error_residual`, `error_refine_1` ... as far as the spec has
            them, `error` (the final one), `damping`, `dead_columns`, `rounds`, `seconds`.
        config: what was asked for.
        seconds: wall-clock seconds by stage.
        peak_memory: bytes by place, `host` and, where the backend counts it, `device`.
    """

    operators: list[dict[str, Any]]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_memory: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def bits_nominal(self) -> float:
        """Index bits per weight over all quantized operators."""
        return self._bits("bits_nominal")

    @property
    def bits_total(self) -> float:
        """Stored bits per weight over all quantized operators, everything included."""
        return self._bits("bits_total")

    def _bits(self, field: str) -> float:
        sizes = np.array([row["out_features"] * row["in_features"] for row in self.operators], float)
        if not sizes.size:
            return float("nan")
        return float(np.average([row[field] for row in self.operators], weights=sizes))

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return dataclasses.asdict(self) | {
            "bits_nominal": self.bits_nominal if self.operators else None,
            "bits_total": self.bits_total if self.operators else None,
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `as_json`, whole or not at all."""
        write_atomic(path, (json.dumps(self.as_json(), indent=1) + "\n").encode())

    def table(self) -> rich.table.Table:
        """A table for `rich.print`: a line per operator, the means below."""
        from rich.table import Table

        stages = self._stages()
        table = Table(title="Quantized operators", caption="errors: tr(E H E') / tr(W H W')", show_footer=True)
        table.add_column("operator", footer=f"{len(self.operators)} operators", no_wrap=True)
        table.add_column("spec")
        right = {"justify": "right", "no_wrap": True}
        table.add_column("bits", f"{self.bits_nominal:.3f}", **right)
        table.add_column("stored", f"{self.bits_total:.3f}", **right)
        for stage in stages:
            values = [row[f"error_{stage}"] for row in self.operators if row.get(f"error_{stage}") is not None]
            table.add_column(stage.replace("_", " "), f"{np.mean(values):.4f}", **right)
        table.add_column("seconds", f"{sum(row['seconds'] or 0 for row in self.operators):.1f}", **right)
        table.add_column("notes")
        for row in self.operators:
            table.add_row(
                row["path"].removeprefix("model.layers."),
                row["spec"],
                f"{row['bits_nominal']:.3f}",
                f"{row['bits_total']:.3f}",
                *(_number(row.get(f"error_{stage}"), "{:.4f}") for stage in stages),
                _number(row["seconds"], "{:.1f}"),
                _notes(row, self.config.get("damping", 0.0)),
            )
        return table

    def plot(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Draws `error_by_layer.png` and `bits_and_error.png`; returns their paths.

        Raises:
            ValueError: no operator was quantized.
        """
        if not self.operators:
            raise ValueError("no operator was quantized; there is nothing to draw")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        pictures = {"error_by_layer.png": self._draw_layers, "bits_and_error.png": self._draw_bits}
        return [_save_picture(directory / name, draw) for name, draw in pictures.items()]

    def _stages(self) -> list[str]:
        """Names of the error columns, in the order in which they are computed."""
        return list(
            dict.fromkeys(key[6:] for row in self.operators for key in row if key.startswith("error_"))
        )

    def _by_kind(self) -> dict[str, list[dict[str, Any]]]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in self.operators:
            kinds.setdefault(row["path"].rpartition(".")[2], []).append(row)
        return kinds

    def _draw_layers(self, axes: Any) -> None:
        for kind, rows in self._by_kind().items():
            axes.plot([_layer(row["path"]) for row in rows], [row["error"] for row in rows], marker=".", label=kind)
        axes.set(xlabel="decoder layer", ylabel="relative proxy error", title="Error by layer and operator")

    def _draw_bits(self, axes: Any) -> None:
        for kind, rows in self._by_kind().items():
            axes.scatter([row["bits_total"] for row in rows], [row["error"] for row in rows], s=18, label=kind)
        axes.set(
            xlabel="stored bits per weight, everything included", ylabel="relative proxy error", title="Bits and error"
        )


def peak_memory() -> dict[str, int]:
    """Highest memory of this process so far in bytes: `host`, and `device` where the backend counts it."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    device = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats() or {}) and "peak_bytes_in_use" in stats]
    return peak | ({"device": max(device)} if device else {})


def _save_picture(path: Path, draw: Callable[[Any], None]) -> Path:
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small", ncols=2)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomic(path, content.getvalue())
    return path


def _layer(path: str) -> float:
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    return numbers[0] if numbers else float("nan")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _notes(row: Mapping[str, Any], damping: float) -> str:
    notes = []
    if row.get("dead_columns"):
        notes.append(f"{row['dead_columns']} dead inputs")
    if row.get("damping", 0.0) > 1.001 * damping:
        notes.append(f"damping {row['damping']:.3g}")
    return ", ".join(notes)
