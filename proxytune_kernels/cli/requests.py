"""Prompts from arguments, a file or standard input, each with its sampling parameters."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from proxytune_kernels.cli.errors import FAILED, USAGE, expected, stop
from proxytune_kernels.params import SAMPLING_FIELDS, SamplingParams


@dataclass(frozen=True)
class CliRequest:
    """A prompt, in any form that the decoder takes, and how to sample for it."""

    prompt: Any
    params: SamplingParams

    @property
    def label(self) -> str:
        """The prompt as text, for people."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt)


def read_requests(
    prompts: Sequence[str], file: str | None, jsonl: bool | None, params: SamplingParams
) -> list[CliRequest]:
    """Requests from the arguments, else from a file, else from standard input.

    Args:
        prompts: from the arguments.
        file: one prompt a line, blank lines skipped, or JSON lines; "-" is standard input.
        jsonl: whether lines are JSON objects with "prompt" and any sampling parameters. None is by
            the file's name (.jsonl); without a file, all of standard input is one prompt.
        params: what a line does not say.
    """
    if prompts and file is not None:
        raise stop("give prompts as arguments or with --file, not both", USAGE)
    if prompts:
        return [CliRequest(prompt, params) for prompt in prompts]
    if file is None and sys.stdin.isatty():
        raise stop("no prompt: give one as an argument, with --file, or on standard input", USAGE)
    name = "standard input" if file in (None, "-") else str(file)
    as_jsonl = name.endswith(".jsonl") if jsonl is None else jsonl
    text = _read(file, name)
    whole = file is None and jsonl is None
    pieces = [text.removesuffix("\n")] if whole else text.splitlines()
    lines = [(i, piece) for i, piece in enumerate(pieces, 1) if piece.strip()]
    if as_jsonl:
        requests = [_from_json(f"{name}, line {i}", line, params) for i, line in lines]
    else:
        requests = [CliRequest(line, params) for _, line in lines]
    if not requests:
        raise stop(f"{name} holds no prompt", USAGE)
    return requests


def _read(file: str | None, name: str) -> str:
    with expected(OSError):
        data = sys.stdin.buffer.read() if file in (None, "-") else Path(name).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise stop(f"{name} must be UTF-8 text: {error}", FAILED) from error


def _from_json(where: str, line: str, params: SamplingParams) -> CliRequest:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise stop(f"{where} must be a JSON object: {error}", USAGE) from error
    if not isinstance(value, dict) or "prompt" not in value:
        raise stop(f'{where} must be a JSON object with "prompt", got {line:.80}', USAGE)
    prompt = value.pop("prompt")
    unknown = sorted(set(value) - set(SAMPLING_FIELDS))
    if unknown:
        known = ", ".join(SAMPLING_FIELDS)
        raise stop(f"{where} has unknown key {unknown[0]!r}; known are prompt, {known}", USAGE)
    try:
        return CliRequest(prompt, replace(params, **value))
    except ValueError as error:
        raise stop(f"{where}: {error}", USAGE) from error
