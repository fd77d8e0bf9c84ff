"""`vptq-jax quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vptq_jax.cli import common
from vptq_jax.cli.options import options_of
from vptq_jax.spec import DEFAULTS, QuantConfig, SearchOptions


@options_of(SearchOptions)
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
    search: SearchOptions = DEFAULTS,
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
        mode=mode,  # type: ignore[arg-type]  # QuantConfig checks it
        **vars(search),
    )
    if mode == "sequential" and (hessians is not None or save_hessians is not None):
        raise ValueError("--mode sequential collects its own Hessians; leave out --hessians and --save-hessians")
    if hessians is not None and save_hessians is not None:
        raise ValueError("--hessians reads what --save-hessians wrote; give one of them")
    from vptq_jax.cli.quantize_run import Windows, run

    report = run(
        model,
        output,
        config,
        windows=Windows(text, samples, length, batch_size),
        hessians=hessians,
        save_hessians=save_hessians,
        workdir=workdir or common.workdir_of(output),
        dtype=dtype,
        overwrite=overwrite,
        quiet=json,
    )
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
