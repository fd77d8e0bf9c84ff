"""The command `vptq-jax`."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits, see `app.main`; Ctrl-C while its modules are imported ends in a line too."""
    try:
        from vptq_jax.cli import app
    except KeyboardInterrupt:
        print("error: interrupted before anything was done; the same command starts again", file=sys.stderr)
        sys.exit(130)
    app.main(arguments)


__all__ = ["main"]
