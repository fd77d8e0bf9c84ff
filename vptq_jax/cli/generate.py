"""`vptq-jax generate` and `vptq-jax chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from vptq_jax.cli import common
from vptq_jax.cli.options import options_of
from vptq_jax.cli.terminal import shown
from vptq_jax.lm.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from vptq_jax.lm.language_model import LanguageModel

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")]


@options_of(Sampling)
def generate(
    model: common.ModelArgument,
    prompt: Annotated[
        list[str], typer.Argument(help="One or more texts to continue; - reads one from standard input.")
    ],
    max_new_tokens: MaxNewTokens = 128,
    sampling: Sampling = GREEDY,
    dtype: common.DtypeOption = None,
    json: common.JsonOption = False,
) -> None:
    """Continues a text, or several as one batch.

    Examples:

        vptq-jax generate out "The capital of France is" --max-new-tokens 32

        vptq-jax generate out "Once upon" "In a galaxy" --temperature 0.8 --top-p 0.95 --seed 7

        vptq-jax generate out - --json < prompt.txt
    """
    from vptq_jax.lm.generation import GenerationResult
    from vptq_jax.lm.generation import generate as generate_texts

    prompts = [sys.stdin.read() if text == "-" else text for text in prompt]
    if not all(prompts):
        raise ValueError("the prompt is empty; expected some text")
    loaded = common.load_model(model, dtype)
    common.tokenizer_of(loaded, model)
    with common.log.status("Generating (the first tokens take longest: the program is compiled)"):
        result = generate_texts(loaded, prompts, max_new_tokens=max_new_tokens, sampling=sampling, return_result=True)
    assert isinstance(result, GenerationResult)
    assert result.texts is not None
    if json:
        common.print_json(
            {"model": model, "prompts": prompts, **vars(result), "tokens_per_second": result.tokens_per_second}
        )
        return
    for text, continuation in zip(prompts, result.texts, strict=True):
        print(shown(text + continuation) + ("\n" if len(prompts) > 1 else ""))
    common.log.print(
        f"{sum(map(len, result.tokens))} tokens, {result.tokens_per_second:.1f}/s, {result.implementation} matmul",
        style="dim",
        highlight=False,
    )


@options_of(Sampling, repetition_penalty=1.1)
def chat(
    model: common.ModelArgument,
    message: Annotated[
        str | None, typer.Option(help="Ask this, print the answer and leave.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.", show_default=False)] = None,
    max_new_tokens: MaxNewTokens = 512,
    sampling: Sampling = GREEDY,
    dtype: common.DtypeOption = None,
    json: common.JsonOption = False,
) -> None:
    """Talks with a model that has a chat template.

    Type a message and read the answer as it is written; an empty line, Ctrl-D or Ctrl-C ends.

    Examples:

        vptq-jax chat out

        vptq-jax chat out --message "What is a codebook?" --temperature 0.7
    """
    from vptq_jax.lm.generation import ContextFull, stream
    from vptq_jax.lm.prompt_cache import PromptCache

    if message is not None and not message.strip():
        raise ValueError("the message is empty; expected some text")
    if json and message is None:
        raise ValueError("--json needs --message: a conversation is no JSON object")
    loaded = common.load_model(model, dtype)
    common.tokenizer_of(loaded, model)
    messages = [{"role": "system", "content": system}] if system else []
    prompt_cache = PromptCache()
    if message is None:
        common.log.print("An empty line ends the conversation.", style="dim")
    for question in _questions() if message is None else [message]:
        messages.append({"role": "user", "content": question})
        try:
            messages, ids = _fitting(loaded, messages, max_new_tokens)
        except ContextFull as error:
            if message is not None or not sys.stdin.isatty():
                raise
            del messages[-1]  # a person goes on with the conversation as it was
            common.log.print(str(error), style="yellow", highlight=False)
            continue
        answer = ""
        for piece in stream(loaded, ids, max_new_tokens=max_new_tokens, sampling=sampling, prompt_cache=prompt_cache):
            answer += piece
            if not json:
                print(shown(piece), end="", flush=True)
        messages.append({"role": "assistant", "content": answer})
        if json:
            common.print_json({"model": model, "messages": messages})
        else:
            print()


def _fitting(
    model: LanguageModel, messages: list[dict[str, str]], max_new_tokens: int
) -> tuple[list[dict[str, str]], list[int]]:
    """The conversation and its token ids, the oldest exchanges left out where no room for an answer is left.

    Room is that for `max_new_tokens`, or for a quarter of the context where that is less. The last message stays.

    Raises:
        ContextFull: the last message alone leaves no room for any answer.
    """
    from vptq_jax.lm.generation import ContextFull, chat_prompt

    context = model.config.context_length
    room = min(max_new_tokens, context // 4)
    kept, first = list(messages), int(messages[0]["role"] == "system")
    while len(ids := chat_prompt(model, kept)) > context - room and len(kept) - first >= 3:
        del kept[first : first + 2]
    if len(ids) >= context:
        raise ContextFull(
            f"the message has {len(ids)} tokens with its template and the model's context holds {context}, which "
            "leaves no room for an answer; expected a shorter message"
        )
    if len(kept) < len(messages):
        common.log.print("The oldest messages no longer fit the model's context and are left out.", style="dim")
    return kept, ids


def _questions() -> Iterator[str]:
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not question.strip():
            return
        yield question
