"""Text that a model writes itself: of no licence, in its own distribution, as much of it as wanted."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vptq_jax.extras import progress_bar
from vptq_jax.files import held_interrupt, write_atomic
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.fingerprint import bytes_digest, decoder_fingerprint
from vptq_jax.lm.generation import GenerationResult, generate
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.run_directory import RunDirectory
from vptq_jax.lm.sampling import Sampling


def self_text(
    model: LanguageModel | Decoder,
    tokens: int,
    starts: Int[np.ndarray, "T"],
    *,
    length: int = 512,
    start_length: int = 12,
    batch_size: int = 256,
    seed: int = 0,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Int[np.ndarray, "n length"]:
    """Continuations of short starts at temperature 1, to calibrate and tune on.

    Args:
        model: the one that writes, usually the one that is to be quantized.
        tokens: at least so many in all, the starts included.
        starts: token ids of some text, of which every row begins with a random snippet.
        length: tokens of a row.
        start_length: tokens of a snippet; models with a `first_token` have it before.
        batch_size: rows that are written at once.
        seed: the same seed, model and starts give the same text.
        directory: every batch is kept there at once; called again with the same model, starts and options after a
            crash, or for more tokens, the writing goes on.
        progress: show a bar.

    Returns:
        int32 [n, length].

    Raises:
        ValueError: the starts hold no whole snippet, a number is out of range, or as `generate` raises it; the
            directory holds other text, or a damaged file.
        OSError: the directory cannot be written.
    """
    lm = LanguageModel.of(model)
    first = [] if lm.config.first_token is None else [lm.config.first_token]
    if not 1 <= start_length < length - len(first) or length > lm.config.context_length:
        raise ValueError(
            f"start_length is {start_length} and length {length}; expected 1 <= start_length, less than the length "
            f"of a row, and that at most the model's context of {lm.config.context_length}"
        )
    starts = np.asarray(starts)
    if starts.ndim != 1 or len(starts) < start_length:
        raise ValueError(f"starts have shape {list(starts.shape)}; expected at least {start_length} tokens in one axis")
    if tokens < 1 or batch_size < 1:
        raise ValueError(f"tokens is {tokens} and batch_size {batch_size}; expected at least 1 of each")
    wanted = -(-tokens // length)

    def write(part: int) -> Int[np.ndarray, "batch_size length"]:
        rng = np.random.default_rng([seed, part])
        at = rng.integers(0, len(starts) - start_length + 1, batch_size)
        prompts = [first + starts[i : i + start_length].tolist() for i in at]
        found = generate(
            lm, prompts, max_new_tokens=length - len(prompts[0]), stop_tokens=(), return_result=True,
            sampling=Sampling(temperature=1.0, seed=int(rng.integers(1 << 31))),
        )  # fmt: skip
        assert isinstance(found, GenerationResult)
        return np.array([prompt + new for prompt, new in zip(prompts, found.tokens, strict=True)], np.int32)

    with contextlib.ExitStack() as stack:
        kept = None if directory is None else stack.enter_context(TextDir(directory))
        if kept is not None:
            kept.bind(
                {
                    "model": decoder_fingerprint(lm.module), "starts": bytes_digest(starts.astype(np.int32)),
                    "length": length, "start_length": start_length, "batch_size": batch_size, "seed": seed,
                }
            )  # fmt: skip
        bar = stack.enter_context(progress_bar(progress, total=wanted, desc="Writing", unit="row"))
        parts: list[np.ndarray] = []
        for part in range(-(-wanted // batch_size)):
            rows = None if kept is None else kept.load(part, (batch_size, length))
            if rows is None:
                rows = write(part)
                if kept is not None:
                    kept.save(part, rows)
            parts.append(rows)
            bar.update(batch_size)
    return np.concatenate(parts)[:wanted]


class TextDir(RunDirectory):
    """A directory of text that a model wrote: a file `rows-00000.npy` for every batch; see `RunDirectory`."""

    format = "self-text-1"
    suffixes = ("npy", "json")

    def save(self, part: int, rows: Int[np.ndarray, "n length"]) -> None:
        """Writes a batch at once, or not at all."""
        content = io.BytesIO()
        np.save(content, rows)
        write_atomic(self._file(part), content.getvalue())

    def load(self, part: int, shape: tuple[int, int]) -> Int[np.ndarray, "n length"] | None:
        """A batch of this shape, or None if it is not written yet.

        Raises:
            ValueError: its file is damaged.
        """
        file = self._file(part)
        if not file.exists():
            return None
        try:
            rows = np.load(file, allow_pickle=False)
            if rows.shape != shape or rows.dtype != np.int32:
                raise ValueError(f"it holds {rows.dtype} {list(rows.shape)}, expected int32 {list(shape)}")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it to have it written again") from None
        return rows

    def remove(self) -> None:
        """Removes all batches, the record, and the directory if nothing else is in it."""
        with held_interrupt():
            for file in self.directory.glob("rows-*.npy"):
                file.unlink()
            self.end()

    def _file(self, part: int) -> Path:
        return self.directory / f"rows-{part:05d}.npy"
