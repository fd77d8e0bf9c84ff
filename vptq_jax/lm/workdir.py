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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import safetensors
import safetensors.flax

from vptq_jax.array import VQArray
from vptq_jax.files import held_interrupt, write_atomic
from vptq_jax.format import FLOATS, INTEGERS, Format
from vptq_jax.lm.fingerprint import bytes_digest, json_digest
from vptq_jax.lm.run_directory import RunDirectory, refuse_changes

_FIELDS = (*INTEGERS, *FLOATS)
_SECONDS, _SUFFIX = "seconds.jsonl", ".safetensors"


class WorkDir(RunDirectory):
    """The directory of a quantization run; see `RunDirectory`."""

    format = "quantization-3"
    suffixes = ("safetensors", "json")

    def bind(self, run: Mapping[str, Any]) -> None:
        """See `RunDirectory.bind`."""
        super().bind(run)
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
        refuse_changes(header["inputs"], inputs, self.directory, f"made {path} from other inputs")
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
            for file in (*map(self._file, paths), self.directory / _SECONDS):
                file.unlink(missing_ok=True)
            self.end()

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
