"""The decoding benchmark's options; every error names the option."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.decode_timing import Case
from benchmarks.prompts import task_tokens
from benchmarks.providers import PROVIDERS, Sampling

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


def parse_cases(batch_sizes: str, lengths: str) -> tuple[Case, ...]:
    """Cases of ``1,4`` and ``8:512,512:8``; ``own:32`` is prompts as long as they are.

    Raises:
        typer.BadParameter: names the option, what it got and what it wanted.
    """
    sizes = [_positive("--batch-sizes", s, 1) for s in batch_sizes.split(",")]
    pairs = []
    for pair in lengths.split(","):
        parts = pair.split(":")
        if len(parts) != 2:
            raise typer.BadParameter(f"--lengths must be prompt:output pairs, got {pair!r}")
        prompt = None if parts[0] == "own" else _positive("--lengths", parts[0], 1)
        pairs.append((prompt, _positive("--lengths", parts[1], 2)))
    return tuple(Case(size, *pair) for pair in pairs for size in sizes)


def _positive(option: str, text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise typer.BadParameter(
            f"{option} must hold integers of at least {least} (an output of 2 has one step to "
            f"time), got {text!r}"
        )
    return value


def check_lengths(prompts: str, cases: Sequence[Case]) -> None:
    """Text is cut to any length, prompts of the other kinds have lengths of their own.

    Raises:
        typer.BadParameter: a case with the other sort of length.
    """
    for case in cases:
        if (case.prompt_length is None) != (prompts != "text"):
            wanted = "prompt:output" if prompts == "text" else "own:output"
            got = "own" if case.prompt_length is None else case.prompt_length
            raise typer.BadParameter(
                f"--lengths must be {wanted} with {prompts} prompts, got {got}:{case.output_length}"
            )


def parse_providers(names: str, compiled: bool) -> tuple[str, ...]:
    """Provider names in table order; ``ours-compiled`` too where asked for.

    Raises:
        typer.BadParameter: an unknown name.
    """
    wanted = {*names.split(","), *(["ours-compiled"] if compiled else [])}
    unknown = sorted(wanted - set(PROVIDERS))
    if unknown:
        raise typer.BadParameter(
            f"--providers must be among {', '.join(PROVIDERS)}, got {unknown[0]!r}"
        )
    return tuple(name for name in PROVIDERS if name in wanted)


def default_lengths(trio: str, prompts: str, quick: bool) -> str:
    """Cases where none are given."""
    if prompts != "text":
        return f"own:{task_tokens(trio)}"
    return "8:32,32:8" if quick else "8:128,128:8,8:8"


def describe(sampling: Sampling) -> str:
    """In words, for titles."""
    if sampling.temperature == 0.0:
        return "greedy"
    top_p = "" if sampling.top_p == 1.0 else f", top_p {sampling.top_p:g}"
    return f"temperature {sampling.temperature:g}{top_p}"


def result_stem(trio: str, prompts: str, sampling: Sampling, quick: bool) -> str:
    """A file name for each trio, kind of prompts and way to draw."""
    parts = ["throughput", Path(trio).name]
    if prompts != "text":
        parts.append(prompts)
    if sampling.temperature == 0.0:
        parts.append("greedy")
    elif sampling != Sampling():
        parts.append(f"t{sampling.temperature:g}-p{sampling.top_p:g}")
    return "-".join([*parts, *(["quick"] if quick else [])])
