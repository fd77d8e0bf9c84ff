"""Output directories: made whole, replaced in one step, never at the cost of what somebody else put there."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from vptq_jax import files
from vptq_jax.files import Kind, check_apart, check_output, new_directory, write_atomic

KIND = Kind("box", lambda path: {"box.txt", "parts/a", "parts/b"} if (path / "box.txt").is_file() else None)


def write_box(path, text, meanwhile=lambda: None, **options):
    with new_directory(path, kind=KIND, **options) as new:
        (new / "parts").mkdir()
        (new / "parts" / "a").write_text(text)
        (new / "box.txt").write_text(text)
        meanwhile()


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def names(path):
    return sorted(entry.name for entry in path.iterdir())


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request, monkeypatch):
    """Both ways to replace a directory: that of Linux, and that of systems which cannot exchange names."""
    if not request.param:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    return request.param


def test_a_directory_is_replaced_and_nothing_is_left(tmp_path, exchange):
    write_box(tmp_path / "out", "old")
    write_box(tmp_path / "out", "new", overwrite=True)
    assert contents(tmp_path / "out") == {"box.txt": b"new", "parts/a": b"new"}
    assert names(tmp_path) == ["out"]


def test_the_new_directory_has_usual_permissions(tmp_path):
    write_box(tmp_path / "out", "new")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_what_fails_leaves_the_old_one(tmp_path, exchange, error):
    write_box(tmp_path / "out", "old")

    def fail():
        raise error

    with pytest.raises(error):
        write_box(tmp_path / "out", "new", fail, overwrite=True)
    assert contents(tmp_path / "out") == {"box.txt": b"old", "parts/a": b"old"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("stranger", ["notes.md", "parts/c", "src/a.py", "empty/", "link", "parts/link"])
def test_strangers_are_named_and_kept(tmp_path, stranger):
    write_box(tmp_path / "out", "old")
    place = tmp_path / "out" / stranger
    place.parent.mkdir(exist_ok=True)
    if stranger.endswith("/"):
        place.mkdir()
    elif stranger.endswith("link"):
        place.symlink_to(tmp_path)
    else:
        place.write_text("mine")
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match=f"did not write: '{stranger}'"):
        write_box(tmp_path / "out", "new", overwrite=True)
    assert contents(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


def test_a_stranger_that_comes_meanwhile_is_kept(tmp_path, exchange):
    write_box(tmp_path / "out", "old")
    with pytest.raises(FileExistsError, match="did not write: 'mine'"):
        write_box(tmp_path / "out", "new", lambda: (tmp_path / "out" / "mine").write_text("mine"), overwrite=True)
    assert contents(tmp_path / "out") == {"box.txt": b"old", "parts/a": b"old", "mine": b"mine"}
    assert names(tmp_path) == ["out"]


def test_a_stranger_that_comes_between_the_last_look_and_the_exchange(tmp_path, exchange, monkeypatch):
    write_box(tmp_path / "out", "old")
    replace, calls = files._replace, []

    def late(new, path, old):
        if not calls:
            (path / "mine").write_text("mine")
        calls.append(path)
        replace(new, path, old)

    monkeypatch.setattr(files, "_replace", late)
    with pytest.raises(FileExistsError, match="did not write: 'mine'"):
        write_box(tmp_path / "out", "new", overwrite=True)
    assert contents(tmp_path / "out") == {"box.txt": b"old", "parts/a": b"old", "mine": b"mine"}
    assert names(tmp_path) == ["out"]


def test_a_directory_that_appears_meanwhile_is_kept(tmp_path):
    def appear():
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "mine").write_text("mine")

    with pytest.raises(FileExistsError, match="filled by somebody else"):
        write_box(tmp_path / "o", "new", appear)
    assert contents(tmp_path / "o") == {"mine": b"mine"}
    assert names(tmp_path) == ["o"]


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write_box(tmp_path / "out", "new")
    assert "box.txt" in contents(tmp_path / "out")


@pytest.mark.parametrize("overwrite", [True, False])
def test_something_else_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="already holds something that is no box"):
        write_box(tmp_path / "out", "new", overwrite=overwrite)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        write_box(tmp_path / "file", "new", overwrite=overwrite)


def test_places_that_no_directory_can_be_put_at(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", "..", tmp_path / "here"):
        with pytest.raises(FileExistsError, match="current directory"):
            check_output(path)
    with pytest.raises(FileExistsError, match="mount point"):
        check_output("/proc")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="cannot write"):
        check_output(tmp_path / "file" / "out")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        check_output(tmp_path / "loop" / "out")


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stands_for_its_target(tmp_path, exchange, exists):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target"
    if exists:
        write_box(target, "old")
    (tmp_path / "link").symlink_to(target)
    write_box(tmp_path / "link", "new", overwrite=exists)
    assert (tmp_path / "link").is_symlink()
    assert contents(target) == {"box.txt": b"new", "parts/a": b"new"}
    assert names(tmp_path / "elsewhere") == ["target"]
    (tmp_path / "file").write_text("old")
    (tmp_path / "file link").symlink_to("file")
    write_atomic(tmp_path / "file link", b"new")
    assert (tmp_path / "file link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def run(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


PAUSE = """
    import sys
    from pathlib import Path
    from vptq_jax.files import new_directory, write_atomic
    with new_directory(sys.argv[1]) as new:
        (new / "half").write_text("half")
        print("there", flush=True)
        sys.stdin.read()
