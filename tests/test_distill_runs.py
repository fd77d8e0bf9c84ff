"""Distillation that is interrupted and goes on, that accumulates, and on several devices."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from random_models import assert_same_bits, random_model
from test_distill import BATCHES, HELD_OUT, ONE_BLOCK, pair
from test_meshes import on_eight_devices

import vptq_jax as vq
from vptq_jax.tune import tune_dir
from vptq_jax.tune.student import Student
from vptq_jax.tune.tune_dir import TuneDir

TUNE = vq.TuneConfig(tokens=36 * 12, dtype="float32", evaluations=3, learning_rate=0.02)


@pytest.fixture(scope="module")
def models():
    return pair("v6-k16-4")


def run(models, workdir=None, config=TUNE, batches=BATCHES, **options):
    teacher, student = models
    return vq.distill(student, teacher, batches, config, held_out=HELD_OUT, workdir=workdir, **options)


def without_times(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history.rows]


@pytest.fixture
def stops_at(monkeypatch):
    """Makes a given call of `Student.step`, counted from 1, raise."""

    def arrange(count, error=KeyboardInterrupt):
        seen = []
        step = Student.step

        def counted(*arguments):
            seen.append(1)
            if len(seen) == count:
                raise error
            return step(*arguments)

        monkeypatch.setattr(Student, "step", counted)
        return seen

    return arrange


@pytest.mark.parametrize("stop", [3, 6, 12])
def test_an_interrupted_run_goes_on_with_the_same_steps(models, tmp_path, stops_at, stop):
    whole, history = run(models)
    seen = stops_at(stop)
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path / "work")
    before = len(seen)
    tuned, again = run(models, tmp_path / "work")
    assert len(seen) - before == 12 - 4 * ((stop - 1) // 4), "it went on from the last evaluation"
    assert_same_bits(tuned, whole)
    assert without_times(again) == without_times(history)
    assert (again.best, again.stopped) == (history.best, None)
    # Done, it gives the same once more.
    before = len(seen)
    tuned, again = run(models, tmp_path / "work")
    assert len(seen) == before
    assert_same_bits(tuned, whole)
    with TuneDir(tmp_path / "work") as work:
        work.remove()
    assert not (tmp_path / "work").exists()


def test_a_full_disk_leaves_what_was_saved_before(models, tmp_path, monkeypatch):
    whole, _ = run(models)
    saves, write = [], tune_dir.write_arrays

    def full(*arguments):
        saves.append(1)
        if len(saves) == 2:
            raise OSError(28, "No space left on device", "arrays")
        write(*arguments)

    monkeypatch.setattr(tune_dir, "write_arrays", full)
    with pytest.raises(OSError, match="No space left"):
        run(models, tmp_path / "work")
    assert [row["step"] for row in json.loads((tmp_path / "work/state/state.json").read_text())["facts"]["rows"]] == [
        0,
        4,
    ]
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"run.json", "state"}
    assert_same_bits(run(models, tmp_path / "work")[0], whole)


def test_a_directory_of_another_run_is_refused(models, tmp_path):
    teacher, student = models
    run(models, tmp_path / "work")
    for changed, name in (
        (lambda: run(models, tmp_path / "work", dataclasses.replace(TUNE, learning_rate=0.01)), "learning_rate: 0.02"),
        (lambda: run(models, tmp_path / "work", batches=BATCHES[::-1]), "text: "),
        (lambda: run((teacher, random_model(ONE_BLOCK, specs=("v6-k16",))), tmp_path / "work"), "student: "),
        (lambda: run((random_model(ONE_BLOCK, specs=(None,), seed=5), student), tmp_path / "work"), "teacher: "),
    ):
        with pytest.raises(ValueError, match=rf"started with other inputs:\n  [a-z.]*{name}"):
            changed()
    with TuneDir(tmp_path / "work"), pytest.raises(ValueError, match=r"another run .* is at work in"):
        run(models, tmp_path / "work")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files but no run\.json"):
        run(models, tmp_path / "other")


@pytest.mark.parametrize("damage", ["facts", "arrays"])
def test_a_damaged_state_is_named(models, tmp_path, damage):
    run(models, tmp_path / "work")
    place = tmp_path / "work/state"
    files = [place / "state.json"] if damage == "facts" else [f for f in (place / "arrays").rglob("*") if f.is_file()]
    file = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){place}.*; delete {place} to tune from the start"):
        run(models, tmp_path / "work")


def test_accumulated_batches_make_one_step(models):
    """Mean gradients of halves of a batch are the gradient of the batch."""
    halves = [half for batch in BATCHES for half in (batch[:2], batch[2:])]
    whole, _ = run(models)
    parts, history = run(models, config=dataclasses.replace(TUNE, accumulate=2), batches=halves)
    assert history.rows[-1]["step"] == 12
    assert history.rows[-1]["tokens"] == 36 * 12
    for path, layer in whole.quantized_layers().items():
        other = parts.quantized_layers()[path]
        assert jnp.abs(layer.codebook[...] - other.codebook[...]).max() < 1e-4, path
    with pytest.raises(ValueError, match="accumulate is 0; expected a whole number of at least 1"):
        vq.TuneConfig(accumulate=0)


def test_rows_divided_among_devices():
    on_eight_devices(
        "Explicit",
        """
        config = dataclasses.replace(CONFIG, num_layers=1)
        teacher, student = random_model(config, specs=(None,)), random_model(config, specs=("v4-k8",))
        rows = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (40, 9)).astype(np.int32)
        batches, held_out = [rows[:8], rows[8:24], rows[24:32]], rows[32:]
        options = vq.TuneConfig(tokens=72 * 4, dtype="float32", evaluations=1, learning_rate=0.02)
        one, first = vq.distill(student, teacher, batches, options, held_out=held_out)
        many, second = vq.distill(student, teacher, batches, options, held_out=held_out, mesh=mesh)
        for a, b in zip(first.rows, second.rows):
            assert abs(a["kl"] - b["kl"]) < 1e-4 * a["kl"], (a, b)
        for path, layer in one.quantized_layers().items():
            other = many.quantized_layers()[path]
            assert other.codebook[...].sharding == layer.codebook[...].sharding
            assert jnp.abs(layer.codebook[...] - other.codebook[...]).max() < 1e-3, path
        many(rows[:1])
        try:
            vq.distill(student, teacher, [rows[:12]], options, held_out=held_out, mesh=mesh)
        except ValueError as error:
            assert "batches have [12] rows; expected multiples of the 8 devices of the mesh" in str(error), error
        else:
            raise AssertionError("12 rows were divided among 8 devices")
        """,
    )
