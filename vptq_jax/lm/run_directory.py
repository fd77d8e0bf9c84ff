"""A directory that belongs to one long run, so that the same run, begun again, continues there.

    lock        held by the run that is at work here; names its process
    run.json    what the whole run depends on

What it finished is written beside them by those that inherit from this.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from vptq_jax.files import check_writable, final_path, held_interrupt, locked, write_atomic

RUN_FILE, _LOCK = "run.json", "lock"


class RunDirectory:
    """A directory that belongs to one run, locked until it is closed.

    Use it as a context manager, or call `close`. `bind` has to be called before anything is read or written.

    Args:
        directory: made when it does not exist.

    Attributes:
        format: of what is written here, changed when older ones can no longer be continued.
        suffixes: of the files that `write_atomic` writes here, and may leave a part of when it is killed.

    Raises:
        ValueError: another run is at work there, it holds files of other origin, or its `run.json` is damaged.
        OSError: the directory cannot be written.
    """

    format = ""
    suffixes: tuple[str, ...] = ("json",)

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = final_path(directory)
        check_writable(self.directory)
        self._made = not self.directory.exists()
        self.directory.mkdir(parents=True, exist_ok=True)
        leftover = re.compile(rf"\..+\.({'|'.join(self.suffixes)})\.[0-9a-f]{{8}}\.tmp")
        names = {entry.name for entry in self.directory.iterdir()}
        if RUN_FILE not in names and not all(name == _LOCK or leftover.fullmatch(name) for name in names):
            raise ValueError(f"{self.directory} holds files but no {RUN_FILE}; choose an empty or new work directory")
        self._lock = _take_lock(self.directory)
        self._stored: dict[str, Any] | None = None
        if RUN_FILE in names:
            try:
                self._stored = _read_object(self.directory / RUN_FILE)
            except BaseException:
                self.close()
                raise
        for name in names:
            if leftover.fullmatch(name):
                (self.directory / name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another run in. What is finished stays; if nothing was begun, no trace of it does."""
        if not self._lock.closed:
            (self.directory / _LOCK).unlink(missing_ok=True)
            if self._made and not (self.directory / RUN_FILE).exists() and self.directory != Path.cwd():
                with contextlib.suppress(OSError):  # not empty: somebody keeps something here
                    self.directory.rmdir()
        self._lock.close()

    @property
    def started(self) -> bool:
        """Whether a run has begun here before."""
        return self._stored is not None

    def bind(self, run: Mapping[str, Any]) -> None:
        """Makes the directory that of one run, or makes sure that it is.

        Args:
            run: JSON values on which the result of the run depends.

        Raises:
            ValueError: it belongs to another run (the message lists every difference).
        """
        record = {"format": self.format, **run}
        if self._stored is not None:
            refuse_changes(self._stored, record, self.directory, "started with other inputs")
        else:
            write_atomic(self.directory / RUN_FILE, json.dumps(record, indent=1).encode())

    def end(self) -> None:
        """Removes the record of the run, the lock, and the directory if nothing else is in it."""
        with held_interrupt():
            (self.directory / RUN_FILE).unlink(missing_ok=True)
            self._made = True
            self.close()


def _take_lock(directory: Path) -> IO[str]:
    lock = locked(directory / _LOCK)
    if lock is None:
        owner = (directory / _LOCK).read_text(errors="replace").strip()[:20]
        raise ValueError(
            f"another run (pid {owner if owner.isdigit() else 'unknown'}) is at work in {directory}; "
            "wait for it, or choose another work directory"
        )
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); choose another work directory") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{file} holds a JSON {type(value).__name__}, expected an object; choose another work directory"
        )
    return value


def refuse_changes(stored: Mapping[str, Any], current: Mapping[str, Any], directory: Path, what: str) -> None:
    """Raises ValueError with every difference between what a run was made of and what it is to be made of now."""
    stored, current = _flatten(stored), _flatten(json.loads(json.dumps(current)))
    changes = [
        f"  {name}: {stored.get(name, 'absent')!r} then, {current.get(name, 'absent')!r} now"
        for name in sorted(stored.keys() | current.keys())
        if stored.get(name) != current.get(name)
    ]
    if changes:
        raise ValueError(
            f"cannot continue in {directory}: the run there {what}:\n"
            + "\n".join(changes)
            + "\ngive the same inputs, or another work directory"
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
