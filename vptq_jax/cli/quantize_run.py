"""What `vptq-jax quantize` does: calibrate, quantize, save, and continue where an earlier run was stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from vptq_jax import files
from vptq_jax.cli import common
from vptq_jax.convert import checkpoint
from vptq_jax.convert.hessian_files import load_hessians
from vptq_jax.lm import data
from vptq_jax.lm.hessians import check_origin, collect_hessians
from vptq_jax.lm.quantizer import config_record, quantize, run_fingerprint
from vptq_jax.lm.report import QuantReport
from vptq_jax.lm.workdir import WorkDir
from vptq_jax.nn.hessians import KIND as HESSIANS
from vptq_jax.nn.hessians import Hessians
from vptq_jax.problems import raise_problems
from vptq_jax.spec import QuantConfig

if TYPE_CHECKING:
    from jax import Array

    from vptq_jax.lm.language_model import LanguageModel
    from vptq_jax.lm.streamed import StreamedModel


@dataclasses.dataclass(frozen=True)
class Windows:
    """Calibration text: where it comes from, and how it is cut.

    Attributes:
        text: see `data.load_text`.
        samples: windows, at most.
        length: tokens of a window.
        batch_size: windows in one forward pass.
    """

    text: str
    samples: int
    length: int
    batch_size: int


def run(
    model: str,
    output: Path,
    config: QuantConfig,
    *,
    windows: Windows,
    hessians: Path | None,
    save_hessians: Path | None,
    workdir: Path,
    dtype: str | None,
    overwrite: bool,
    quiet: bool,
) -> QuantReport:
    """Quantizes the stored `model` into the directory `output`; see the command for the arguments."""
    # Each of them may be replaced or removed as a whole.
    files.check_apart(output=output, work_directory=workdir, Hessians=hessians or save_hessians)
    for path in (output, save_hessians):
        if path is not None:
            files.sweep(files.final_path(path))  # what a killed run of this command left
    done = None if overwrite else _report_at(output, config)
    if done is None:
        files.check_output(output, kind=checkpoint.KIND, overwrite=overwrite)
    if save_hessians is not None and HESSIANS.files(save_hessians) is None:
        files.check_output(save_hessians)
    if hessians is None:
        data.check_source(windows.text)

    hint = f"Finished layers are in {workdir}; the same command continues from there."
    with WorkDir(workdir) as work, common.hint(hint):
        loaded = common.open_model(model, dtype)
        calibration = _calibration(loaded, model, hessians, save_hessians, windows, quiet=quiet)
        if done is not None and not work.started:
            _check_same(done, run_fingerprint(loaded, config, calibration), output)
            report = done
        else:
            quantized, report = quantize(loaded, config, calibration, workdir=work, progress=not quiet)
            if done is not None:
                _check_same(done, report.fingerprint, output)
            else:
                origin = (
                    f"Hessians of {hessians}" if hessians else f"{windows.text}, windows of {windows.length} tokens"
                )
                metadata = {"calibration": origin, "quantization": report.as_json()}
                checkpoint.save(quantized, output, overwrite=overwrite, metadata=metadata, report=report)
        work.remove(row["path"] for row in report.operators)
    return report


def _calibration(
    model: LanguageModel | StreamedModel,
    name: str,
    hessians: Path | None,
    save_hessians: Path | None,
    windows: Windows,
    *,
    quiet: bool,
) -> Hessians | list[Array]:
    """Hessians from files, or batches of tokens; with `save_hessians`, the Hessians of those batches."""
    if hessians is not None:
        return load_hessians(hessians)
    length = windows.length
    if length > model.config.context_length:
        raise ValueError(f"--length is {length}; the model reads at most {model.config.context_length} tokens")
    tokens = data.tokenize(common.tokenizer_of(model, name), data.load_text(windows.text, "calibration"))
    rows = data.windows(tokens, length, windows.samples, first=model.config.first_token)
    common.log.print(f"Calibrating on {len(rows)} windows of {length} tokens from {windows.text}", highlight=False)
    batches = data.batches(rows, windows.batch_size)
    if save_hessians is None:
        return batches
    if HESSIANS.files(save_hessians) is not None:  # an interrupted run of this command wrote them
        collected = load_hessians(save_hessians)
        check_origin(collected, model, batches, str(save_hessians))
        return collected
    collected = collect_hessians(model, batches, progress=not quiet)
    collected.save(save_hessians)
    return collected


def _report_at(output: Path, config: QuantConfig) -> QuantReport | None:
    """The report of a model at the output that may be the result of this very command, run or killed before."""
    if checkpoint.KIND.files(output) is None:
        return None
    stored = checkpoint.read_metadata(output).get("quantization")
    fields = {field.name for field in dataclasses.fields(QuantReport)}
    if not isinstance(stored, dict) or not fields <= stored.keys() or stored["config"] != config_record(config):
        return None
    return QuantReport(**{name: stored[name] for name in fields})


def _check_same(report: QuantReport, fingerprint: str, output: Path) -> None:
    """Makes sure that the model at the output is what this command would write, and whole."""
    if report.fingerprint != fingerprint:
        raise FileExistsError(
            f"{output} already holds a model, made from other weights or other text; "
            "choose another directory, or replace it with --overwrite"
        )
    raise_problems(f"{output} is damaged; replace it with --overwrite", checkpoint.file_problems(output))
    common.log.print(f"{output} is the result of this command already.", highlight=False)
