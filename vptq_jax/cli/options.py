"""Options of a command from the dataclass that holds them, so that no option is named twice."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer


def options_of(struct: type, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command with a parameter of this dataclass: its fields become options, the command gets the struct.

    Help texts are those of the dataclass's `Attributes:`.

    Args:
        struct: a frozen dataclass that checks its values.
        defaults: of this command, by field, where they are other ones than the dataclass has.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if hints[parameter.name] is struct:
                holder = parameter.name
                parameters += _options(struct, defaults)
            else:
                parameters.append(parameter.replace(annotation=hints[parameter.name]))

        @functools.wraps(command)
        def run(**given: Any) -> None:
            settings = {field.name: given.pop(field.name) for field in dataclasses.fields(struct)}
            command(**given, **{holder: struct(**settings)})

        del run.__wrapped__  # or its signature would count
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _options(struct: type, defaults: dict[str, Any]) -> list[inspect.Parameter]:
    hints, texts = get_type_hints(struct), _attributes(struct)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=defaults.get(field.name, field.default),
            annotation=Annotated[hints[field.name], typer.Option(help=texts[field.name])],
        )
        for field in dataclasses.fields(struct)
    ]


def _attributes(struct: type) -> dict[str, str]:
    """What the docstring says of every attribute, with a capital and a full stop."""
    section = inspect.getdoc(struct).split("Attributes:\n")[1].split("\n\n")[0]  # type: ignore[union-attr]
    found = re.findall(r"^    (\w+): ((?:.|\n     +)+)", section, flags=re.MULTILINE)
    return {name: text[0].upper() + " ".join(text[1:].split()).rstrip(".") + "." for name, text in found}
