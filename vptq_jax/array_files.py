"""Arrays by name in a directory, as Orbax stores them, and what tells that files are as they were written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from vptq_jax.files import held_interrupt
from vptq_jax.schema import short

_CHUNK = 1 << 22

# Orbax counts operations per process: two at a time wait for each other's signals, or for ever.
_ORBAX = threading.Lock()
_PATIENCE, _QUIET = 10.0, 0.3  # seconds


def write_arrays(path: Path, arrays: dict[str, Array]) -> None:
    """Writes a new directory; an interrupt (Ctrl-C) is held back until the end.

    Raises:
        OSError: it cannot be written.
    """
    import orbax.checkpoint as ocp

    others = set(threading.enumerate())
    try:
        # An interrupted Orbax goes on in threads that nobody waits for, and threads of its asynchronous checkpointer
        # wait for ten minutes for one another after an error.
        with _ORBAX, held_interrupt(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(path.absolute(), arrays)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        for thread in set(threading.enumerate()) - others:
            if type(thread).__module__.startswith("orbax."):
                thread.join(_PATIENCE)
        _wait_for_quiet(path.parent)  # threads of TensorStore would bring back what is about to be removed
        raise _storage_error(error, path, "cannot be written") from error


def _wait_for_quiet(directory: Path) -> None:
    """Waits until nothing has changed in a directory for a while."""

    def entries() -> set[tuple[str, int]]:
        found = set()
        for root, directories, files in os.walk(directory):
            for name in (*directories, *files):
                with contextlib.suppress(OSError):  # gone meanwhile
                    found.add((os.path.join(root, name), os.lstat(os.path.join(root, name)).st_mtime_ns))
        return found

    end, before = time.monotonic() + _PATIENCE, None
    while time.monotonic() < end and (now := entries()) != before:
        before = now
        time.sleep(_QUIET)


def read_arrays(path: Path, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Reads what `write_arrays` wrote, placed as the shapes say.

    Raises:
        ValueError: it cannot be read, or holds other shapes or dtypes.
    """
    import orbax.checkpoint as ocp

    try:
        with _ORBAX, ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path.absolute()).item_metadata.tree
            # Orbax would convert in silence.
            changed = [name for name, array in abstract.items() if stored[name].dtype != array.dtype]
            arrays = None if changed else checkpointer.restore(path.absolute(), abstract)
    except Exception as error:  # idem
        raise ValueError(str(_storage_error(error, path, "cannot be restored"))) from error
    if arrays is None:
        first = changed[0]
        raise ValueError(
            f"{path} holds {short(first)} in {stored[first].dtype}, but its record says {abstract[first].dtype}"
        )
    return arrays


def _storage_error(error: Exception, path: Path, what: str) -> OSError:
    """What went wrong, without the kilobytes of settings that TensorStore adds."""
    text = str(error)
    for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES):
        if os.strerror(code) in text:
            return OSError(code, f"{what}: {os.strerror(code)}", str(path))
    reason = text.splitlines()[0][:200] if text else "no reason given"
    return OSError(f"{path} {what} ({type(error).__name__}: {reason})")


def checksums(directory: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file, by relative path."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): [file.stat().st_size, _crc(file)] for file in files}


def changed_files(directory: Path, sums: Mapping[str, Sequence[int]], *, verify: bool = True) -> Iterator[str]:
    """Files that are missing, of another size or, with `verify`, of other contents than `checksums` saw."""
    for name, (size, crc) in sums.items():
        file = directory / name
        if not file.resolve().is_relative_to(directory.resolve()):
            yield f"{short(name)} lies outside the directory"
        elif not file.is_file():
            yield f"{short(name)} is missing"
        elif file.stat().st_size != size:
            yield f"{short(name)} has {file.stat().st_size} bytes; expected {size} (truncated?)"
        elif verify and _crc(file) != crc:
            yield f"{short(name)} has changed since it was saved (its CRC-32 differs)"


def with_crc(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values, and under `crc` their CRC-32, whatever the order of keys and the space between them."""
    return {**record, "crc": _json_crc(record)}


def crc_holds(record: Mapping[str, Any]) -> bool:
    """Whether a record is what `with_crc` made."""
    return record.get("crc") == _json_crc({key: value for key, value in record.items() if key != "crc"})


def _json_crc(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())


def _crc(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value
