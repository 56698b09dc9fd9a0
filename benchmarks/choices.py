"""Comma-separated options with known values; needs none of what the benchmarks measure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer


def parse_choices(option: str, text: str | None, known: Iterable[Any], default: Any) -> list[Any]:
    """A comma-separated option's values, each one of ``known``; ``[default]`` where not given.

    Raises:
        typer.BadParameter: names the option, what it got and what it wanted.
    """
    if text is None:
        return [default]
    by_name = {str(value): value for value in known}
    unknown = [name for name in text.split(",") if name not in by_name]
    if unknown:
        raise typer.BadParameter(f"{option} must be among {', '.join(by_name)}, got {unknown[0]!r}")
    return [by_name[name] for name in text.split(",")]
