"""`distill`: a quantized model learns to predict what its teacher predicts."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from vptq_jax.extras import progress_bar
from vptq_jax.lm.activations import Tokens, check_batches
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.divergence import check_same_vocabulary
from vptq_jax.lm.fingerprint import decoder_fingerprint, text_digest
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.meshes import as_automatic
from vptq_jax.nn.forms import cast, trainable
from vptq_jax.nn.placement import place
from vptq_jax.schema import short
from vptq_jax.tune.config import DEFAULTS, TuneConfig
from vptq_jax.tune.history import TuneHistory
from vptq_jax.tune.leaves import Leaves
from vptq_jax.tune.student import Student, Teacher
from vptq_jax.tune.tune_dir import TuneDir

HELD_OUT = 64
"""Rows that are held out, at most."""
_CHECKED = 10  # steps between looks at the loss, for which the host waits
_DIVERGED = 3.0  # times the first loss


class TuningWarning(UserWarning):
    """A run ended before its time; what it returns is the best that it had."""


def distill(
    student: LanguageModel | Decoder,
    teacher: LanguageModel | Decoder,
    batches: Iterable[Tokens],
    config: TuneConfig = DEFAULTS,
    *,
    held_out: Int[np.ndarray, "n T"] | None = None,
    workdir: str | os.PathLike[str] | TuneDir | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> tuple[Any, TuneHistory]:
    """Trains a quantized model's codebooks, scales, offsets, biases and norms on KL(teacher || student).

    Indices, embedding and output projection stay, so that the model takes the bits that it took. Adam (0.9, 0.95)
    without decay; a step is in units of each leaf (`TuneConfig.learning_rate`).

    Args:
        student: with quantized layers, packed or not; stays as it is.
        teacher: such as the model that the student was made from; stays as it is.
        batches: token ids [B, T] each, `accumulate` of them a step; best of the teacher's own text (`self_text`).
        config: the options.
        held_out: rows [n, T] to score; None takes them from the last batches, which then are not trained on: a
            sixteenth of all rows, 64 at most.
        workdir: what was reached is kept there at every evaluation; called again with the same inputs after a crash or
            a kill, the run goes on from the last one, with the same steps. It stays when the run is done, and gives
            the same result again.
        mesh: the rows of every batch are divided among all of its devices, which hold the models as a whole each.
        progress: show a bar.

    Returns:
        (the student as it scored best, of the kind that was given, codebooks in float32 as `trainable` makes them;
        the history). A run whose loss is not finite or grows threefold ends early, with a `TuningWarning`.

    Raises:
        ValueError: before work starts: the student has no quantized layer, the vocabularies differ, or batches are
            unusable or too few to hold any out, or do not divide among the devices, the divergence is not finite
            before the first step, or `workdir` belongs to another run, is in use or damaged.
        OSError: `workdir` cannot be written; what was saved there before stays usable.
    """
    if workdir is not None and not isinstance(workdir, TuneDir):
        with TuneDir(workdir) as directory:
            return distill(
                student, teacher, batches, config, held_out=held_out, workdir=directory, mesh=mesh, progress=progress
            )
    check_pair(student, teacher)
    lm = LanguageModel.of(student)
    module, master = trainable(lm.module), LanguageModel.of(teacher).module
    train = list(check_batches(batches, module.config.vocab_size))
    if held_out is None:
        train, held_out = _split(train)
    else:
        (held_out,) = check_batches([held_out], module.config.vocab_size)
    if mesh is not None:
        _check_divides(train, held_out, mesh)
    if workdir is not None:
        workdir.bind(_record(module, master, train, held_out, config))
    run = _Run(module, master, config, held_out, workdir, mesh)
    history = run.train(train, progress)
    if history.stopped:
        warnings.warn(history.stopped, TuningWarning, stacklevel=2)
    best = run.best
    if mesh is not None:
        best = jax.device_put(jax.device_get(best), module.norm.weight[...].sharding)
    tuned = run.student.tuned(module, best)
    return (tuned if isinstance(student, Decoder) else dataclasses.replace(lm, module=tuned)), history


def check_pair(student: LanguageModel | Decoder, teacher: LanguageModel | Decoder) -> None:
    """Raises ValueError unless a model can be tuned on another one's predictions, before anything is trained."""
    pupil, master = LanguageModel.of(student), LanguageModel.of(teacher)
    check_same_vocabulary(pupil.module, master.module)
    if not any(path.startswith("model.layers.") for path in pupil.module.quantized_layers()):
        raise ValueError("the student has no quantized layer in its blocks; expected what quantize returned")
    words: list[dict[str, int]] = [getattr(each.tokenizer, "get_vocab", dict)() for each in (pupil, master)]
    if all(words) and words[0] != words[1]:
        other = next(word for word in words[0] | words[1] if words[0].get(word) != words[1].get(word))
        raise ValueError(
            f"student and teacher have different tokenizers: {short(other)} is {words[0].get(other)} and "
            f"{words[1].get(other)}; expected the model that it was made from"
        )


