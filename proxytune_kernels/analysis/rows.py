"""JSON lines from a user's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def json_value(where: str, line: str) -> Any:
    """What a line holds, which should be an object; ``where`` says which line it is.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(line)
    # An integer of thousands of digits is a ValueError, thousands of brackets are the other.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be a JSON object: {error}") from error


def json_object(where: str, line: str) -> dict[str, Any]:
    """The object that a line holds; ``where`` says which line it is.

    Raises:
        ValueError: it holds anything else.
    """
    value = json_value(where, line)
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {line:.80}")
    return value


def lines_of(text: str) -> list[tuple[int, str]]:
    """The lines of a text that are not blank, each with its number from 1.

    Unicode has more ends of lines (U+2028, form feed), which in a prompt are text.
    """
    lines = enumerate(text.split("\n"), 1)
    return [(i, line.removesuffix("\r")) for i, line in lines if line.strip()]


def decoded(name: str, data: bytes) -> str:
    """The text of a file or stream.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text: {error}") from error


def read_rows(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with its line's number; blank lines are skipped.

    Raises:
        OSError: it can't be read.
        ValueError: it is not UTF-8, has a line that is no object, or has none that is one.
    """
    text = decoded(str(path), Path(path).read_bytes())
    rows = [(i, json_object(f"{path}, line {i}", line)) for i, line in lines_of(text)]
    if not rows:
        raise ValueError(f"{path} must hold JSON objects, one a line, got none")
    return rows
