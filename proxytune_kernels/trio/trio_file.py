"""Reads trio.json: where a directory's three models are, and how they are opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from proxytune_kernels.trio.checkpoints import resolve
from proxytune_kernels.trio.roles import ROLES, check_roles

TRIO_FILE = "trio.json"
TRIO_FORMAT = 1
_KEYS = {"format", *ROLES, "tokenizer", "gguf_file", "merge_adapter", "prompts", "quantize"}


def read_source(source: str | Path | None) -> tuple[Path | None, dict[str, Any]]:
    """A trio's directory and what its trio.json says; neither for no source.

    Args:
        source: ``"shipped"``, or a directory with a trio.json.

    Raises:
        ValueError: there is no such file, or it says what is not known.
    """
    if source is None:
        return None, {}
    directory = (
        Path(str(files("proxytune_kernels") / "data" / "trio"))
        if source == "shipped"
        else Path(source)
    )
    path = directory / TRIO_FILE
    if not path.is_file():
        raise ValueError(
            f"source must be 'shipped' or a directory with a {TRIO_FILE}, got {str(source)!r}"
        )
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must hold JSON: {error}") from error
    if not isinstance(settings, dict) or settings.get("format") != TRIO_FORMAT:
        raise ValueError(f"{path} must be an object of format {TRIO_FORMAT}")
    unknown = sorted(set(settings) - _KEYS)
    if unknown:
        raise ValueError(
            f"{path} must have keys among {', '.join(sorted(_KEYS))}, got {unknown[0]!r}"
        )
    return directory, settings


def named_models(
    settings: Mapping[str, Any], directory: Path | None, **named: str | Path | None
) -> dict[str, str]:
    """Role -> directory or hub name of its model, in the order base, expert, anti.

    Args:
        settings: what trio.json says.
        directory: it is in this one; paths are relative to it.
        named: role -> what replaces trio.json's, or None.

    Raises:
        ValueError: no base, or one of expert and anti without the other.
    """
    references = {
        role: str(named[role])
        if named.get(role) is not None
        else resolve(settings[role], directory)
        for role in ROLES
        if named.get(role) is not None or role in settings
    }
    check_roles(references)
    return references
