"""Chat templates: conversations to text, with a template of unknown origin kept within bounds.

Templates are programs. They run in jinja2's sandbox, and since a sandbox bounds neither time nor memory, in a
process of their own: 1 GB beyond the interpreter, 5 seconds of the processor, 16 million characters. That process
knows only jinja2, so it is there in a tenth of a second.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vptq_jax.extras import need
from vptq_jax.schema import short

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send a model's reasoning; templates read the first, gpt-oss' the second."""
_PROCESS = Path(__file__).with_name("template_process.py")
_SECONDS = 10.0


def conversation_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation in the tokenizer's chat template, ready for the model's answer, as transformers writes it.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: `{"role": ..., "content": ...}` in order; values that JSON can hold.

    Raises:
        ValueError: the template refuses the conversation (the message says what it says), fails, or takes too long or
            too much; or a message holds something else than JSON can.
    """
    return render(
        tokenizer.get_chat_template(),
        {
            **tokenizer.special_tokens_map,
            "messages": [_message(message) for message in messages],
            "add_generation_prompt": True,
        }
        | {"tools": None, "documents": None},
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without empty fields, which clients send and templates take for texts."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = [fields[name] for name in _REASONING if name in fields][:1]
    for part in reasoning:
        fields = {"thinking": part, **fields, "reasoning_content": part}
    return fields


def render(template: str, variables: Mapping[str, Any]) -> str:
    """A template's text, or ValueError as `conversation_text` raises it."""
    need("jinja2", "a chat template")
    try:
        request = json.dumps({"template": template, "variables": dict(variables)})
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the conversation holds what JSON cannot: {error}; expected texts") from None
    try:
        # -P: modules beside the program must not stand in for those of the standard library.
        done = subprocess.run(
            [sys.executable, "-P", str(_PROCESS)], input=request, capture_output=True, text=True, timeout=_SECONDS,
            encoding="utf-8",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template fails: it takes longer than {_SECONDS:.0f} seconds") from None
    if done.returncode < 0:
        raise ValueError("the chat template fails: it takes more time or memory than a template may")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ValueError(f"the chat template fails: {short(reason[0])}") from None
    if "said" in answer:
        raise ValueError(f"the chat template says: {answer['said']}")
    if "fault" in answer:
        raise ValueError(f"the chat template fails: {answer['fault']}")
    return answer["text"]
