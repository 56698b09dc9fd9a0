"""Decoding a trio end to end: tokens/s, latency and memory of ours beside a transformers loop.

``python -m benchmarks.throughput --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from benchmarks import options
from benchmarks.agreement import Mismatch, greedy_mismatches
from benchmarks.decode_timing import Case, Work, time_case
from benchmarks.decoding_plots import plot_throughput
from benchmarks.memory import in_fresh_process
from benchmarks.options import (
    check_lengths,
    default_lengths,
    describe,
    parse_cases,
    parse_providers,
    result_stem,
)
from benchmarks.prompts import KINDS, make_prompts, task_batches
from benchmarks.providers import (
    ALPHA,
    GREEDY,
    PROVIDERS,
    TEMPERATURE,
    TOP_P,
    DecoderProvider,
    Provider,
    Sampling,
)
from benchmarks.report import RESULTS, console, make_progress, write_json_lines
from benchmarks.throughput_table import print_tables, print_verdicts
from benchmarks.trios import AdapterMissing, TrioForms
from proxytune_kernels import Trio
from proxytune_kernels.decoder.packing import PackingError
from proxytune_kernels.decoder.pair.shared import PairError

DEFAULT_PROVIDERS = "naive,base-only,ours,ours-shared-pair,ours-speculative"
_GREEDY_ROWS, _GREEDY_PROMPT, _GREEDY_TOKENS = 4, 12, 16  # the agreement check


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    trio: str
    dtype: str | None
    providers: tuple[str, ...]
    prompts: str
    cases: tuple[Case, ...]
    sampling: Sampling
    repeats: int
    memory: bool


def make_work(trio: Trio, settings: Settings) -> list[Work]:
    """Each case with its prompts, refused where they are longer than the trio's shortest context.

    Raises:
        typer.BadParameter: names the case and the context.
    """
    context = min(
        model.config.get_text_config(decoder=True).max_position_embeddings
        for model in trio.models.values()
    )
    made = []
    for case in settings.cases:
        if case.prompt_length is not None:
            batches = [make_prompts(trio, case.batch_size, case.prompt_length)]
        else:
            sizes = case.batch_size, case.output_length, settings.repeats
            batches = task_batches(trio, settings.trio, settings.prompts, *sizes)
        work = Work(case, batches)
        if work.longest > context:
            raise typer.BadParameter(
                f"--lengths must fit in the trio's context of {context} tokens, "
                f"got {work.longest - case.output_length}:{case.output_length}"
            )
        made.append(work)
    return made


def room(works: Sequence[Work]) -> tuple[int, int]:
    """Rows and tokens that the largest case takes, and the agreement check."""
    rows = max(work.case.batch_size for work in works)
    return rows, max(_GREEDY_PROMPT + _GREEDY_TOKENS, *(work.longest for work in works))


def make_providers(forms: TrioForms, settings: Settings, works: Sequence[Work]) -> list[Provider]:
    """The providers asked for, each with room for the largest case.

    One that this trio or processor has no use for is left out, and said so: without an adapter
    there is no shared pair, two architectures are no batched one, and only bf16 is packed.
    """
    rows, length = room(works)
    made: list[Provider] = []
    for name in settings.providers:
        try:
            made.append(PROVIDERS[name](forms, rows, length, settings.sampling))
        except (AdapterMissing, PackingError, PairError) as reason:
            console.print(f"{name} is left out: {reason}.", style="yellow", soft_wrap=True)
    return made


def unlearned(
    providers: Sequence[Provider], forms: TrioForms, settings: Settings, works: Sequence[Work]
) -> list[Provider]:
    """The same providers, those that speculate made anew.

    They choose how much to draft by what they saw. What they saw of another text, in the check of
    greedy tokens, would last far into a short timed run.
    """
    rows, length = room(works)
    return [
        PROVIDERS[p.name](forms, rows, length, settings.sampling)
        if isinstance(p, DecoderProvider) and p.decoder.speculation is not None
        else p
        for p in providers
    ]


def check_greedy(providers: Sequence[Provider]) -> list[Mismatch]:
    """Compare greedy tokens before anything is timed; returns the ties within rounding.

    Each provider is held to a naive loop over the models that it decodes.

    Raises:
        typer.Exit: code 1, a provider decodes other tokens; each mismatch is printed.
    """
    mismatches = []
    with make_progress() as progress:
        task = progress.add_task("greedy tokens", total=len(providers))

        def tick(name: str) -> None:
            progress.update(task, advance=1, description=f"greedy tokens: {name}")

        for trio in {id(p.trio): p.trio for p in providers}.values():
            own = [provider for provider in providers if provider.trio is trio]
            prompts = make_prompts(trio, _GREEDY_ROWS, _GREEDY_PROMPT)
            mismatches += greedy_mismatches(own, trio, prompts, _GREEDY_TOKENS, tick)
    for mismatch in mismatches:
        style = "yellow" if mismatch.within_rounding else "red"
        console.print(str(mismatch), style=style, soft_wrap=True)
    if not all(mismatch.within_rounding for mismatch in mismatches):
        console.print("Greedy tokens disagree: nothing is timed.", style="red")
        raise typer.Exit(1)
    console.print(
        f"Greedy tokens agree: {_GREEDY_ROWS} prompts x {_GREEDY_TOKENS} tokens, "
        f"{', '.join(p.name for p in providers)}"
        + (f"; {len(mismatches)} ties within rounding." if mismatches else "."),
        soft_wrap=True,
    )
    return mismatches


def _tick(progress: Progress, task: Any, case: Case) -> Any:
    def tick(name: str) -> None:
        progress.update(task, advance=1, description=f"{case}: {name}")

    return tick


def measure(
    trio: Trio, settings: Settings, providers: Sequence[Provider], works: Sequence[Work]
) -> list[dict[str, Any]]:
    """Time all cases, then measure memory; one record per case and provider."""
    runs = len(works) * (len(providers) + 1) * (settings.repeats + 1)
    records = []
    with make_progress() as progress:
        task = progress.add_task("timing", total=runs + len(providers) * settings.memory)
        for work in works:
            tick = _tick(progress, task, work.case)
            times = time_case(trio, providers, work, settings.repeats, tick)
            records += [times.record(provider.name) for provider in providers]
        for provider in providers if settings.memory else ():
            progress.update(task, description=f"memory: {provider.name}")
            _add_memory(records, settings, works, provider.name)
            progress.advance(task)
    return records


def _add_memory(
    records: list[dict[str, Any]], settings: Settings, works: Sequence[Work], provider: str
) -> None:
    shapes = [
        (w.case.batch_size, w.longest - w.case.output_length, w.case.output_length) for w in works
    ]
    peaks = in_fresh_process(
        "benchmarks.provider_memory:provider_peaks",
        trio=settings.trio,
        dtype=settings.dtype,
        provider=provider,
        cases=shapes,
        threads=torch.get_num_threads(),
    )
    own = (record for record in records if record["provider"] == provider)
    for record, peak in zip(own, peaks, strict=True):
        record["peak_memory"] = peak


def run(settings: Settings, output: Path, plot: bool) -> None:
    """Load, check, measure, write and show."""
    forms = TrioForms.open(settings.trio, settings.dtype)
    trio = forms.trio
    works = make_work(trio, settings)
    providers = make_providers(forms, settings, works)
    ties = check_greedy(providers)
    providers = unlearned(providers, forms, settings, works)
    records = measure(trio, settings, providers, works)
    dtypes = {role: info["dtype"] for role, info in trio.info()["roles"].items()}
    sizes = {role: info["parameters"] for role, info in trio.info()["roles"].items()}
    name = settings.trio if settings.trio in ("shipped", "qwen") else Path(settings.trio).name
    parameters = {"alpha": ALPHA, **asdict(settings.sampling)}
    shared = {
        "trio": name,
        "dtype": dtypes,
        "model_parameters": sizes,
        "sampling": parameters,
        "prompts": settings.prompts,
    }
    for record in records:
        record["greedy_ties"] = [str(t) for t in ties if t.provider == record["provider"]]
    write_json_lines(output, "throughput", [{**shared, **record} for record in records])
    title = (
        f"Proxy-tuned decoding, trio {name}, {'/'.join(dict.fromkeys(dtypes.values()))}, "
        f"{settings.prompts}, {describe(settings.sampling)}"
    )
    print_tables(records, title)
    print_verdicts(records, name, settings.prompts)
    for provider in providers:
        if provider.set_up_seconds > 1:
            console.print(
                f"{provider.name}: {provider.set_up_seconds:.0f} s to set up before its first "
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
    prompts: Annotated[
        str, typer.Option(help=f"One of {', '.join(KINDS)}: the text that prompts are of.")
    ] = "text",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = TEMPERATURE,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = TOP_P,
    greedy: Annotated[bool, typer.Option(help="Temperature 0, no top_p.")] = False,
    batch_sizes: Annotated[
        str | None, typer.Option(help="Comma-separated.", show_default="1,4")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated prompt:output pairs; the paper's speed test is 8:512,512:8,8:8. "
            "With arithmetic and code own:output, prompts as long as they are.",
            show_default="8:128,128:8,8:8; own:32; own:15 with the shipped trio",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="Batch 1, lengths 8:32,32:8, three repeats, where not given.")
    ] = False,
    compile: Annotated[bool, typer.Option(help="Also ours with torch.compile.")] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed runs.", show_default="5")
    ] = None,
    threads: options.Threads = None,
    dtype: options.Dtype = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines.", show_default="benchmarks/results/throughput-<trio>....jsonl"
        ),
    ] = None,
    plot: Annotated[bool, typer.Option(help="Also a PNG beside the output.")] = True,
    memory: Annotated[bool, typer.Option(help="Also peak memory, one process a provider.")] = True,
) -> None:
    """Time decoding a trio: a transformers loop, the base alone, and ours, side by side."""
    if threads is not None:
        torch.set_num_threads(threads)
    if prompts not in KINDS:
        raise typer.BadParameter(f"--prompts must be one of {', '.join(KINDS)}, got {prompts!r}")
    cases = parse_cases(
        batch_sizes or ("1" if quick else "1,4"), lengths or default_lengths(trio, prompts, quick)
    )
    check_lengths(prompts, cases)
    settings = Settings(
        trio=trio,
        dtype=dtype,
        providers=parse_providers(providers, compile),
        prompts=prompts,
        cases=cases,
        sampling=GREEDY if greedy else Sampling(temperature, top_p),
        repeats=repeats or (3 if quick else 5),
        memory=memory,
    )
    try:
        stem = result_stem(trio, prompts, settings.sampling, quick)
        run(settings, output or RESULTS / f"{stem}.jsonl", plot)
    except ValueError as error:
        # A user's mistake: an absent trio, a dtype that does not exist. Bugs keep their traceback.
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
