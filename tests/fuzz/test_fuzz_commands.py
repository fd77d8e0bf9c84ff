"""Command lines that nobody should type, work directories that somebody damaged, and two runs at once."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from mutation import dumps, mutated_bytes, mutated_json
from runner import QUICK, Runner

NUMBERS = ["0", "-1", "1.5", "nan", "inf", "1e400", "x", "", str(1 << 70), "-0", "\u0661", "0x10", " 3 "]
TEXTS = ["", "x", "\x1b[31mred", "a" * 3000, "../../x", "builtin\n", "\ufeff", "\udcff", "(", "[", "v4-k16=", "=", "*"]
SPECS = [
    "",
    "none",
    "v0-k16",
    "v4",
    "v4-k3",
    "v4-k16-g7",
    "v4-k16-o50v4k16",
    "v99-k2",
    "v4-k" + "9" * 400,
    "v4-k65536",
    "V4-K16",
]
PATHS = [
    ".", "/", "..", "", "file", "file/x", "full", "full/x", "link", "loop", "dangling", "gone/deep/er", "a\x1b[2Jb",
    "n" * 300, "model", "model/x", "saved", "saved/arrays", "~", "-", "--", "/proc/x", "/dev/null", "\udcff", "a\nb",
]  # fmt: skip
OPTIONS = {
    "quantize": {
        "--spec": SPECS, "--rule": TEXTS, "--text": [*TEXTS, "file", "full", "model"], "--samples": NUMBERS,
        "--length": [*NUMBERS, "100000"], "--batch-size": NUMBERS, "--hessians": PATHS, "--save-hessians": PATHS,
        "--mode": TEXTS, "--rounds": [*NUMBERS[:-1], "1"], "--seed": NUMBERS, "--dtype": TEXTS, "--workdir": PATHS,
    },
    "generate": {
        "--max-new-tokens": NUMBERS, "--temperature": NUMBERS, "--top-k": NUMBERS, "--top-p": NUMBERS,
        "--min-p": NUMBERS, "--repetition-penalty": NUMBERS, "--seed": NUMBERS, "--dtype": TEXTS,
    },
    "eval": {
        "--text": [*TEXTS, "file", "full"], "--context": NUMBERS, "--max-windows": NUMBERS, "--batch-size": NUMBERS,
    },
    "convert": {"--to": [*TEXTS, "hf", "hf-vptq"], "--dtype": TEXTS},
    "inspect": {"--dtype": TEXTS},
    "chat": {"--message": TEXTS, "--system": TEXTS, "--max-new-tokens": NUMBERS, "--temperature": NUMBERS},
}  # fmt: skip


def make_box(path: Path, model: Path, saved: Path) -> Path:
    """A directory with models and with what belongs to somebody."""
    path.mkdir()
    shutil.copytree(model, path / "model")
    shutil.copytree(saved, path / "saved")
    (path / "file").write_text("mine")
    (path / "full" / "src").mkdir(parents=True)
    (path / "full" / "src" / "a.py").write_text("mine")
    (path / "full" / "config.json").write_text("{}")
    (path / "link").symlink_to("full")
    (path / "loop").symlink_to("loop")
    (path / "dangling").symlink_to("nowhere/else")
    return path


def contents(box: Path) -> dict[str, bytes | str]:
    """Every file and link below a directory."""
    found: dict[str, bytes | str] = {}
    for root, directories, files in os.walk(box):
        for name in [*files, *directories]:
            path = Path(root, name)
            if path.is_symlink():
                found[str(path.relative_to(box))] = os.readlink(path)
            elif path.is_file():
                found[str(path.relative_to(box))] = path.read_bytes()
    return found


def odd_command(rng) -> list[str]:
    """A command in which one to three things are odd."""
    command = rng.choice(list(OPTIONS))
    model = rng.choice(["model", "saved", "saved"] if rng.random() < 0.8 else PATHS)
    words = [command, model]
    if command in ("quantize", "convert"):
        words.append("out" if rng.random() < 0.5 else rng.choice(PATHS))
    if command == "generate":
        words += rng.choices([*TEXTS, "the quick"], k=rng.choice([1, 1, 2]))
    chosen = rng.sample(sorted(OPTIONS[command]), rng.choice([0, 1, 1, 2]) if len(OPTIONS[command]) > 1 else 1)
    if command == "quantize":
        words[1] = "model" if model == "saved" else model
        words += [word for pair in zip(QUICK[::2], QUICK[1::2], strict=True) if pair[0] not in chosen for word in pair]
    for option in chosen:
        words += [option, rng.choice(OPTIONS[command][option])]
    if command == "chat" and "--message" not in words:
        words += ["--message", "hi"]
    words += [flag for flag in ("--overwrite", "--json", "--check") if rng.random() < 0.15]
    return words


@pytest.mark.timeout(7200)
def test_odd_commands(runner, tiny_hf, saved, tmp_path, rng, long, tried):
    for index in range(400 if long else 18):
        box = make_box(tmp_path / f"{index}", tiny_hf, saved)
        before = contents(box)
        words = odd_command(rng)
        done = runner.command([os.fsdecode(os.fsencode(word)) for word in words], box)
        case = f"FUZZ: vptq-jax {' '.join(map(ascii, words))}"
        assert not done.problem(), f"{case}: {done.problem()}"
        tried(f"command {words[0]}", {0: "done", 1: "error", 2: "usage"}.get(done.status, "other"))
        after = contents(box)
        replaced = (
            {"saved"}
            if "--overwrite" in words and words[0] in ("quantize", "convert") and words[2] == "saved"
            else set()
        )
        lost = [name for name, data in before.items() if after.get(name) != data and name.split("/")[0] not in replaced]
        assert not lost, f"{case}: changed or removed {lost}"
        assert not [name for name in after if ".tmp/" in name or name.endswith(".tmp")], f"{case}: leftovers"
        shutil.rmtree(box)


@pytest.fixture(scope="module")
def half_done(runner, tiny_hf, tmp_path_factory):
    """A run that was killed in the middle, and what the whole run gives."""
    place = tmp_path_factory.mktemp("half")
    command = ["quantize", tiny_hf, place / "out", *QUICK, "--workdir", place / "w"]
    assert runner.command(command, place).status == 0
    shutil.move(place / "out", place / "whole")
    assert runner.command(command, place, mode="kill", at=70).status == -9
    assert list((place / "w").glob("*.safetensors"))
    return place


@pytest.mark.timeout(7200)
def test_damaged_work_directories(runner, tiny_hf, half_done, tmp_path, rng, long, tried):
    outputs = [half_done / "whole"]
    for index in range(150 if long else 8):
        box = tmp_path / f"{index}"
        shutil.copytree(half_done / "w", box / "w")
        file = rng.choice(sorted(file for file in (box / "w").iterdir() if file.name != "lock"))
        if file.suffix == ".json" and rng.random() < 0.7:
            file.write_bytes(dumps(rng.choice([mutated_json(json.loads(file.read_bytes()), rng), [], 7, None])))
        elif rng.random() < 0.5:
            data = bytearray(file.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        else:
            file.write_bytes(mutated_bytes(file.read_bytes(), rng))
        (box / "w" / "notes.txt").write_text("mine")
        done = runner.command(["quantize", tiny_hf, box / "out", *QUICK, "--workdir", box / "w"], box)
        assert not done.problem(), f"{file}: {done.problem()}"
        assert (box / "w" / "notes.txt").read_text() == "mine"
        tried("damaged work directory", "refused" if done.status else "done")
        if done.status == 0:
            outputs.append(box / "out")
    listed = runner.python(f"import probe; probe.digests({list(map(str, outputs))!r})", tmp_path).out.splitlines()
    assert len(listed) == len(outputs)
    assert set(listed) == {listed[0]}, "a damaged work directory gave other weights"


@pytest.mark.timeout(1200)
def test_two_runs_at_once(runner, tiny_hf, saved, tmp_path, tmp_path_factory, long, tried):
    with Runner(tmp_path_factory.mktemp("second")) as second:
        for index in range(8 if long else 2):
            box = tmp_path / f"{index}"
            box.mkdir()
            names = ["a", "b"] if index % 2 else ["a", "a"]
            commands = [["quantize", tiny_hf, box / name, *QUICK, "--workdir", box / "w"] for name in names]
            results = [None, None]

            def run(number, which, command, results=results, box=box):
                results[number] = which.command(command, box)

            threads = [
                threading.Thread(target=run, args=(number, which, command))
                for number, (which, command) in enumerate(zip((runner, second), commands, strict=True))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for done in results:
                assert not done.problem(), done.problem()
            statuses = sorted(done.status for done in results)
            assert statuses in ([0, 1], [0, 0]), [done.err for done in results]
            loser = next((done for done in results if done.status), None)
            if loser:
                assert "another run (pid" in loser.complaint or "already" in loser.complaint, loser.complaint
            made = [str(box / name) for name in set(names) if (box / name).exists()]
            listed = runner.python(f"import probe; probe.digests({[str(saved), *made]!r})", box).out.splitlines()
            assert set(listed) == {listed[0]}
            assert sorted(entry.name for entry in box.iterdir()) == sorted(Path(name).name for name in made)
            tried("two runs at once", str(statuses))


@pytest.mark.timeout(1200)
def test_threads_save_and_load(runner, saved, tmp_path, tried):
    call = f"""
import threading
import vptq_jax as vq
from probe import digest
model = vq.load({str(saved)!r})
found = []
def work(index):
    vq.save(model, f"o{{index}}")
    found.append(digest(vq.load(f"o{{index}}")))
threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert found == [digest(model)] * 4, found
"""
    done = runner.python(call, tmp_path)
    assert done.status == 0, done.problem() or done.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["o0", "o1", "o2", "o3"]
    tried("threads", "saved")
