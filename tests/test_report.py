"""The report: numbers, JSON, table, pictures."""

import io
import json

import pytest
from rich.console import Console

from vptq_jax.lm.report import QuantReport, peak_memory


def row(path, spec="v8-k256-256", **changes):
    values = {
        "path": path, "spec": spec, "out_features": 8, "in_features": 16, "bits_nominal": 2.0, "bits_total": 2.5,
        "error_kmeans": 0.4, "error_pass": 0.3, "error_residual": 0.2, "error_refine_1": 0.1, "error": 0.1,
        "damping": 0.01, "dead_columns": 0, "rounds": 1, "seconds": 1.5,
    }  # fmt: skip
    return values | changes


def report(*rows):
    rows = rows or [row(f"model.layers.{layer}.mlp.{name}_proj") for layer in range(3) for name in ("up", "down")]
    return QuantReport(list(rows), {"damping": 0.01}, {"total": 9.0}, peak_memory())


def printed(report, width=100):
    stream = io.StringIO()
    Console(file=stream, width=width).print(report.table())
    return stream.getvalue()


def test_bits_are_weighted_by_size():
    found = report(row("a"), row("b", out_features=24, bits_nominal=4.0, bits_total=4.5))
    assert found.bits_nominal == pytest.approx((2 * 1 + 4 * 3) / 4)
    assert found.bits_total == pytest.approx((2.5 * 1 + 4.5 * 3) / 4)


def test_json_holds_everything(tmp_path):
    report().save_json(tmp_path / "quant_report.json")
    content = json.loads((tmp_path / "quant_report.json").read_text())
    assert content["operators"] == report().operators
    assert content["bits_total"] == 2.5
    assert content["seconds"] == {"total": 9.0}
    assert content["peak_memory"]["host"] > 1 << 20
    assert [f.name for f in tmp_path.iterdir()] == ["quant_report.json"]


def test_table_shows_every_stage():
    text = printed(report())
    assert "v8-k256-256" in text
    assert "2.down_proj" in text
    for number in ("2.000", "2.500", "0.4000", "0.3000", "0.2000", "0.1000", "1.5"):
        assert number in text
    assert "…" not in printed(report(), width=80)


def test_table_of_mixed_specs_and_troubled_operators():
    plain = row("lm_head", "v4-k16", rounds=0, dead_columns=3, damping=0.11)
    del plain["error_residual"], plain["error_refine_1"]
    text = printed(report(row("model.layers.0.mlp.up_proj"), plain), width=120)
    assert "lm_head" in text
    assert "v4-k16" in text
    assert "3 dead inputs, damping 0.11" in text


def test_operators_without_time_are_shown():
    assert "0.up_proj" in printed(report(row("model.layers.0.mlp.up_proj", seconds=None)))


def test_pictures(tmp_path):
    head = row("lm_head")
    files = report(*report().operators, head).plot(tmp_path / "pictures")
    assert [f.name for f in files] == ["error_by_layer.png", "bits_and_error.png"]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 10_000
    assert sorted(tmp_path.rglob("*.png")) == sorted(files)


def test_empty_report():
    empty = QuantReport([])
    assert empty.as_json()["bits_total"] is None
    with pytest.raises(ValueError, match="nothing to draw"):
        empty.plot("nowhere")
