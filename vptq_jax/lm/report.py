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

from vptq_jax.extras import need
from vptq_jax.files import write_atomic

if TYPE_CHECKING:
    import rich.table


_JSON = "quant_report.json"
_PICTURES = ("error_by_layer.png", "bits_and_error.png")
REPORT_FILES = (_JSON, *_PICTURES)
"""What `QuantReport.save` writes."""


@dataclasses.dataclass(frozen=True)
class QuantReport:
    """Outcome of `quantize`.

    Attributes:
        operators: one row per quantized operator in forward order: `path`, `spec`, `out_features`, `in_features`,
            `bits_nominal` and `bits_total` (bits per weight; indices alone, and everything stored), relative
            proxy errors `error_kmeans`, `error_pass`, `error_residual`, `error_refine_1` ... as far as the spec has
            them, `error` (of what is stored), `damping`, `dead_columns`, `rounds`, `seconds`, and `wide` (tensors that
            are stored in float32 because float16 would have changed the result; only where there are any).
        config: what was asked for.
        seconds: wall-clock seconds by stage.
        peak_memory: bytes by place, `host` and, where the backend counts it, `device`.
        fingerprint: digest of everything that the result depends on: model, configuration, calibration.
    """

    operators: list[dict[str, Any]]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_memory: dict[str, int] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""

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

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `quant_report.json` and the pictures of `plot` into a directory."""
        self.save_json(Path(directory) / _JSON)
        self.plot(directory)

    def table(self) -> rich.table.Table:
        """A table for `rich.print`: a line per operator, the means below."""
        need("rich", "a table for the terminal")
        from rich import box
        from rich.table import Table

        stages = self._stages()
        specs = {row["spec"] for row in self.operators}
        notes = [_notes(row, self.config.get("damping", 0.0)) for row in self.operators]
        table = Table(
            title="Quantized operators" + (f", {specs.copy().pop()}" if len(specs) == 1 else ""),
            caption="bits: indices alone, and everything stored; errors: tr(E H E^T) / tr(W H W^T) after each stage",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_footer=True,
        )
        table.add_column("operator", f"{len(self.operators)} operators", no_wrap=True)
        if len(specs) > 1:
            table.add_column("spec", no_wrap=True)
        for name, footer in (("bits", self.bits_nominal), ("stored", self.bits_total)):
            table.add_column(name, f"{footer:.3f}", justify="right", no_wrap=True)
        for stage, field in stages.items():
            mean = np.mean([row[field] for row in self.operators if field in row])
            table.add_column(stage, f"{mean:.4f}", justify="right", no_wrap=True)
        seconds = sum(row["seconds"] or 0 for row in self.operators)
        table.add_column("seconds", f"{seconds:.1f}", justify="right", no_wrap=True)
        if any(notes):
            table.add_column("notes")
        for row, note in zip(self.operators, notes, strict=True):
            table.add_row(
                _short_path(row["path"]),
                *([row["spec"]] if len(specs) > 1 else []),
                f"{row['bits_nominal']:.3f}",
                f"{row['bits_total']:.3f}",
                *(_number(row.get(field), "{:.4f}") for field in stages.values()),
                _number(row["seconds"], "{:.1f}"),
                *([note] if any(notes) else []),
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
        pictures = dict(zip(_PICTURES, (self._draw_layers, self._draw_bits), strict=True))
        return [save_picture(directory / name, draw) for name, draw in pictures.items()]

    def _stages(self) -> dict[str, str]:
        """Heading and field of the stages that any operator went through, in order; refinement by its outcome."""
        stages = {"k-means": "error_kmeans", "pass": "error_pass", "residual": "error_residual"}
        found = {name: field for name, field in stages.items() if any(field in row for row in self.operators)}
        refined = any(row.get("rounds") for row in self.operators)
        return found | ({"refined": "error"} if refined else {})

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
    counts = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return peak | ({"device": max(counts)} if any(counts) else {})


def save_picture(path: Path, draw: Callable[[Any], None]) -> Path:
    """Writes a PNG; `draw` gets the axes, whose vertical one is logarithmic."""
    import io

    need("matplotlib", "a picture of the report")
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


def _short_path(path: str) -> str:
    """`3.q_proj` for `model.layers.3.self_attn.q_proj`."""
    parts = path.split(".")
    return f"{parts[2]}.{parts[-1]}" if path.startswith("model.layers.") else path


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
    if row.get("wide"):
        notes.append(f"{', '.join(row['wide'])} in float32")
    return ", ".join(notes)
