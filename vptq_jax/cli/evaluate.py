"""`vptq-jax eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from vptq_jax.cli import common


def evaluate(
    model: common.ModelArgument,
    text: Annotated[
        list[str] | None,
        typer.Option(help="wikitext2, c4, builtin, or a UTF-8 text file; may be given several times."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window; 2048 or what the model allows when not given.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Score only the first windows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    dtype: common.DtypeOption = None,
    json: common.JsonOption = False,
) -> None:
    """Measures perplexity.

    As in the papers on quantization: the text is cut into windows that do not overlap, each is scored
    alone, and perplexity is exp of the mean negative log-likelihood. State the context with the number.

    Examples:

        vptq-jax eval out --text wikitext2 --text c4

        vptq-jax eval out --text notes.txt --context 1024 --max-windows 64 --json
    """
    from vptq_jax.lm import data
    from vptq_jax.lm.evaluation import perplexity

    texts = text or ["builtin"]
    for name in texts:
        data.check_source(name)
    loaded = common.load_model(model, dtype)
    tokenizer = common.tokenizer_of(loaded, model)
    context = common.context_for(loaded, context)
    results = {}
    for name in texts:
        tokens = data.tokenize(tokenizer, data.load_text(name, "evaluation"))
        results[name] = perplexity(
            loaded, tokens, context=context, max_windows=max_windows, batch_size=batch_size, progress=not json
        )
        if not json:
            result = results[name]
            print(
                f"{name}: perplexity {result.value:.3f} "
                f"(context {context}, {result.windows} windows, {result.seconds:.0f} s)"
            )
    if json:
        common.print_json({"model": model, "texts": results})
