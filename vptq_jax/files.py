"""Files and directories that exist completely or not at all.

Whatever is made here is made beside its final name, in something called `.NAME.XXXXXXXX.tmp`, forced to disk and
renamed. The owner of a temporary holds a lock on it, so that what a killed process left behind is told from what
another one is writing: `sweep` removes the former the next time that anything is written under that name.

An output that is a link stands for what it points to: the target is written or replaced, the link stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

_LOCK, _NEW, _OLD = "lock", "new", "old"
_REMOVALS = 100
_ATTEMPTS = 8  # at a temporary that a sweep of another process took away before it was locked
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of directory that this library writes, and may therefore replace.

    Attributes:
        name: for messages, such as "vptq_jax checkpoint".
        files: the relative paths in a directory that belong to it; None if the directory is not of this kind.
    """

    name: str
    files: Callable[[Path], Collection[str] | None]


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` to `path` so that a crash, an interrupt or a full disk leaves the old state.

    Raises:
        OSError: the file cannot be written; the message names it, and nothing is left behind.
    """
    path = final_path(path)
    sweep(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(OSError):  # where there are no locks, a killed writer's file stays
                _lock(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
        with held_interrupt():
            temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str], *, kind: Kind | None = None, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that takes the name `path` when the block ends without an exception.

    Args:
        path: the final name.
        kind: what `overwrite` may replace.
        overwrite: replace a directory of that kind in one step; otherwise only an empty directory may be there.

    Raises:
        FileExistsError: see `check_output`; looked at before the block and again before the renaming.
        OSError: the directory cannot be written.
    """
    path = final_path(path)
    check_output(path, kind=kind, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_for(path) as temporary:
        new = temporary / _NEW
        new.mkdir()
        yield new
        _sync_tree(new)
        with held_interrupt():
            _place(new, path, kind if overwrite else None)
            _sync(path.parent)


def check_output(path: str | os.PathLike[str], *, kind: Kind | None = None, overwrite: bool = False) -> None:
    """Makes sure that a directory may be written at `path`, before hours of work go into it.

    Removes what a killed process left of an earlier try; a directory that it was about to replace comes back.

    Args:
        path: the name to be.
        kind: what may be there if it is to be overwritten.
        overwrite: replace a directory of that kind.

    Raises:
        FileExistsError: something else is there, or a directory of that kind and `overwrite` is False, or files in it
            that this library did not write.
        OSError: the place cannot be written, or a directory cannot be put there by renaming.
    """
    path = final_path(path)
    sweep(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a new directory")
    here = Path.cwd()
    if path == here or path in here.parents:
        raise FileExistsError(f"{path} is the current directory or one above it; name a new directory")
    if path.exists() and os.path.ismount(path):
        raise FileExistsError(f"{path} is a mount point, which cannot be renamed; name a new directory inside it")
    if path.is_dir() and any(path.iterdir()):
        if kind is None:
            raise FileExistsError(f"{path} already holds something; choose another directory")
        if overwrite:
            _check_replaceable(path, kind)
        elif kind.files(path) is None:
            raise FileExistsError(f"{path} already holds something that is no {kind.name}; choose another directory")
        else:
            raise FileExistsError(
                f"{path} already holds something, a {kind.name}; choose another directory, or replace it "
                "(--overwrite, overwrite=True)"
            )
    check_writable(path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Tries to write beside `path`, or in the closest directory above it that exists.

    Removes what a killed try left.

    Raises:
        OSError: it cannot be written.
    """
    path = final_path(path)
    sweep(path)
    place = _closest(path)
    try:
        with held_interrupt():  # a kill in between leaves an empty directory that `sweep` knows
            temporary = _make_directory(path, place)
            with contextlib.suppress(FileNotFoundError):
                temporary.rmdir()
    except OSError as error:
        raise type(error)(error.errno, f"cannot write in {str(place)!r}: {error.strerror}", str(path)) from None


def _closest(path: Path) -> Path:
    """The closest directory above a path that exists."""
    return next(parent for parent in path.parents if os.path.lexists(parent))


def _make_directory(path: Path, place: Path) -> Path:
    """An empty temporary directory for `path`, under a name that `sweep` knows."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=place))


def check_apart(**paths: str | os.PathLike[str] | None) -> None:
    """Makes sure that no path is another one or lies inside it.

    Args:
        paths: by what they are for; None stands for one that is not used.

    Raises:
        ValueError: two are the same, or one contains the other.
    """
    given = [(name.replace("_", " "), final_path(path)) for name, path in paths.items() if path is not None]
    for index, (name, path) in enumerate(given):
        for other_name, other in given[index + 1 :]:
            if path == other:
                raise ValueError(f"the {name} and the {other_name} are the same, {str(path)!r}; name two directories")
            for (outer_name, outer), (inner_name, inner) in (
                ((name, path), (other_name, other)),
                ((other_name, other), (name, path)),
            ):
                if outer in inner.parents:
                    raise ValueError(
                        f"the {inner_name} {str(inner)!r} lies inside the {outer_name} {str(outer)!r}; "
                        "name directories that do not contain one another"
                    )


@contextlib.contextmanager
def held_interrupt() -> Iterator[None]:
    """Holds Ctrl-C back until the end of the block, where stopping half-way would leave something behind."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    interrupted = False

    def note(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        signal.raise_signal(signal.SIGINT)


def final_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path that writing to `path` writes to: links are followed.

    Raises:
        OSError: the links go in a circle.
    """
    path = Path(path)
    try:
        return path.resolve()
    except RuntimeError:  # Python before 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


def sweep(path: Path) -> None:
    """Removes temporaries for `path` whose owner is dead, and puts back what one was replacing when it died."""
    place = _closest(path)
    if not place.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-z_]{{8}}\.tmp")
    for entry in list(os.scandir(place)):
        if not pattern.fullmatch(entry.name):
            continue
        if entry.is_file(follow_symlinks=False):
            _sweep_file(Path(entry.path))
        elif entry.is_dir(follow_symlinks=False):
            _sweep_directory(Path(entry.path), path)


def locked(path: Path) -> IO[str] | None:
    """The file `path`, made if need be and locked until it is closed; None if another process or thread has it."""
    for _ in range(_ATTEMPTS):
        file = open(path, "a+")  # noqa: SIM115  the caller closes it
        if not _lock(file):
            file.close()
            return None
        if _is_at(file, path):
            return file
        file.close()  # its last owner removed it in between
    return None


def _sweep_file(file: Path) -> None:
    with contextlib.suppress(OSError), open(file, "rb") as stream:
        if _lock(stream):
            file.unlink(missing_ok=True)


def _sweep_directory(temporary: Path, path: Path) -> None:
    lock = temporary / _LOCK
    with contextlib.suppress(OSError):
        names = {entry.name for entry in temporary.iterdir()}
        if names <= {_NEW}:  # none yet, or what a thread wrote after all had been removed
            _remove(temporary / _NEW)
            temporary.rmdir()
        elif _LOCK in names and names <= {_LOCK, _NEW, _OLD}:
            with open(lock, "rb") as stream:
                if _lock(stream):
                    _clear(temporary, path)


@contextlib.contextmanager
def _temporary_for(path: Path) -> Iterator[Path]:
    """A locked directory beside `path`, removed in the end."""
    made: list[tuple[Path, IO[str]]] = []
    try:
        with held_interrupt():
            made.append(_make_temporary(path))
        yield made[0][0]
    finally:
        for temporary, lock in made:
            with held_interrupt(), lock:
                _clear(temporary, path)


def _make_temporary(path: Path) -> tuple[Path, IO[str]]:
    for _ in range(_ATTEMPTS):
        temporary = _make_directory(path, path.parent)
        try:
            lock = locked(temporary / _LOCK)
        except FileNotFoundError:  # an empty one may be swept by another process
            continue
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.rmdir()
            raise
        if lock is not None:
            return temporary, lock
    raise OSError(errno.EBUSY, "other processes keep removing the temporary directories of this one", str(path))


def _clear(temporary: Path, path: Path) -> None:
    """Removes a temporary directory, the lock last, so that a kill meanwhile leaves one that `sweep` knows."""
    old = temporary / _OLD
    if old.exists() and not os.path.lexists(path):
        os.rename(old, path)
    for name in (_NEW, _OLD):
        _remove(temporary / name)
    with contextlib.suppress(OSError):
        (temporary / _LOCK).unlink()
        temporary.rmdir()


def _remove(directory: Path) -> None:
    """Removes a tree in which threads that a library left behind may still be at work; gives up after a few seconds."""
    for _ in range(_REMOVALS):
        shutil.rmtree(directory, ignore_errors=True)
        if not os.path.lexists(directory):
            return
        time.sleep(0.05)


def _place(new: Path, path: Path, kind: Kind | None) -> None:
    """Renames a finished directory; what is replaced moves beside it."""
    try:
        os.rename(new, path)  # onto nothing, or onto an empty directory
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if kind is None:
        raise FileExistsError(f"{path} has been filled by somebody else meanwhile; choose another directory")
    _check_replaceable(path, kind)
    old = new.with_name(_OLD)
    _replace(new, path, old)
    try:
        # What came in between the last look and the exchange must not be deleted either.
        _check_replaceable(old, kind, path)
    except FileExistsError:
        _replace(old, path, new)
        raise


def _replace(new: Path, path: Path, old: Path) -> None:
    """Gives `new` the name `path`, and what had it the name `old`."""
    if _exchange(new, path):
        os.rename(new, old)
    else:  # A kill between these two leaves nothing at `path`; `sweep` puts the old one back.
        os.rename(path, old)
        os.rename(new, path)


def _check_replaceable(directory: Path, kind: Kind, path: Path | None = None) -> None:
    """Raises FileExistsError unless all that a directory holds is known; `path` is its name in the message."""
    known = kind.files(directory)
    if known is None:
        raise FileExistsError(
            f"{path or directory} already holds something that is no {kind.name}; choose another directory"
        )
    strangers = sorted(_strangers(directory, set(known)))
    if strangers:
        others = f" and {len(strangers) - _SHOWN} more" if len(strangers) > _SHOWN else ""
        raise FileExistsError(
            f"{path or directory} holds files that this library did not write: "
            f"{', '.join(map(repr, strangers[:_SHOWN]))}{others}; move them away, or choose another directory"
        )


def _strangers(directory: Path, known: set[str]) -> Iterator[str]:
    """Relative paths of files, links and empty directories that are not known."""
    for root, directories, files in os.walk(directory):
        place = Path(root)
        links = [name for name in directories if (place / name).is_symlink()]
        for name in (*files, *links):
            entry = str((place / name).relative_to(directory))
            if entry not in known:
                yield entry
        if place != directory and not directories and not files:
            yield f"{place.relative_to(directory)}/"


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _exchange(first: Path, second: Path) -> bool:
    """Swaps the names of two directories in one step; False where the system or the file system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _lock(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_tree(directory: Path) -> None:
    """Forces every file of a directory to disk, so that no name points to data that a power cut takes away."""
    for root, _, files in os.walk(directory):
        for name in files:
            _sync(Path(root, name), strict=True)
        _sync(Path(root))


def _sync(path: Path, *, strict: bool = False) -> None:
    """fsync; of a directory (for its names) only where the system lets one be synced."""
    with contextlib.nullcontext() if strict else contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
