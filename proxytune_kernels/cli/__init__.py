"""The ``proxytune`` command."""

from proxytune_kernels.cli.app import app, main

__all__ = ["app", "main"]
