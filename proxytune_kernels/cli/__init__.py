"""The ``proxytune`` command.

Exit codes: 0 done, 1 failed while running (a trio that does not open, a prompt that does not fit),
2 wrong usage, 130 interrupted.
"""

from proxytune_kernels.cli.app import app, main

__all__ = ["app", "main"]