"""


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path):
    living, dead = run(PAUSE, tmp_path / "out"), run(PAUSE, tmp_path / "out")
    for process in (living, dead):
        assert process.stdout.readline() == "there\n"
    dead.kill()
    dead.wait()
    assert len(names(tmp_path)) == 2
    (tmp_path / ".out.abcdefgh.tmp").mkdir()  # killed before it had a lock
    (tmp_path / ".out.mine.tmp").mkdir()  # nothing of ours
    check_output(tmp_path / "out")
    left = names(tmp_path)
    assert len(left) == 2
    assert ".out.mine.tmp" in left
    living.stdin.close()
    assert living.wait() == 0
    assert contents(tmp_path / "out") == {"half": b"half"}
    assert names(tmp_path) == [".out.mine.tmp", "out"]


KILLED = """
    import os, sys
    from pathlib import Path
    from vptq_jax import files
    rename, seen = os.rename, []
    def killed(source, target):
        seen.append(target)
        if Path(source).name == "new" and len(seen) > 1:
            os._exit(9)
        rename(source, target)
    os.rename = killed
    files._exchange = lambda first, second: False
    kind = files.Kind("box", lambda path: {"box.txt", "parts/a"})
    with files.new_directory(sys.argv[1], kind=kind, overwrite=True) as new:
        (new / "box.txt").write_text("new")
"""


def test_a_kill_between_two_renames_is_mended_at_the_next_start(tmp_path):
    write_box(tmp_path / "out", "old")
    assert run(KILLED, tmp_path / "out").wait() == 9
    assert "out" not in names(tmp_path)
    with pytest.raises(FileExistsError, match="already holds something, a box"):
        check_output(tmp_path / "out", kind=KIND)
    assert contents(tmp_path / "out") == {"box.txt": b"old", "parts/a": b"old"}
    write_box(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path) == ["out"]


def test_data_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order, synced, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), synced(fd)))
    monkeypatch.setattr(os, "rename", lambda *names: (order.append("rename"), rename(*names)))
    write_box(tmp_path / "out", "new")
    before = {Path(name).name for name in order[: order.index("rename")]}
    assert before >= {"box.txt", "a", "parts", "new"}
    assert Path(order[-1]) == tmp_path


def test_files_that_a_killed_writer_left_are_swept(tmp_path):
    (tmp_path / ".f.0123abcd.tmp").write_text("half")
    (tmp_path / ".f.mine.tmp").write_text("mine")
    write_atomic(tmp_path / "f", b"whole")
    assert names(tmp_path) == [".f.mine.tmp", "f"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    (tmp_path / "f").write_text("old")
    code = """
        import resource, signal, sys
        from vptq_jax.files import write_atomic
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            write_atomic(sys.argv[1], b"x" * 1000)
        except OSError as error:
            print(error)
    """
    process = run(code, tmp_path / "f")
    out, _ = process.communicate()
    assert "cannot write" in out
    assert str(tmp_path / "f") in out
    assert contents(tmp_path) == {"f": b"old"}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("a", "a", "are the same"),
        ("a", "./a", "are the same"),
        ("a/b", "a", "output .*b' lies inside the work directory"),
        ("a", "a/b/c", "work directory .*c' lies inside the output"),
        ("link/x", "a", "output .*x' lies inside the work directory"),
    ],
)
def test_directories_that_contain_one_another(tmp_path, monkeypatch, first, second, message):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("a")
    with pytest.raises(ValueError, match=message):
        check_apart(output=first, work_directory=second)
    check_apart(output="a", work_directory="b", Hessians=None)


def test_ctrl_c_while_a_temporary_is_made(tmp_path, monkeypatch):
    make = files._make_temporary

    def interrupted(path):
        found = make(path)
        signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(files, "_make_temporary", interrupted)
    with pytest.raises(KeyboardInterrupt), files.new_directory(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["out", "not/yet/there/out"])
def test_a_kill_while_a_place_is_tried_leaves_nothing_for_good(tmp_path, monkeypatch, path):
    path = tmp_path / path
    with monkeypatch.context() as killed:
        killed.setattr("pathlib.Path.rmdir", lambda self: None)
        files.check_writable(path)
    assert len(list(tmp_path.iterdir())) == 1
    files.check_output(path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_a_temporary_is_locked_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "locked", full)
    with pytest.raises(OSError, match="No space left"), files.new_directory(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_next_try_of_a_place_removes_what_a_killed_one_left(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr("pathlib.Path.rmdir", lambda self: None)
        files.check_writable(tmp_path / "work")
    assert len(list(tmp_path.iterdir())) == 1
    files.check_writable(tmp_path / "work")
    assert not list(tmp_path.iterdir())


def test_what_threads_still_write_is_removed_too(tmp_path):
    """A library that failed may have left threads at work in the directory."""
    busy = threading.Event()

    def write(place):
        for index in range(40):
            with contextlib.suppress(OSError):
                (place / f"{index}").mkdir()
            busy.set()
            time.sleep(0.002)

    with contextlib.suppress(ValueError), files.new_directory(tmp_path / "out") as temporary:
        thread = threading.Thread(target=write, args=(temporary,))
        thread.start()
        busy.wait(10)
        raise ValueError
    thread.join()
    assert not list(tmp_path.iterdir())


def test_what_a_thread_wrote_after_all_had_been_removed_is_swept(tmp_path):
    with files.new_directory(tmp_path / "out") as temporary:
        late = temporary / "arrays"
    shutil.rmtree(tmp_path / "out")
    late.mkdir(parents=True)
    files.check_writable(tmp_path / "out")
    assert not list(tmp_path.iterdir())
