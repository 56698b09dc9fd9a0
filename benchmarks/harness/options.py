"""Options that the commands share; every error names the option. Imports nothing that is slow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

TrioName = Annotated[str, typer.Option(help="shipped, qwen, or a directory with a trio.json.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Of torch.", show_default="torch's own choice")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the weights: auto, float32, bfloat16, float16.",
        show_default="float32 for the shipped trio, auto for others",
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Timed runs.")]
Output = Annotated[
    Path | None, typer.Option(help="JSON lines.", show_default="a file of benchmarks/results")
]
Plot = Annotated[bool, typer.Option(help="Also a PNG beside the output.")]


def parse_choices(option: str, text: str | None, known: Iterable[Any], default: Any) -> list[Any]:
    """A comma-separated option's values, each one of ``known``; ``[default]`` where not given."""
    if text is None:
        return [default]
    by_name = {str(value): value for value in known}
    for name in text.split(","):
        if name not in by_name:
            raise typer.BadParameter(f"{option} must be among {', '.join(by_name)}, got {name!r}")
    return [by_name[name] for name in text.split(",")]


def parse_integers(option: str, text: str, least: int, most: int | None = None) -> list[int]:
    """A comma-separated option's integers."""
    wanted = f"of at least {least:,}" if most is None else f"from {least:,} to {most:,}"
    values = []
    for part in text.split(","):
        digits = part.isascii() and part.isdigit()
        if not digits or int(part) < least or (most is not None and int(part) > most):
            raise typer.BadParameter(f"{option} must hold integers {wanted}, got {part!r}")
        values.append(int(part))
    return values


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError, such as an absent trio, into a wrong option; bugs keep their traceback."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def set_threads(threads: int | None) -> int:
    """Set torch's threads where told; returns how many there are."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def trio_label(name: str) -> str:
    """A trio's name in results and file names."""
    return name if name in ("shipped", "qwen") else Path(name).name
