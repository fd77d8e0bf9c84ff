"""What happened in a tuning run, as a record and as a picture."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from vptq_jax.files import write_atomic
from vptq_jax.lm.report import save_picture

_JSON, _PICTURE = "tune_history.json", "tuning.png"


@dataclasses.dataclass(frozen=True)
class TuneHistory:
    """What happened in a run.

    Attributes:
        rows: one for every evaluation, the first before any step: `step`, `tokens` so far, `seconds` since the first
            step began, held-out `kl` and `top1` (`divergence.Divergence`), `loss` (mean since the evaluation before;
            None for the first) and the `learning_rate` of the last step.
        best: the row whose leaves were returned.
        tokens_per_second: from the second evaluation on, so that compiling does not count; 0 if there was none.
        stopped: why the run ended before its time, or None.
    """

    rows: tuple[dict[str, Any], ...]
    best: int
    tokens_per_second: float
    stopped: str | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return dataclasses.asdict(self) | {"rows": list(self.rows)}

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tune_history.json` and the picture `tuning.png` into a directory."""
        write_atomic(Path(directory) / _JSON, (json.dumps(self.as_json(), indent=1) + "\n").encode())
        save_picture(Path(directory) / _PICTURE, self._draw)

    def _draw(self, axes: Any) -> None:
        tokens = [row["tokens"] for row in self.rows]
        axes.plot(tokens, [row["kl"] for row in self.rows], marker="o", label="held out")
        axes.plot(tokens[1:], [row["loss"] for row in self.rows[1:]], marker=".", label="in training")
        axes.set_xlabel("tokens")
        axes.set_ylabel("KL(teacher || student), nats a token")
