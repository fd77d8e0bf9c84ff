"""The work directory of a quantization: every finished operator on disk, to continue after a crash.

    run.json                     what the whole run depends on: the model's and the quantizer's configuration
    <module path>.safetensors    one finished operator and what it depends on
    seconds.jsonl                how long each took; kept apart, so that all other files are reproducible

Equal inputs give equal files, byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import safetensors
import safetensors.flax

from vptq_jax.array import VQArray
from vptq_jax.files import write_atomic
from vptq_jax.spec import VQLayout

_FORMAT = "quantization-1"
_FIELDS = tuple(field.name for field in dataclasses.fields(VQArray) if field.name != "layout")


class WorkDir:
    """A directory that belongs to one quantization run.

    Args:
        directory: made when it does not exist.
        run: JSON values on which the result of the run depends.

    Raises:
        ValueError: the directory belongs to another run (the message lists every difference), or holds other files.
        OSError: the directory cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], run: Mapping[str, Any]):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        leftovers = set(self.directory.glob(".*.tmp"))  # of a process that was killed while writing
        record = {"format": _FORMAT, **run}
        file = self.directory / "run.json"
        if file.exists():
            _refuse_changes(_read_json(file), record, self.directory, "started with other inputs")
        elif set(self.directory.iterdir()) - leftovers:
            raise ValueError(f"{self.directory} holds files but no run.json; choose an empty or new work directory")
        else:
            write_atomic(file, json.dumps(record, indent=1).encode())
        for leftover in leftovers:
            leftover.unlink()
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
                header = json.loads(tensors.metadata()["vptq_jax"])
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it to quantize {path} again") from None
        _refuse_changes(header["inputs"], inputs, self.directory, f"made {path} from other inputs")
        fields: dict[str, Any] = {name: arrays.get(name) for name in _FIELDS}
        array = VQArray(**fields, layout=VQLayout(**header["layout"]))
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
        header = {"inputs": dict(inputs), "layout": dataclasses.asdict(array.layout), "stats": stats}
        tensors = {name: jax.device_get(getattr(array, name)) for name in _FIELDS if getattr(array, name) is not None}
        # One metadata entry: safetensors writes several in no fixed order.
        content = safetensors.flax.save(tensors, metadata={"vptq_jax": json.dumps(header, sort_keys=True)})
        write_atomic(self._file(path), content)
        with open(self.directory / "seconds.jsonl", "a") as file:
            file.write(json.dumps({path: seconds}) + "\n")

    def _file(self, path: str) -> Path:
        return self.directory / f"{path}.safetensors"

    def _read_seconds(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        file = self.directory / "seconds.jsonl"
        for line in file.read_text().splitlines() if file.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # the line that a kill cut short
                seconds.update(json.loads(line))
        return seconds


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); choose another work directory") from None


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
