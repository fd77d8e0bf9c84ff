"""Runs commands of the library in processes of their own and says how they ended."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HANG = 150  # seconds; a case takes two, but machines may be busy
MEMORY = 4 << 30
QUICK = ["--spec", "v4-k16", "--samples", "4", "--length", "16", "--rounds", "1"]
"""Options of a quantization that takes two seconds."""


@dataclasses.dataclass(frozen=True)
class Done:
    """How a command ended: exit status (negative: a signal; "timeout"), operations counted, its output."""

    status: int | str
    operations: int
    out: str
    err: str
    seconds: float

    @property
    def complaint(self) -> str:
        """The line about an error, without the progress bars before it."""
        # `convert --check` lists problems as its result.
        lines = [line for line in self.out.split("\n") if line.startswith("problem: ")]
        lines += [line for line in re.split(r"[\r\n]", self.err) if line.startswith("error: ")]
        return lines[-1] if lines else ""

    def problem(self) -> str:
        """What is wrong with how it ended; empty if it is a result, or one clean line and exit status 1, 2 or 130."""
        if self.status == "timeout":
            return f"hangs for over {HANG} seconds"
        if self.status == 99 or "Traceback (most recent call last)" in self.err:
            return f"traceback: {self.err[-1500:]}"
        if self.status in (0, 130):
            return ""
        if self.status == 2 and "Usage" in self.err:
            return ""
        if self.status != 1:
            return f"exit status {self.status}: {self.err[-600:]}"
        if not self.complaint:
            return f"no line about the error: {self.err[-600:]}"
        if len(self.complaint) >= 500:
            return f"a line of {len(self.complaint)} characters: {self.complaint[:300]}"
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", self.complaint):
            return f"control characters: {self.complaint!r}"
        return ""


class Runner:
    """The client of `zygote.py`; a context manager."""

    def __init__(self, place: Path):
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        notes = tempfile.mkdtemp(dir=place)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py")), notes],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def run(self, **case) -> Done:
        """Runs a case as `zygote.py` describes it."""
        self._process.stdin.write(json.dumps({"timeout": HANG, **case}) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))

    def command(self, arguments, cwd, **case) -> Done:
        """Runs `vptq-jax` with arguments in a directory, whose file operations count."""
        return self.run(arguments=list(map(str, arguments)), cwd=str(cwd), root=str(cwd), **case)

    def python(self, call, cwd, **case) -> Done:
        """Runs statements of Python."""
        return self.run(python=[call], cwd=str(cwd), root=str(cwd), **case)
