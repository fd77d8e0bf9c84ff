"""`vptq-jax quantize`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vptq_jax import checkpoint, data, files
from vptq_jax.cli import common
from vptq_jax.convert.problems import raise_problems
from vptq_jax.quantize.hessian import KIND as HESSIANS
from vptq_jax.quantize.hessian import Hessians, check_origin, collect_hessians, load_hessians
from vptq_jax.quantize.model import config_record, run_fingerprint
from vptq_jax.quantize.model import quantize as quantize_model
from vptq_jax.quantize.state import WorkDir
from vptq_jax.report import QuantReport
from vptq_jax.spec import QuantConfig

if TYPE_CHECKING:
    from jax import Array

    from vptq_jax.models.decoder import Decoder
    from vptq_jax.models.streamed import StreamedModel


def quantize(
    model: common.ModelArgument,
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="New directory for the quantized model.", show_default=False)
    ],
    spec: Annotated[
        str,
        typer.Option(help="Format of every decoder layer, or none: v<length>-k<centroids>[-<residual centroids>]..."),
    ] = "v8-k4096-4096",
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=SPEC",
            help="Another spec, or none, for modules whose path matches; the first match wins. May be repeated.",
        ),
    ] = None,
    text: Annotated[str, typer.Option(help="Calibration text: wikitext2, c4, builtin, or a UTF-8 file.")] = "builtin",
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text, at most.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")] = 1,
    hessians: Annotated[
        Path | None, typer.Option(help="Use Hessians saved before, instead of calibrating.", show_default=False)
    ] = None,
    save_hessians: Annotated[
        Path | None, typer.Option(help="Keep the Hessians here, to quantize to other specs.", show_default=False)
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="independent|sequential",
            help="Calibrate every layer on the original model, or behind the quantized layers before it.",
        ),
    ] = QuantConfig.mode,
    rounds: Annotated[
        int, typer.Option(min=0, help="Rounds of refinement; 0 is the algorithm of the paper.")
    ] = QuantConfig.rounds,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = QuantConfig.seed,
    dtype: common.DtypeOption = None,
    workdir: Annotated[
        Path | None,
        typer.Option(
            help="Where finished layers wait, so that the same command continues after an interruption; "
            "OUTPUT.partial when not given.",
            show_default=False,
        ),
    ] = None,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
) -> None:
    """Quantizes a model with VPTQ and saves it.

    A spec such as v8-k4096-256 stores every 8 weights as one index into 4096 vectors and one into 256
    corrections: (12 + 8) / 8 = 2.5 bits per weight, plus the codebooks, which weigh most on small models.

    Examples:

        vptq-jax quantize path/to/Llama-2-7b-hf out --spec v8-k65536-256 --text c4

        vptq-jax quantize model.gguf out --spec v4-k256 --rule 'down_proj=v4-k4096' --rule 'layers\\.0\\.=none'

        vptq-jax quantize path/to/model out2 --spec v12-k4096-4096 --hessians saved_hessians
    """
    config = QuantConfig(
        spec=None if spec == "none" else spec,
        rules=parse_rules(rule or ()),
        seed=seed,
        rounds=rounds,
        mode=mode,  # type: ignore[arg-type]  # QuantConfig checks it
    )
    if mode == "sequential" and (hessians is not None or save_hessians is not None):
        raise ValueError("--mode sequential collects its own Hessians; leave out --hessians and --save-hessians")
    if hessians is not None and save_hessians is not None:
        raise ValueError("--hessians reads what --save-hessians wrote; give one of them")
    workdir = workdir or output.with_name(f"{output.name}.partial")
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
        data.check_source(text)

    with WorkDir(workdir) as work, _hint(f"Finished layers are in {workdir}; the same command continues from there."):
        loaded = common.open_model(model, dtype)
        calibration = _calibration(
            loaded, model, hessians, save_hessians, (text, samples, length, batch_size), quiet=json
        )
        if done is not None and not work.started:
            _check_same(done, run_fingerprint(loaded, config, calibration), output)
            report = done
        else:
            quantized, report = quantize_model(loaded, config, calibration, workdir=work, progress=not json)
            if done is not None:
                _check_same(done, report.fingerprint, output)
            else:
                metadata = {
                    "calibration": f"Hessians of {hessians}" if hessians else f"{text}, windows of {length} tokens",
                    "quantization": report.as_json(),
                }
                checkpoint.save(quantized, output, overwrite=overwrite, metadata=metadata, report=report)
        work.remove(row["path"] for row in report.operators)
    if json:
        common.print_json({"model": model, "output": str(output), **report.as_json()})
        return
    common.out.print(report.table())
    print(
        f"{report.bits_total:.3f} bits per weight with everything included, {report.bits_nominal:.3f} nominal; "
        f"saved in {output}"
    )


def parse_rules(rules: Sequence[str]) -> list[tuple[str, str | None]]:
    """(regular expression, spec or None) pairs from texts such as `down_proj=v4-k256` and `k_proj=none`.

    Raises:
        ValueError: a text has another form.
    """
    pairs: list[tuple[str, str | None]] = []
    for rule in rules:
        pattern, _, spec = rule.rpartition("=")
        if not pattern:
            raise ValueError(f"--rule is {rule!r}; expected REGEX=SPEC, such as 'down_proj=v4-k256' or 'k_proj=none'")
        pairs.append((pattern, None if spec == "none" else spec))
    return pairs


def _calibration(
    model: Decoder | StreamedModel,
    name: str,
    hessians: Path | None,
    save_hessians: Path | None,
    text: tuple[str, int, int, int],
    *,
    quiet: bool,
) -> Hessians | list[Array]:
    """Hessians from files, or batches of tokens; with `save_hessians`, the Hessians of those batches."""
    if hessians is not None:
        return load_hessians(hessians)
    source, samples, length, batch_size = text
    if length > model.config.context_length:
        raise ValueError(f"--length is {length}; the model reads at most {model.config.context_length} tokens")
    tokens = data.tokenize(common.tokenizer_of(model, name), data.load_text(source, "calibration"))
    windows = data.windows(tokens, length, samples)
    common.log.print(f"Calibrating on {len(windows)} windows of {length} tokens from {source}", highlight=False)
    batches = data.batches(windows, batch_size)
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


@contextlib.contextmanager
def _hint(text: str) -> Iterator[None]:
    """Says how to go on after an interrupt."""
    try:
        yield
    except KeyboardInterrupt:
        common.log.print(text, highlight=False)
        raise
