"""The work directory of a tuning run: what was reached at its last evaluation, to continue after a crash.

lock, run.json      see `RunDirectory`
state/              arrays of the last evaluation as Orbax stores them, and in state.json the history until then
                    and a CRC-32 of everything; replaced in one step, so that a full disk or a kill leaves the old
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from vptq_jax.array_files import changed_files, checksums, crc_holds, read_arrays, with_crc, write_arrays
from vptq_jax.files import Kind, held_interrupt, new_directory, sweep
from vptq_jax.json_files import read_json
from vptq_jax.lm.run_directory import RunDirectory
from vptq_jax.problems import raise_problems

_STATE, _FACTS, _ARRAYS = "state", "state.json", "arrays"


class TuneDir(RunDirectory):
    """The directory of a tuning run; see `RunDirectory`."""

    format = "tuning-1"

    def save(self, arrays: dict[str, Array], facts: Mapping[str, Any]) -> None:
        """Replaces what was saved before.

        Args:
            arrays: by name.
            facts: JSON values; NaN and infinity are allowed.

        Raises:
            OSError: it cannot be written; what was saved before stays usable.
        """
        with new_directory(self.directory / _STATE, kind=_KIND, overwrite=True) as temporary:
            write_arrays(temporary / _ARRAYS, arrays)
            record = {"facts": dict(facts), "files": checksums(temporary)}
            (temporary / _FACTS).write_text(json.dumps(with_crc(record)))

    def load(self, abstract: dict[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, Array], dict[str, Any]] | None:
        """Arrays of these shapes and the facts as they were saved last, or None before the first time.

        Raises:
            ValueError: they are damaged.
        """
        place = self.directory / _STATE
        sweep(place)  # brings back what a killed process was replacing
        if not place.exists():
            return None
        try:
            record = _record(place)
            raise_problems(f"{place} is damaged", changed_files(place, record["files"]))
            return read_arrays(place / _ARRAYS, abstract), record["facts"]
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}; delete {place} to tune from the start") from None

    def remove(self) -> None:
        """Removes all that belongs to the run, and the directory if nothing else is in it."""
        with held_interrupt():
            place = self.directory / _STATE
            sweep(place)
            for name in set(_kind_files(place) or ()) - {_FACTS}:
                (place / name).unlink(missing_ok=True)
            (place / _FACTS).unlink(missing_ok=True)
            for directory in [*sorted((path for path in place.rglob("*") if path.is_dir()), reverse=True), place]:
                with contextlib.suppress(OSError):  # not empty: somebody keeps something here; or there is none
                    directory.rmdir()
            self.end()


def _record(place: Path) -> dict[str, Any]:
    record = read_json(place / _FACTS)
    if not crc_holds(record):
        raise ValueError(f"{place / _FACTS} has changed since it was saved (its CRC-32 differs)")
    return record


def _kind_files(place: Path) -> set[str] | None:
    try:
        return {_FACTS, *_record(place)["files"]}
    except (OSError, ValueError):
        return None


_KIND = Kind("state of a tuning run", _kind_files)
