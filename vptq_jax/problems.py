"""One error for everything that is wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

_MAX_SHOWN = 20
_MAX_LINE = 500


class CheckpointError(ValueError):
    """Everything that is wrong with a checkpoint.

    Attributes:
        problems: one line each, without limit; the message shows the first twenty.
    """

    def __init__(self, what: str, problems: list[str]):
        super().__init__(_message(what, problems))
        self.problems = problems


def raise_problems(what: str, problems: Iterable[str]) -> None:
    """Raises a `CheckpointError` that lists all problems; returns if there are none."""
    problems = list(problems)
    if problems:
        raise CheckpointError(what, problems)


def _message(what: str, problems: list[str]) -> str:
    shown = [f"  {_cut(problem)}" for problem in problems[:_MAX_SHOWN]]
    if len(problems) > _MAX_SHOWN:
        shown.append(f"  ... and {len(problems) - _MAX_SHOWN} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{what}: {count}\n" + "\n".join(shown)


def _cut(problem: str) -> str:
    """A problem without the kilobytes that a hostile name may bring along."""
    return problem if len(problem) <= _MAX_LINE else problem[: _MAX_LINE // 2] + " ... " + problem[-_MAX_LINE // 2 :]
