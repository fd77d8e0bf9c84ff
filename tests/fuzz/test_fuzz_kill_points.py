"""Killed, interrupted or out of space at the n-th file operation: nothing is lost, and the same command goes on."""

import shutil
from pathlib import Path

import pytest
from runner import QUICK

FEW = [*QUICK, "--spec", "none", "--rule", "(q|down)_proj=v4-k16"]  # four operators, which write as fourteen do
MODES = ("kill", "full", "interrupt")


def quantize(model, box, *extra):
    return ["quantize", model, box / "out", *FEW, *extra]


COMMANDS = {
    "quantize": lambda hf, saved, box: quantize(hf, box),
    "quantize --save-hessians": lambda hf, saved, box: quantize(hf, box, "--save-hessians", box / "h"),
    "quantize --overwrite": lambda hf, saved, box: quantize(hf, box, "--overwrite"),
    "quantize sequential": lambda hf, saved, box: quantize(hf, box, "--mode", "sequential", "--workdir", box / "w"),
    "convert --to orbax": lambda hf, saved, box: ["convert", saved, box / "out"],
    "convert --to hf": lambda hf, saved, box: ["convert", saved, box / "out", "--to", "hf"],
    "convert --to hf-vptq": lambda hf, saved, box: ["convert", saved, box / "out", "--to", "hf-vptq"],
    "convert --to hf --overwrite": lambda hf, saved, box: ["convert", saved, box / "out", "--to", "hf", "--overwrite"],
    "convert --to orbax --overwrite": lambda hf, saved, box: ["convert", saved, box / "out", "--overwrite"],
}


def make_box(path: Path, old: Path | None) -> Path:
    """A directory with somebody's file in it and, to be overwritten, another model."""
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    if old is not None:
        shutil.copytree(old, path / "out")
    return path


@pytest.fixture(scope="module")
def old_models(runner, tiny_hf, tmp_path_factory):
    """Models to be overwritten: another one than any command writes."""
    place = tmp_path_factory.mktemp("old")
    assert runner.command(["convert", tiny_hf, place / "orbax"], place).status == 0
    assert runner.command(["convert", tiny_hf, place / "hf", "--to", "hf"], place).status == 0
    return place


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", COMMANDS)
def test_any_end_at_any_point(name, runner, tiny_hf, saved, old_models, tmp_path, rng, long, tried):
    old = None if "--overwrite" not in name else old_models / ("hf" if "--to hf" in name else "orbax")
    box = make_box(tmp_path / "whole", old)
    whole = runner.command(COMMANDS[name](tiny_hf, saved, box), box, mode="count")
    assert whole.status == 0, whole.err
    entries = sorted(entry.name for entry in box.iterdir())
    # The first operations, which try the place, and the last, around the rename, matter most; the middle is sampled.
    last = whole.operations
    if long:  # every operation is the last one of some command
        cases = [(at, mode) for at in range(1, last + 1) for mode in ("kill", rng.choice(("full", "interrupt")))]
    else:
        cases = [(at, MODES[at % 3]) for at in sorted({1, 2, last, last - 1, rng.choice(range(3, last))})]
    boxes, expected = [box], {}
    for at, mode in cases:
        box = make_box(tmp_path / f"{at}-{mode}", old)
        case = f"{name}: {mode} at operation {at} of {last}"
        command = COMMANDS[name](tiny_hf, saved, box)
        struck = runner.command(command, box, mode=mode, at=at)
        if mode != "kill":
            assert not struck.problem(), f"{case}: {struck.problem()}"
            assert struck.status in (0, 1, 130), f"{case}: {struck.status}"
            if mode == "full" and struck.status:
                assert "space" in struck.complaint, f"{case}: {struck.complaint}"
            assert not [e.name for e in box.iterdir() if e.name.endswith(".tmp")], f"{case}: leftovers"
        again = runner.command(command, box)
        taken = "already holds" in again.complaint and not name.startswith("quantize") and old is None
        assert again.status == 0 or taken, f"{case}: {again.problem() or again.err[-600:]}"
        assert sorted(entry.name for entry in box.iterdir()) == entries, f"{case}: {list(box.iterdir())}"
        assert (box / "notes.txt").read_text() == "mine"
        boxes.append(box)
        expected[len(boxes) - 1] = case
        tried(name, mode)
    done = runner.python(f"import probe; probe.digests({[str(box / 'out') for box in boxes]!r})", tmp_path)
    found = done.out.splitlines()
    assert len(found) == len(boxes), done.err
    for index, case in expected.items():
        assert found[index] == found[0], f"{case}: another result than undisturbed: {found[index]}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("limit", [2000, 20_000, 60_000])
@pytest.mark.parametrize("name", ["quantize", "convert --to orbax", "convert --to hf"])
def test_no_file_may_grow_beyond(name, limit, runner, tiny_hf, saved, tmp_path, tried):
    """What a full disk does, where no hook of Python sees it: in libraries that write files themselves."""
    box = make_box(tmp_path / "box", None)
    command = COMMANDS[name](tiny_hf, saved, box)
    done = runner.command(command, box, limits={"file": limit})
    assert not done.problem(), done.problem()
    assert not [entry.name for entry in box.iterdir() if entry.name.endswith(".tmp")]
    if done.status:
        assert not (box / "out").exists()
        assert runner.command(command, box).status == 0
    tried(name, "file limit")
