"""The command `vptq-jax`."""

import sys
from collections.abc import Sequence

from vptq_jax.extras import need


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits, see `app.main`; Ctrl-C while its modules are imported ends in a line too."""
    try:
        for module in ("typer", "rich"):
            need(module, "the command line")
        from vptq_jax.cli import app
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted before anything was done; the same command starts again", file=sys.stderr)
        sys.exit(130)
    app.main(arguments)


__all__ = ["main"]
