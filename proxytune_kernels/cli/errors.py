"""A user's mistake: one sentence on standard error and an exit code, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

FAILED = 1
USAGE = 2


def stop(message: object, code: int) -> typer.Exit:
    """Say what is wrong on one line of standard error; returns what to raise."""
    typer.echo(f"Error: {' '.join(str(message).split())}", err=True)
    return typer.Exit(code)


@contextmanager
def expected(*kinds: type[Exception], code: int = FAILED) -> Iterator[None]:
    """Leave with one sentence and ``code`` where an error of these kinds comes up."""
    try:
        yield
    except typer.Exit:  # a RuntimeError, and already said
        raise
    except kinds as error:
        raise stop(error, code) from error
