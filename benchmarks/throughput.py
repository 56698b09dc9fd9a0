"""Decoding a trio end to end: tokens/s, latency and memory of ours beside a transformers loop.

``python -m benchmarks.throughput --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from benchmarks.agreement import Mismatch, greedy_mismatches
from benchmarks.decode_timing import Case, time_case
from benchmarks.memory import in_fresh_process
from benchmarks.options import parse_cases, parse_providers
from benchmarks.plots import plot_throughput
from benchmarks.prompts import make_prompts
from benchmarks.providers import ALPHA, PROVIDERS, TEMPERATURE, TOP_P, Provider
from benchmarks.report import (
    RESULTS,
    console,
    fixed,
    machine_line,
    make_progress,
    make_table,
    significant,
    write_json_lines,
)
from benchmarks.trios import open_trio
from proxytune_kernels import Trio

DEFAULT_PROVIDERS = "naive,base-only,ours"
_GREEDY_ROWS, _GREEDY_PROMPT, _GREEDY_TOKENS = 4, 12, 16  # the agreement check

_MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    trio: str
    dtype: str | None
    providers: tuple[str, ...]
    cases: tuple[Case, ...]
    repeats: int
    memory: bool


def check_context(trio: Trio, cases: Sequence[Case]) -> None:
    """Refuse cases longer than the trio's shortest context.

    Raises:
        typer.BadParameter: names the case and the context.
    """
    context = min(
        model.config.get_text_config(decoder=True).max_position_embeddings
        for model in trio.models.values()
    )
    for case in cases:
        if case.prompt_length + case.output_length > context:
            raise typer.BadParameter(
                f"--lengths must fit in the trio's context of {context} tokens, "
                f"got {case.prompt_length}:{case.output_length}"
            )


def make_providers(trio: Trio, settings: Settings) -> list[Provider]:
    """The providers asked for, each with room for the largest case."""
    rows = max(case.batch_size for case in settings.cases)
    length = max(case.prompt_length + case.output_length for case in settings.cases)
    length = max(length, _GREEDY_PROMPT + _GREEDY_TOKENS)
    return [PROVIDERS[name](trio, rows, length) for name in settings.providers]


def check_greedy(trio: Trio, providers: Sequence[Provider]) -> list[Mismatch]:
    """Compare greedy tokens before anything is timed; returns the ties within rounding.

    Raises:
        typer.Exit: code 1, a provider decodes other tokens; each mismatch is printed.
    """
    prompts = make_prompts(trio, _GREEDY_ROWS, _GREEDY_PROMPT)
    mismatches = greedy_mismatches(providers, trio, prompts, _GREEDY_TOKENS)
    for mismatch in mismatches:
        console.print(str(mismatch), style="yellow" if mismatch.within_rounding else "red")
    if not all(mismatch.within_rounding for mismatch in mismatches):
        console.print("Greedy tokens disagree: nothing is timed.", style="red")
        raise typer.Exit(1)
    console.print(
        f"Greedy tokens agree: {_GREEDY_ROWS} prompts x {_GREEDY_TOKENS} tokens, "
        f"{', '.join(p.name for p in providers)}"
        + (f"; {len(mismatches)} ties within rounding." if mismatches else ".")
    )
    return mismatches


def _tick(progress: Progress, task: Any, case: Case) -> Any:
    def tick(name: str) -> None:
        progress.update(task, advance=1, description=f"{case}: {name}")

    return tick


def measure(trio: Trio, settings: Settings, providers: Sequence[Provider]) -> list[dict[str, Any]]:
    """Time all cases, then measure memory; one record per case and provider."""
    runs = len(settings.cases) * (len(providers) + 1) * (settings.repeats + 1)
    records = []
    with make_progress() as progress:
        task = progress.add_task("timing", total=runs + len(providers) * settings.memory)
        for case in settings.cases:
            tick = _tick(progress, task, case)
            times = time_case(trio, providers, case, settings.repeats, tick)
            records += [times.record(provider.name) for provider in providers]
        for provider in providers if settings.memory else ():
            progress.update(task, description=f"memory: {provider.name}")
            _add_memory(records, settings, provider.name)
            progress.advance(task)
    return records


def _add_memory(records: list[dict[str, Any]], settings: Settings, provider: str) -> None:
    shapes = [(c.batch_size, c.prompt_length, c.output_length) for c in settings.cases]
    peaks = in_fresh_process(
        "benchmarks.trios:provider_peaks",
        trio=settings.trio,
        dtype=settings.dtype,
        provider=provider,
        cases=shapes,
        threads=torch.get_num_threads(),
    )
    own = (record for record in records if record["provider"] == provider)
    for record, peak in zip(own, peaks, strict=True):
        record["peak_memory"] = peak


def print_table(records: Sequence[dict[str, Any]], title: str) -> None:
    """The table at the end."""
    columns = (
        "provider", "tokens\n/s", "x\nnaive", "first\nms", "token ms\np50", "\np95",
        "step /\nforwards", "peak\nMiB", "extra\nMiB",
    )  # fmt: skip
    caption = (
        "x naive: tokens/s over the naive loop's, paired by repeat. step / forwards: time per "
        "output token over the sum of the bare forwards of all roles, measured alone in the same "
        f"run. Medians. {machine_line()}"
    )
    table = make_table(title, columns, caption)
    previous = None
    for r in records:
        case = Case(r["batch_size"], r["prompt_length"], r["output_length"])
        if case != previous:
            table.add_section()
            forwards = significant(r["bare_forwards_ms"]["sum"])
            table.add_row(f"[bold]{case}")
            table.add_row("bare forwards", "", "", "", forwards, "", "1.00")
            previous = case
        speed, peak = r["speed_over_naive"], r.get("peak_memory")
        table.add_row(
            r["provider"],
            significant(r["tokens_per_second"]["median"]),
            fixed(speed and speed["median"]),
            significant(r["first_token_ms"]["median"]),
            significant(r["output_token_ms"]["p50"]),
            significant(r["output_token_ms"]["p95"]),
            fixed(r["step_over_forwards"]["median"]),
            fixed(peak and peak["total_bytes"] / _MIB, 0),
            fixed(peak and peak["extra_bytes"] / _MIB, 1),
        )
    console.print(table)


def run(settings: Settings, output: Path, plot: bool) -> None:
    """Load, check, measure, write and show."""
    trio = open_trio(settings.trio, settings.dtype)
    check_context(trio, settings.cases)
    providers = make_providers(trio, settings)
    ties = check_greedy(trio, providers)
    records = measure(trio, settings, providers)
    dtypes = {role: info["dtype"] for role, info in trio.info()["roles"].items()}
    sizes = {role: info["parameters"] for role, info in trio.info()["roles"].items()}
    name = settings.trio if settings.trio in ("shipped", "qwen") else Path(settings.trio).name
    parameters = {"alpha": ALPHA, "temperature": TEMPERATURE, "top_p": TOP_P}
    shared = {"trio": name, "dtype": dtypes, "model_parameters": sizes, "sampling": parameters}
    for record in records:
        record["greedy_ties"] = [str(t) for t in ties if t.provider == record["provider"]]
    write_json_lines(output, "throughput", [{**shared, **record} for record in records])
    kinds = "/".join(dict.fromkeys(dtypes.values()))
    title = f"Proxy-tuned decoding, trio {name}, {kinds}, temperature {TEMPERATURE}, top_p {TOP_P}"
    print_table(records, title)
    for provider in providers:
        if provider.set_up_seconds > 1:
            console.print(
                f"{provider.name}: {provider.set_up_seconds:.0f} s to compile before its first "
                "token, in none of the timings."
            )
    console.print(f"Wrote {output}", soft_wrap=True)
    if plot:
        picture = output.with_suffix(".png")
        plot_throughput(records, picture, title)
        console.print(f"Wrote {picture}", soft_wrap=True)


def main(
    trio: Annotated[
        str, typer.Option(help="shipped, qwen, or a directory with a trio.json.")
    ] = "shipped",
    providers: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(PROVIDERS)}.")
    ] = DEFAULT_PROVIDERS,
    batch_sizes: Annotated[
        str | None, typer.Option(help="Comma-separated.", show_default="1,4")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated prompt:output pairs; the paper's speed test is 8:512,512:8,8:8.",
            show_default="8:128,128:8,8:8",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="Batch 1, lengths 8:32,32:8, three repeats, where not given.")
    ] = False,
    compile: Annotated[bool, typer.Option(help="Also ours with torch.compile.")] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed runs.", show_default="5")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch.", show_default="torch's own choice")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the weights: auto, float32, bfloat16, float16.",
            show_default="float32 for the shipped trio, auto for others",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON lines.", show_default="benchmarks/results/throughput-<trio>.jsonl"),
    ] = None,
    plot: Annotated[bool, typer.Option(help="Also a PNG beside the output.")] = True,
    memory: Annotated[bool, typer.Option(help="Also peak memory, one process a provider.")] = True,
) -> None:
    """Time decoding a trio: a transformers loop, the base alone, and ours, side by side."""
    if threads is not None:
        torch.set_num_threads(threads)
    cases = parse_cases(
        batch_sizes or ("1" if quick else "1,4"),
        lengths or ("8:32,32:8" if quick else "8:128,128:8,8:8"),
    )
    settings = Settings(
        trio=trio,
        dtype=dtype,
        providers=parse_providers(providers, compile),
        cases=cases,
        repeats=repeats or (3 if quick else 5),
        memory=memory,
    )
    stem = f"throughput-{Path(trio).name}{'-quick' if quick else ''}"
    try:
        run(settings, output or RESULTS / f"{stem}.jsonl", plot)
    except ValueError as error:
        # A user's mistake: an absent trio, a dtype that does not exist. Bugs keep their traceback.
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
