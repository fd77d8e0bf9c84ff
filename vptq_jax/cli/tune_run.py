"""What `vptq-jax tune` does: have text written, tune, save, and continue where an earlier run was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vptq_jax import files
from vptq_jax.cli import common
from vptq_jax.convert import checkpoint
from vptq_jax.lm import data
from vptq_jax.lm.self_text import TextDir, self_text
from vptq_jax.nn.forms import cast
from vptq_jax.tune.config import TuneConfig
from vptq_jax.tune.distill import HELD_OUT, check_pair, distill, held_out_rows
from vptq_jax.tune.history import TuneHistory
from vptq_jax.tune.tune_dir import TuneDir

if TYPE_CHECKING:
    from vptq_jax.lm.language_model import LanguageModel

_WRITTEN_TOGETHER = 256  # rows; of fewer, all


@dataclasses.dataclass(frozen=True)
class Text:
    """Text to train on.

    Attributes:
        source: `self`, `self+FILE`, or what `data.load_text` knows.
        length: tokens of a row.
        batch_size: rows of a batch.
        seed: of what the teacher writes.
    """

    source: str
    length: int
    batch_size: int
    seed: int

    @property
    def written(self) -> bool:
        """Whether the teacher writes it."""
        return self.source == "self" or self.source.startswith("self+")

    @property
    def real(self) -> str:
        """The text that is read: for starts, or to be trained on."""
        return "builtin" if self.source == "self" else self.source.removeprefix("self+")


def run(
    model: str,
    teacher: str,
    output: Path,
    config: TuneConfig,
    *,
    text: Text,
    workdir: Path,
    overwrite: bool,
    quiet: bool,
) -> TuneHistory:
    """Tunes the stored `model` into the directory `output`; see the command for the arguments."""
    files.check_apart(output=output, work_directory=workdir)
    files.check_output(output, kind=checkpoint.KIND, overwrite=overwrite)
    data.check_source(text.real)
    student, master = common.load_model(model), common.load_model(teacher)
    check_pair(student, master)
    context = min(student.config.context_length, master.config.context_length)
    if text.length > context:
        raise ValueError(f"--length is {text.length}; the models read at most {context} tokens")
    hint = f"Text and progress are in {workdir}; the same command continues from there."
    with common.hint(hint), TuneDir(workdir / "run") as work:
        rows = _rows(master, teacher, text, config, workdir / "text", quiet=quiet)
        count = held_out_rows(len(rows))
        batches = data.batches(rows[count:], text.batch_size)
        tuned, history = distill(
            student, master, batches, config, held_out=rows[:count], workdir=work, progress=not quiet
        )
        metadata = _metadata(model) | {
            "tuning": {"text": text.source, "options": dataclasses.asdict(config), **history.rows[history.best]}
        }
        checkpoint.save(tuned, output, overwrite=overwrite, metadata=metadata, report=history)
        work.remove()
    if text.written:
        with TextDir(workdir / "text") as kept:
            kept.remove()
    with contextlib.suppress(OSError):  # somebody keeps something here
        workdir.rmdir()
    return history


def _rows(
    master: LanguageModel, name: str, text: Text, config: TuneConfig, directory: Path, *, quiet: bool
) -> np.ndarray:
    """Rows of text, as many as are needed, at least two batches."""
    tokens = data.tokenize(common.tokenizer_of(master, name), data.load_text(text.real, "calibration"))
    if not text.written:
        rows = data.windows(tokens, text.length, first=master.config.first_token)
        needed = min(len(rows), -(-config.tokens // text.length) + HELD_OUT)
        common.log.print(f"Tuning on {needed} rows of {text.length} tokens from {text.source}", highlight=False)
        return rows[:needed]
    needed = -(-config.tokens // text.length)
    needed += min(HELD_OUT, max(1, needed // 15))  # of which `held_out_rows` are not trained on
    together = min(_WRITTEN_TOGETHER, needed)
    common.log.print(f"{name} writes {needed} rows of {text.length} tokens to tune on", highlight=False)
    writer = dataclasses.replace(master, module=cast(master.module, config.dtype))
    return self_text(
        writer, needed * text.length, tokens, length=text.length, batch_size=together,
        seed=text.seed, directory=directory, progress=not quiet,
    )  # fmt: skip


def _metadata(model: str) -> dict:
    """What the quantized model's own record says, if it is one of this library's."""
    return checkpoint.read_metadata(model) if checkpoint.is_checkpoint(model) else {}
