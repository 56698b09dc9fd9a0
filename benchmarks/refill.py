"""How well finished requests' slots are refilled: requests of very different lengths, few slots.

``python -m benchmarks.refill --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import options
from benchmarks.decoding_plots import plot_refill
from benchmarks.measure import Summary, paired_ratios
from benchmarks.prompts import make_prompts
from benchmarks.report import (
    RESULTS,
    console,
    machine_line,
    make_progress,
    make_table,
    significant,
    write_json_lines,
)
from benchmarks.slots import Load, Usage, decode, decode_in_batches, useful_at_best
from benchmarks.trios import open_trio
from proxytune_kernels import Decoder, SamplingParams, Trio

TARGET = 0.90
"""Share of the slot-steps that should do useful work."""

_DRAWS = 1000

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    trio: str
    dtype: str | None
    requests: int
    slots: int
    shortest: int
    longest: int
    seed: int
    repeats: int


def make_load(trio: Trio, settings: Settings) -> Load:
    """Requests whose lengths of prompt and of output are log-uniform, each by itself."""
    prompts, params = [], []
    for row, (length, output) in enumerate(draw_lengths(settings, settings.seed)):
        prompts.append(make_prompts(trio, row + 1, length)[row])
        params.append(SamplingParams(seed=row, max_tokens=output, ignore_eos=True))
    return Load(prompts, params)


def draw_lengths(settings: Settings, seed: int) -> list[tuple[int, int]]:
    """Tokens of prompt and output of each request, log-uniform, each by itself."""
    rng = random.Random(seed)
    # From half below the least to half above the most, so that both ends are as likely as others.
    ends = math.log(settings.shortest - 0.5), math.log(settings.longest + 0.5)
    return [
        (round(math.exp(rng.uniform(*ends))), round(math.exp(rng.uniform(*ends))))
        for _ in range(settings.requests)
    ]


WAYS = ("refilled", "longest first", "batches")
"""As the requests were sent; those with the longest outputs first; and without refilling."""


def records_of(
    load: Load, usages: Mapping[str, Sequence[Usage]], busy: Mapping[str, Sequence[int]]
) -> list[Record]:
    """A line of results for each of :data:`WAYS`; ratios are paired by repeat."""
    return [
        _record(name, load, usages[name], usages["batches"]) | {"busy": list(busy[name])}
        for name in WAYS
    ]


def _record(name: str, load: Load, own: Sequence[Usage], batches: Sequence[Usage]) -> Record:
    first = own[0]
    record: Record = {
        "provider": name,
        "repeats": len(own),
        "tokens": load.tokens,
        **first.counts,
        "useful": first.useful(first.counts),
        "tokens_per_second": asdict(Summary.of(load.tokens / u.seconds for u in own)),
        "prefill_share": asdict(Summary.of(u.prefill_seconds / u.seconds for u in own)),
    }
    if name == "batches":
        return record
    steps, queued = first.counts["slot_steps"], first.queued["slot_steps"]
    idle = steps - first.counts["useful_slot_steps"]
    idle_while_queued = queued - first.queued["useful_slot_steps"]
    tail = Summary.of(1 - u.queued_seconds / u.seconds for u in own)
    over = paired_ratios([b.seconds for b in batches], [u.seconds for u in own])
    return record | {
        "useful_while_queued": first.useful(first.queued),
        "slot_steps_while_queued": queued,
        "idle_in_tail": (idle - idle_while_queued) / steps if steps else math.nan,
        "tail_seconds_share": asdict(tail),
        "speed_over_batches": asdict(over),
    }


def print_table(records: Sequence[Record], settings: Settings, title: str) -> None:
    """The table, and whether the target is met."""
    columns = ("slots", "steps", "useful", "while\nqueued", "tokens\n/s", "prefill", "x\nbatches")
    caption = (
        "useful: share of the slot-steps (slots x steps) that gave a request a token; while "
        "queued: of those while requests were waiting. longest first: sent in that order. "
        f"batches: {settings.slots} at a time, each batch to its end. prefill: share of the time "
        f"that ran prompts, when no slot takes a step. Medians. {machine_line()}"
    )
    table = make_table(title, columns, caption)
    for record in records:
        over = record.get("speed_over_batches")
        table.add_row(
            record["provider"],
            f"{record['base_forwards']:,}",
            f"{record['useful']:.1%}",
            f"{record['useful_while_queued']:.1%}" if over else "-",
            significant(record["tokens_per_second"]["median"]),
            f"{record['prefill_share']['median']:.1%}",
            significant(over and over["median"]),
        )
    console.print(table)
    own = records[0]
    verdict = "met" if own["useful"] >= TARGET else "missed"
    draws = own["useful_at_best"]
    console.print(
        f"Useful: {own['useful']:.1%} of all slot-steps, target {TARGET:.0%}: {verdict}. The tail, "
        "from when no request was left to refill a slot with, leaves "
        f"{own['idle_in_tail']:.1%} of all slot-steps idle, and is "
        f"{own['tail_seconds_share']['median']:.1%} of the time. At best, sent in this order: "
        f"{own['useful_at_best_here']:.1%}; other draws of the lengths {draws['p10']:.1%} to "
        f"{draws['p90']:.1%}, median {draws['median']:.1%} ({draws['count']} draws, arithmetic).",
        soft_wrap=True,
    )


def run(settings: Settings, output: Path, plot: bool) -> None:
    """Load, measure, write and show."""
    trio = open_trio(settings.trio, settings.dtype)
    load = make_load(trio, settings)
    decoder = Decoder(trio, settings.slots, 2 * settings.longest)
    runs: dict[str, Callable[[list[int] | None], Usage]] = {
        "refilled": lambda busy: decode(decoder, load, busy),
        "longest first": lambda busy: decode(decoder, load.longest_first(), busy),
        "batches": lambda busy: decode_in_batches(decoder, load, settings.slots, busy),
    }
    busy: dict[str, list[int]] = {way: [] for way in WAYS}
    usages: dict[str, list[Usage]] = {way: [] for way in WAYS}
    warm = {}
    with make_progress() as progress:
        task = progress.add_task("decoding", total=len(WAYS) * (settings.repeats + 1))
        for repeat in range(settings.repeats + 1):
            for way in WAYS:
                progress.update(task, description=way)
                if repeat:
                    usages[way].append(runs[way](None))
                else:
                    warm[way] = runs[way](busy[way])
                progress.advance(task)
    pairs = zip(warm["refilled"].token_ids, warm["batches"].token_ids, strict=True)
    differing = sum(one != two for one, two in pairs)
    name = settings.trio if settings.trio in ("shipped", "qwen") else Path(settings.trio).name
    info = trio.info()["roles"]
    dtypes = {role: info[role]["dtype"] for role in info}
    shared = {**asdict(settings), "trio": name, "dtype": dtypes, "differing": differing}
    records = [{**shared, **record} for record in records_of(load, usages, busy)]
    records[0] |= _at_best(settings)
    write_json_lines(output, "refill", records)
    title = (
        f"{settings.requests} requests, prompts and outputs of {settings.shortest} to "
        f"{settings.longest} tokens, {settings.slots} slots, trio {name}"
    )
    print_table(records, settings, title)
    console.print(
        f"{settings.requests - differing} of {settings.requests} requests have the same tokens "
        "both ways."
    )
    console.print(f"Wrote {output}", soft_wrap=True)
    if plot:
        picture = output.with_suffix(".png")
        plot_refill(records, picture, title)
        console.print(f"Wrote {picture}", soft_wrap=True)


def _at_best(settings: Settings) -> Record:
    """What no decoder could exceed that takes requests in the order they were sent."""

    def share(seed: int) -> float:
        outputs = [output for _, output in draw_lengths(settings, seed)]
        return useful_at_best(outputs, settings.slots)

    return {
        "useful_at_best_here": share(settings.seed),
        "useful_at_best": asdict(Summary.of(share(seed) for seed in range(_DRAWS))),
    }


def main(
    trio: Annotated[
        str, typer.Option(help="shipped, qwen, or a directory with a trio.json.")
    ] = "shipped",
    requests: Annotated[int, typer.Option(min=1)] = 64,
    slots: Annotated[int, typer.Option(min=1)] = 8,
    shortest: Annotated[int, typer.Option(min=1, help="Of prompts, and of outputs.")] = 4,
    longest: Annotated[int, typer.Option(min=1, help="Of prompts, and of outputs.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the lengths.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs.")] = 5,
    threads: options.Threads = None,
    dtype: options.Dtype = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON lines.", show_default="benchmarks/results/refill-<trio>.jsonl"),
    ] = None,
    plot: Annotated[bool, typer.Option(help="Also a PNG beside the output.")] = True,
) -> None:
    """Count the slot-steps that do useful work, and compare with batches that are not refilled."""
    if threads is not None:
        torch.set_num_threads(threads)
    if longest < shortest:
        raise typer.BadParameter(f"--longest must be at least --shortest {shortest}, got {longest}")
    settings = Settings(trio, dtype, requests, slots, shortest, longest, seed, repeats)
    try:
        run(settings, output or RESULTS / f"refill-{Path(trio).name}.jsonl", plot)
    except ValueError as error:
        # A user's mistake: an absent trio, a dtype that does not exist. Bugs keep their traceback.
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