def held_out_rows(rows: int) -> int:
    """How many of some rows are not trained on: a sixteenth, `HELD_OUT` at most."""
    return min(HELD_OUT, max(1, rows // 16))


def _split(batches: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Batches to train on, and the last rows, which are not."""
    rows = sum(map(len, batches))
    wanted = held_out_rows(rows)
    kept = list(batches)
    parts: list[np.ndarray] = []
    while kept and sum(map(len, parts)) < wanted:
        parts.append(kept.pop())
    if not kept:
        raise ValueError(f"there are {rows} rows of text in {len(batches)} batches; too few to train and to hold out")
    length = min(part.shape[1] for part in parts)
    return kept, np.concatenate([part[:, :length] for part in parts])[:wanted]


def _check_divides(batches: list[np.ndarray], held_out: np.ndarray, mesh: Mesh) -> None:
    """Makes sure that rows divide among the devices of a mesh."""
    for what, sizes in (("batches have", {len(batch) for batch in batches}), ("held_out has", {len(held_out)})):
        if wrong := sorted(size for size in sizes if size % mesh.size):
            raise ValueError(f"{what} {short(wrong)} rows; expected multiples of the {mesh.size} devices of the mesh")


def _record(
    module: Decoder, teacher: Decoder, batches: list[np.ndarray], held_out: np.ndarray, config: TuneConfig
) -> dict[str, Any]:
    """What a run depends on."""
    return {
        "student": decoder_fingerprint(module), "teacher": decoder_fingerprint(teacher), "text": text_digest(batches),
        "held_out": text_digest([held_out]), "options": dataclasses.asdict(config),
    }  # fmt: skip


class _Run:
    """The state of one run: student and teacher, the best leaves and the rows of the history."""

    def __init__(
        self,
        module: Decoder,
        teacher: Decoder,
        config: TuneConfig,
        held_out: np.ndarray,
        workdir: TuneDir | None,
        mesh: Mesh | None,
    ):
        self.config, self.held_out, self.workdir, self.mesh = config, held_out, workdir, mesh
        if mesh is not None:
            module, teacher = (as_automatic(place(model, mesh)) for model in (module, teacher))
        self.student, self.teacher = Student(module, config.dtype), Teacher(cast(teacher, config.dtype))
        self.start = self.sizes(self.student.leaves)
        self.rows: list[dict[str, Any]] = []
        self.best = self.copy()

    def train(self, batches: list[np.ndarray], progress: bool) -> TuneHistory:
        """Takes all steps, or stops early."""
        together = self.config.accumulate
        steps = max(1, _steps(batches, self.config.tokens) // together)
        marks = {round(steps * i / self.config.evaluations) for i in range(1, self.config.evaluations + 1)} - {0}
        if not self.resume():
            self.evaluate(0, 0, 0.0, None, 0.0)
        if not np.isfinite(self.rows[0]["kl"]):
            raise ValueError(
                "the divergence of the student from its teacher is not finite before the first step; one of their "
                "tensors probably holds NaN or infinite values"
            )
        done, tokens, stopped = self.rows[-1]["step"], self.rows[-1]["tokens"], None
        begin = time.perf_counter() - self.rows[-1]["seconds"]
        waiting: list[Array] = []  # losses on the device
        losses: list[float] = []
        with progress_bar(progress, total=steps, desc="Tuning", unit="step") as bar:
            bar.update(done)
            for step in range(done + 1, steps + 1):
                chosen = [batches[i % len(batches)] for i in range((step - 1) * together, step * together)]
                rate = self.rate(step, steps)
                waiting.append(self.student.step([self.put(batch) for batch in chosen], self.teacher, rate))
                tokens += sum(batch.size for batch in chosen)
                if len(waiting) >= _CHECKED or step in marks:
                    fresh = [float(x) for x in jax.device_get(waiting)]
                    stopped = self.problem(fresh, step - len(fresh) + 1)
                    losses, waiting = losses + fresh, []
                if step in marks or stopped:
                    self.evaluate(step, tokens, time.perf_counter() - begin, float(np.mean(losses)), rate)
                    bar.set_postfix_str(f"KL {self.rows[-1]['kl']:.4f}")
                    losses = []
                    if not stopped:
                        self.save()
                bar.update()
                if stopped:
                    break
        return self.history(stopped)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 1."""
        cosine = 0.5 + 0.5 * np.cos(np.pi * (step - 1) / steps)
        return float(self.config.learning_rate * min(step / self.config.warmup_steps, cosine))

    def evaluate(self, step: int, tokens: int, seconds: float, loss: float | None, rate: float) -> None:
        """Scores the leaves on held-out text, and keeps them if they are the best."""
        least = 1 if self.mesh is None else self.mesh.size
        size = max(least, len(self.held_out) // 8 // least * least)
        scores, weights = [], []
        for at in range(0, len(self.held_out), size):
            rows = self.held_out[at : at + size]
            scores.append(self.student.score(self.put(rows), self.teacher))
            weights.append(len(rows))
        kl, top1 = np.average(np.array(jax.device_get(scores)), axis=0, weights=weights)
        row = {"step": step, "tokens": tokens, "seconds": seconds, "kl": float(kl), "top1": float(top1)}
        best = min((row["kl"] for row in self.rows), default=np.inf)
        self.rows.append(row | {"loss": loss, "learning_rate": rate})
        if kl < best:
            self.best = self.copy()

    def put(self, rows: np.ndarray) -> Array:
        """Rows of tokens on the device, or divided among those of the mesh."""
        if self.mesh is None:
            return jnp.asarray(rows)
        like = self.student.model.norm.weight[...].sharding
        assert isinstance(like, NamedSharding)
        return jax.device_put(rows, NamedSharding(like.mesh, PartitionSpec(like.mesh.axis_names)))

    def save(self) -> None:
        """Keeps the state in the work directory, if there is one."""
        if self.workdir is not None:
            leaves = jax.tree.leaves(self.state())
            self.workdir.save({str(i): leaf for i, leaf in enumerate(leaves)}, {"rows": self.rows})

    def resume(self) -> bool:
        """Takes up the state that the work directory holds; False if there is none."""
        if self.workdir is None:
            return False
        leaves, structure = jax.tree.flatten(self.state())
        shapes = {str(i): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for i, x in enumerate(leaves)}
        found = self.workdir.load(shapes)
        if found is None:
            return False
        arrays, facts = found
        state = jax.tree.unflatten(structure, [arrays[name] for name in shapes])
        self.student.leaves, self.student.moments, self.best = state
        self.rows = facts["rows"]
        return True

    def state(self) -> tuple[Any, Any, Any]:
        """All arrays that the next step depends on, and the best so far."""
        return self.student.leaves, self.student.moments, self.best

    def copy(self) -> list[Leaves]:
        """The leaves as they are now; the next step donates them."""
        return jax.tree.map(jnp.array, self.student.leaves)

    def sizes(self, leaves: list[Leaves]) -> dict[str, float]:
        """The root mean square of every leaf, by its path in the model."""
        blocks = self.student.by_block(leaves)
        names = [f"layers.{index}." for index in range(len(blocks) - 1)] + [""]
        found = jax.device_get([_sizes(part) for part in blocks])
        return {start + name: float(x) for start, part in zip(names, found, strict=True) for name, x in part.items()}

    def problem(self, losses: list[float], first: int) -> str | None:
        """Why the run must end, given the losses of the last steps, or None."""
        broken = next((i for i, loss in enumerate(losses) if not np.isfinite(loss)), None)
        if broken is not None:
            sizes = self.sizes(self.best)
            grown = max(sizes, key=lambda name: sizes[name] / max(self.start[name], 1e-30))
            return (
                f"the loss of step {first + broken} is {losses[broken]}; the leaf that had grown most by the last good "
                f"evaluation is {grown}. Take a lower learning rate than {self.config.learning_rate:g}; what is "
                "returned is the best so far"
            )
        before = self.rows[0]["kl"]
        if np.mean(losses) > _DIVERGED * before:
            return (
                f"the loss rose to {np.mean(losses):.3g} by step {first + len(losses) - 1}, from {before:.3g} before "
                f"the first: it diverges. Take a lower learning rate than {self.config.learning_rate:g}; what is "
                "returned is the best so far"
            )
        return None

    def history(self, stopped: str | None) -> TuneHistory:
        """The rows so far."""
        best = int(np.nanargmin([row["kl"] for row in self.rows]))
        speed = 0.0
        if len(self.rows) > 2:
            first, last = self.rows[1], self.rows[-1]
            speed = (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
        return TuneHistory(tuple(self.rows), best, speed, stopped)


def _steps(batches: list[np.ndarray], tokens: int) -> int:
    """Steps until so many tokens have been seen, at least one."""
    sizes = np.array([batch.size for batch in batches])
    whole, rest = divmod(tokens, int(sizes.sum()))
    return max(1, whole * len(batches) + int(np.searchsorted(np.cumsum(sizes), rest, side="right")))


@jax.jit
def _sizes(leaves: Leaves) -> Leaves:
    return jax.tree.map(lambda x: jnp.sqrt(jnp.mean(jnp.square(x))), leaves)
