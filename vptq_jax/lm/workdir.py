"""The work directory of a quantization: every finished operator on disk, to continue after a crash.

    lock                         held by the run that is at work here; names its process
    run.json                     what the whole run depends on: the model's and the quantizer's configuration
    <module path>.safetensors    one finished operator, what it depends on, and digests of its tensors
    seconds.jsonl                how long each took; kept apart, so that all other files are reproducible

Equal inputs give equal files, byte for byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import safetensors
import safetensors.flax

from vptq_jax.array import VQArray
from vptq_jax.files import check_writable, final_path, held_interrupt, locked, write_atomic
from vptq_jax.format import FLOATS, INTEGERS, Format
from vptq_jax.lm.fingerprint import bytes_digest, json_digest

_FORMAT = "quantization-3"
_FIELDS = (*INTEGERS, *FLOATS)
_RUN, _LOCK, _SECONDS, _SUFFIX = "run.json", "lock", "seconds.jsonl", ".safetensors"
_LEFTOVER = re.compile(r"\..+\.(safetensors|json)\.[0-9a-f]{8}\.tmp")  # of `write_atomic`, killed while writing


class WorkDir:
    """A directory that belongs to one quantization run, locked until it is closed.

    Use it as a context manager, or call `close`. `bind` has to be called before operators are read or written.

    Args:
        directory: made when it does not exist.

    Raises:
        ValueError: another run is at work there, it holds files of other origin, or its `run.json` is damaged.
        OSError: the directory cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = final_path(directory)
        check_writable(self.directory)
        self._made = not self.directory.exists()
        self.directory.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in self.directory.iterdir()}
        if _RUN not in names and not all(name == _LOCK or _LEFTOVER.fullmatch(name) for name in names):
            raise ValueError(f"{self.directory} holds files but no {_RUN}; choose an empty or new work directory")
        self._lock = _take_lock(self.directory)
        self._stored: dict[str, Any] | None = None
        if _RUN in names:
            try:
                self._stored = _read_object(self.directory / _RUN)
            except BaseException:
                self.close()
                raise
        for name in names:
            if _LEFTOVER.fullmatch(name):
                (self.directory / name).unlink(missing_ok=True)
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another run in. What is finished stays; if nothing was begun, no trace of it does."""
        if not self._lock.closed:
            (self.directory / _LOCK).unlink(missing_ok=True)
            if self._made and not (self.directory / _RUN).exists() and self.directory != Path.cwd():
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
        record = {"format": _FORMAT, **run}
        if self._stored is not None:
            _refuse_changes(self._stored, record, self.directory, "started with other inputs")
        else:
            write_atomic(self.directory / _RUN, json.dumps(record, indent=1).encode())
        self._seconds = self._read_seconds()

    def has(self, path: str) -> bool:
        """Whether an operator is finished."""
        return self._file(path).exists()

    def load(self, path: str, inputs: Mapping[str, Any]) -> tuple[VQArray, dict[str, Any]] | None:
        """The finished operator and its statistics, or None when it is not finished.

        Raises:
            ValueError: it was made from other inputs, or its file is damaged.
        """
        file = self._file(path)
        if not file.exists():
            return None
        try:
            with safetensors.safe_open(file, framework="flax") as tensors:
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
                header = _checked_header(tensors.metadata(), arrays)
            format = Format.from_json(header)
        except (safetensors.SafetensorError, TypeError, KeyError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{file} is damaged ({reason}); delete it to quantize {path} again") from None
        _refuse_changes(header["inputs"], inputs, self.directory, f"made {path} from other inputs")
        fields: dict[str, Any] = {name: arrays.get(name) for name in _FIELDS}
        array = VQArray(**fields, format=format)
        return array.validate(path), header["stats"] | {"seconds": self._seconds.get(path)}

    def save(self, path: str, array: VQArray, stats: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        """Writes a finished operator at once, or not at all.

        Args:
            path: module path.
            array: the quantized weight.
            stats: JSON values about the result; `seconds` goes to its own file.
            inputs: JSON values on which the result depends, compared by `load`.

        Raises:
            OSError: it cannot be written; operators finished before stay usable.
        """
        stats = dict(stats)
        seconds = stats.pop("seconds", None)
        tensors = {name: jax.device_get(getattr(array, name)) for name in _FIELDS if getattr(array, name) is not None}
        header: dict[str, Any] = {
            "inputs": dict(inputs),
            **array.format.to_json(),
            "stats": stats,
            "tensors": {name: bytes_digest(tensor) for name, tensor in tensors.items()},
        }
        header["digest"] = json_digest(header)
        # One metadata entry: safetensors writes several in no fixed order.
        content = safetensors.flax.save(tensors, metadata={"vptq_jax": json.dumps(header, sort_keys=True)})
        write_atomic(self._file(path), content)
        with open(self.directory / _SECONDS, "a") as file:
            file.write(json.dumps({path: seconds}) + "\n")

    def remove(self, paths: Iterable[str]) -> None:
        """Removes the operators of a run, its records, and the directory if nothing else is in it.

        `run.json` goes last but for the lock, so that a kill meanwhile leaves a run that can be continued.
        """
        with held_interrupt():
            for file in (*map(self._file, paths), self.directory / _SECONDS, self.directory / _RUN):
                file.unlink(missing_ok=True)
            self._made = True
            self.close()

    def _file(self, path: str) -> Path:
        return self.directory / f"{path}{_SUFFIX}"

    def _read_seconds(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        file = self.directory / _SECONDS
        for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
            with contextlib.suppress(ValueError, AttributeError, RecursionError):  # the line that a kill cut short
                seconds |= {
                    path: float(value) for path, value in json.loads(line).items() if isinstance(value, int | float)
                }
        return seconds


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


def _checked_header(metadata: Mapping[str, str] | None, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The header of an operator's file, if it and every tensor are as they were written."""
    header = json.loads((metadata or {})["vptq_jax"])
    if not isinstance(header, dict) or json_digest({k: v for k, v in header.items() if k != "digest"}) != header.get(
        "digest"
    ):
        raise ValueError("its header has changed since it was written")
    found, written = {name: bytes_digest(jax.device_get(array)) for name, array in arrays.items()}, header["tensors"]
    changed = sorted(name for name in found.keys() | written if found.get(name) != written.get(name))
    if changed:
        raise ValueError(f"{', '.join(changed)} changed since it was written")
    return header


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


def _refuse_changes(stored: Mapping[str, Any], current: Mapping[str, Any], directory: Path, what: str) -> None:
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
