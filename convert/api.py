"""`convert`: from any kind of checkpoint to one of three kinds, or a dry run that says what would happen."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from vptq_jax.convert import checkpoint
from vptq_jax.convert.export import KIND as HF_KIND
from vptq_jax.convert.export import MAX_SHARD_BYTES, ExportPlan, export, plan_hf, plan_vptq
from vptq_jax.convert.gguf import open_gguf, tokenizer_of
from vptq_jax.convert.hf import open_hf
from vptq_jax.convert.inspect import facts
from vptq_jax.convert.loading import Kind, load, recognize
from vptq_jax.convert.source import check_dtype
from vptq_jax.convert.tokenizer import load_tokenizer
from vptq_jax.convert.vptq_format import content_problems, open_vptq
from vptq_jax.files import check_output
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.report import peak_memory
from vptq_jax.problems import CheckpointError

Target = Literal["orbax", "hf-vptq", "hf"]


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    """What a conversion did, or what a dry run found.

    Attributes:
        source, kind: where the model came from, and as what it was recognised.
        destination, to: where it goes, and as what.
        written: whether anything was written.
        problems: why it cannot be converted; empty when it can.
        notes: what changes on the way without loss.
        model_type: such as `llama`; None when the source cannot be understood.
        quantized_layers, dense_layers: linear layers in VPTQ form, and all others.
        weights: of all linear layers, embedding table and `lm_head`.
        bits_nominal, bits_total: per decoder weight in the source: indices alone, and everything stored.
        bytes: of the arrays that are (or would be) written.
        files: weight files written.
        seconds: it took.
        peak_memory: highest resident memory of this process so far, in bytes.
    """

    source: str
    kind: Kind | None
    destination: str
    to: Target
    written: bool
    problems: list[str]
    notes: list[str]
    model_type: str | None
    quantized_layers: int
    dense_layers: int
    weights: int
    bits_nominal: float
    bits_total: float
    bytes: int
    files: list[str]
    seconds: float
    peak_memory: int

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Target = "orbax",
    check: bool = False,
    dtype: Any = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> ConvertReport:
    """Converts a checkpoint.

    Args:
        src: anything that `load` opens.
        dst: the new directory.
        to: `orbax` (this library's own), `hf-vptq` (the community's format) or `hf` (plain, dequantized).
        check: write nothing; read everything and report every problem found.
        dtype: of the parameters; None keeps the stored ones. With `hf-vptq`, of the dense layers only.
        overwrite: replace an earlier model at `dst`.
        metadata: added to what the source's own metadata says; goes into the checkpoint or model card.
        max_shard_bytes: size above which weight files are split.
        progress: show bars.

    Raises:
        FileExistsError, FileNotFoundError, NotImplementedError, OSError, ValueError: the source is
            unusable, the format cannot express it, or the destination cannot be written. With
            `check` only for arguments out of range; the rest is in the report.
    """
    start = time.perf_counter()
    if to not in get_args(Target):
        raise ValueError(f"to is {to!r}; expected one of {', '.join(get_args(Target))}")
    check_dtype(dtype)
    src_text, dst = str(src), Path(dst)
    taken = _destination_problem(src_text, dst, to, overwrite)
    if check:
        kind, model, problems = _examine(src_text)
        problems += [str(taken)] if taken else []
        plan = None if model is None else _plan(model, to, dtype)
        problems += plan.problems if plan else []
        files: list[str] = []
    else:
        if taken:
            raise taken
        kind, path = recognize(src_text)
        problems = []
        lm = load(path, dtype=None if kind == "orbax" or to == "hf" else dtype, progress=progress)
        model = lm.module
        plan = _plan(model, to, dtype)
        known = (checkpoint.read_metadata(path) if kind == "orbax" else {}) | dict(metadata or {})
        if plan is None:
            checkpoint.save(lm, dst, overwrite=overwrite, metadata=known)
            files = [str(file.relative_to(dst)) for file in sorted(dst.rglob("*")) if file.is_file()]
        else:
            files = export(
                lm, dst, plan, overwrite=overwrite, metadata=known, max_shard_bytes=max_shard_bytes,
                progress=progress,
            )  # fmt: skip
    about = facts(model) if model is not None else {}
    return ConvertReport(
        source=src_text,
        kind=kind,
        destination=str(dst),
        to=to,
        written=not check,
        problems=problems,
        notes=plan.notes if plan else [],
        model_type=about.get("model_type"),
        quantized_layers=len(model.quantized_layers()) if model is not None else 0,
        dense_layers=len(model.all_linears()) - len(model.quantized_layers()) if model is not None else 0,
        weights=about.get("weights", 0),
        bits_nominal=about.get("bits_nominal", 0.0),
        bits_total=about.get("bits_total", 0.0),
        bytes=plan.nbytes if plan else _nbytes(model) if model is not None else 0,
        files=files,
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory()["host"],
    )


def _plan(model: Decoder, to: Target, dtype: Any) -> ExportPlan | None:
    if to == "orbax":
        return None
    return plan_vptq(model) if to == "hf-vptq" else plan_hf(model, dtype)


def _examine(src: str) -> tuple[Kind | None, Decoder | None, list[str]]:
    """Everything that can be found wrong with a source, reading one tensor at a time; the model without arrays."""
    kind: Kind | None = None
    problems: list[str] = []
    model: Decoder | None = None
    try:
        kind, path = recognize(src)
        model = _abstract(kind, path, problems)
    except CheckpointError as error:
        problems += error.problems
    except (OSError, ValueError, NotImplementedError, ImportError) as error:
        problems.append(str(error))
    return kind, model, problems


def _abstract(kind: Kind, path: Path, problems: list[str]) -> Decoder:
    if kind == "orbax":
        model = checkpoint.abstract(path)
        problems += checkpoint.file_problems(path)
    elif kind == "gguf":
        gguf = open_gguf(path)
        model = gguf.abstract()
        problems += gguf.content_problems()
        _collect(problems, lambda: tokenizer_of(gguf.file))
    elif kind == "hf":
        plain = open_hf(path)
        model = plain.abstract()
        problems += plain.content_problems()
        _collect(problems, lambda: load_tokenizer(path))
    else:
        stored = open_vptq(path)
        model = stored.abstract()
        problems += content_problems(stored, everything=True)
        _collect(problems, lambda: load_tokenizer(path))
    return model


def _collect(problems: list[str], action: Any) -> None:
    try:
        action()
    except (ValueError, NotImplementedError) as error:
        problems.append(str(error))


def _destination_problem(src: str, dst: Path, to: Target, overwrite: bool) -> OSError | None:
    if Path(src).exists() and dst.exists() and Path(src).resolve() == dst.resolve():
        return FileExistsError(f"{dst} is the source itself; choose another directory")
    try:
        check_output(dst, kind=checkpoint.KIND if to == "orbax" else HF_KIND, overwrite=overwrite)
    except OSError as error:
        return error
    return None


def _nbytes(model: Decoder) -> int:
    from flax import nnx

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))
