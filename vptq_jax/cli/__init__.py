"""The command `vptq-jax`."""

from vptq_jax.cli.app import main

__all__ = ["main"]
