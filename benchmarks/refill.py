"""How well finished requests' slots are refilled: requests of very different lengths, few slots.

``python -m benchmarks.refill --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from benchmarks.harness import options, report, trios
from benchmarks.harness.decoding import decode
from benchmarks.harness.measure import in_turns, ratios, summary
from proxytune_kernels import Decoder, SamplingParams, Trio

_COUNTS = ("slot_steps", "useful_slot_steps", "base_forwards", "prefill_forwards")

Load = Sequence[tuple[list[int], SamplingParams]]
"""Prompts and parameters, in the order they are sent."""


def draw_lengths(requests: int, shortest: int, longest: int, seed: int) -> list[tuple[int, int]]:
    """Tokens of prompt and output of each request, log-uniform, each by itself."""
    rng = random.Random(seed)
    # From half below the least to half above the most, so that both ends are as likely as others.
    ends = math.log(shortest - 0.5), math.log(longest + 0.5)

    def length() -> int:
        return round(math.exp(rng.uniform(*ends)))

    return [(length(), length()) for _ in range(requests)]


def make_load(trio: Trio, lengths: Sequence[tuple[int, int]]) -> Load:
    """Requests of these lengths of prompt and output; row i has seed i."""
    return [
        (
            trios.make_prompts(trio, row + 1, length)[row],
            SamplingParams(seed=row, max_tokens=output, ignore_eos=True),
        )
        for row, (length, output) in enumerate(lengths)
    ]


@dataclass
class Usage:
    """What decoding a load took."""

    seconds: float
    counts: Counter[str]
    token_ids: list[list[int]]

    @property
    def useful(self) -> float:
        """Share of the slot-steps in which a request got a token; NaN where there was no step."""
        steps = self.counts["slot_steps"]
        return self.counts["useful_slot_steps"] / steps if steps else math.nan


def run(decoder: Decoder, load: Load, at_once: int) -> Usage:
    """Decode a load, so many requests at a time, each part to its end."""
    found, start = Usage(0.0, Counter(), []), time.perf_counter()
    for first in range(0, len(load), at_once):
        part = decode(decoder, *zip(*load[first : first + at_once], strict=True))
        found.token_ids += part.token_ids
        found.counts.update(part.counts)
    found.seconds = time.perf_counter() - start
    return found


def useful_at_best(outputs: Iterable[int], slots: int) -> float:
    """Share of useful slot-steps where each free slot takes the next request at once.

    Arithmetic, no decoding: a request takes a step for each token but the first, which comes of its
    prompt.
    """
    steps = [output - 1 for output in outputs]
    free = [0] * slots
    for needed in steps:
        heapq.heapreplace(free, free[0] + needed)
    return sum(steps) / (slots * max(free)) if max(free) else math.nan


def record_of(name: str, own: Sequence[Usage], batches: Sequence[Usage]) -> dict[str, Any]:
    """A line of results; ratios are paired by repeat, counts are the first repeat's."""
    tokens = sum(len(row) for row in own[0].token_ids)
    return {
        "provider": name,
        "repeats": len(own),
        "tokens": tokens,
        **{count: own[0].counts[count] for count in _COUNTS},
        "useful": own[0].useful,
        "tokens_per_second": summary(tokens / u.seconds for u in own),
        "speed_over_batches": ratios([u.seconds for u in batches], [u.seconds for u in own]),
    }


COLUMNS: tuple[report.Column, ...] = (
    ("slots", "provider", str),
    ("steps", "base_forwards", str),
    ("useful", "useful", report.percent),
    ("tokens\n/s", "tokens_per_second/median", report.significant),
    ("x\nbatches", "speed_over_batches/median", report.significant),
)


def main(
    trio: options.TrioName = "shipped",
    requests: Annotated[int, typer.Option(min=1)] = 64,
    slots: Annotated[int, typer.Option(min=1)] = 8,
    shortest: Annotated[int, typer.Option(min=1, help="Of prompts, and of outputs.")] = 4,
    longest: Annotated[int, typer.Option(min=1, help="Of prompts, and of outputs.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the lengths.")] = 0,
    repeats: options.Repeats = 5,
    threads: options.Threads = None,
    dtype: options.Dtype = None,
    output: options.Output = None,
) -> None:
    """Count the slot-steps that do useful work, and compare with batches that are not refilled."""
    options.set_threads(threads)
    if longest < shortest:
        raise typer.BadParameter(f"--longest must be at least --shortest {shortest}, got {longest}")
    with options.user_errors():
        opened = trios.open_trio(trio, dtype)
    load = make_load(opened, draw_lengths(requests, shortest, longest, seed))
    decoder = Decoder(opened, slots, 2 * longest)
    ways = {"refilled": requests, "batches": slots}
    calls = {way: lambda _, n=n: run(decoder, load, n) for way, n in ways.items()}
    with report.progress_bar(len(ways) * (repeats + 1)) as tick:
        usages = in_turns(calls, repeats, tick, warm_up=True)
    pairs = zip(*(own[0].token_ids for own in usages.values()), strict=True)
    differing = sum(one != two for one, two in pairs)

    name = options.trio_label(trio)
    best = useful_at_best((parameters.max_tokens for _, parameters in load), slots)
    shared = {
        "trio": name, "requests": requests, "slots": slots, "shortest": shortest,
        "longest": longest, "seed": seed, "dtype": trios.dtypes(opened), "differing": differing,
        "useful_at_best": best,
    }  # fmt: skip
    records = [record_of(way, own, usages["batches"]) for way, own in usages.items()]
    report.write_results(output, "refill", shared, records, name)
    title = (
        f"{requests} requests, prompts and outputs of {shortest} to {longest} tokens, {slots} "
        f"slots, trio {name}"
    )
    caption = (
        "useful: share of the slot-steps (slots x steps) that gave a request a token. batches: "
        f"{slots} at a time, each batch to its end. Medians."
    )
    report.print_records(title, caption, records, COLUMNS)
    report.say(
        f"At best, sent in this order: {best:.1%} useful (arithmetic). {requests - differing} of "
        f"{requests} requests have the same tokens both ways."
    )


if __name__ == "__main__":
    typer.run(main)
