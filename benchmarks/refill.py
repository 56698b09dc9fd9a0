"""How well finished requests' slots are refilled: requests of very different lengths, few slots.

``python -m benchmarks.refill --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from benchmarks.harness import options, report, trios
from benchmarks.harness.measure import in_turns, ratios, summary
from proxytune_kernels import Decoder, SamplingParams, Trio

_DRAWS = 1000
_COUNTS = ("slot_steps", "useful_slot_steps", "base_forwards", "prefill_forwards")

Record = dict[str, Any]
Load = Sequence[tuple[list[int], SamplingParams]]
"""Prompts and parameters, in the order they are sent."""


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    trio: str
    requests: int
    slots: int
    shortest: int
    longest: int
    seed: int
    repeats: int


def draw_lengths(settings: Settings, seed: int) -> list[tuple[int, int]]:
    """Tokens of prompt and output of each request, log-uniform, each by itself."""
    rng = random.Random(seed)
    # From half below the least to half above the most, so that both ends are as likely as others.
    ends = math.log(settings.shortest - 0.5), math.log(settings.longest + 0.5)

    def length() -> int:
        return round(math.exp(rng.uniform(*ends)))

    return [(length(), length()) for _ in range(settings.requests)]


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
    """What decoding a load took.

    ``prefill_seconds`` is the time that ran prompts, when no slot takes a step. ``queued`` holds
    what was counted, and the seconds, up to when the last request had its first token. ``busy`` is
    how many slots did useful work, of each step.
    """

    seconds: float
    prefill_seconds: float
    counts: Counter[str]
    queued: Counter[str]
    queued_seconds: float
    busy: list[int]
    token_ids: list[list[int]]


def useful(counts: Mapping[str, int]) -> float:
    """Share of the slot-steps in which a request got a token; NaN where there was no step."""
    steps = counts["slot_steps"]
    return counts["useful_slot_steps"] / steps if steps else math.nan


def decode(decoder: Decoder, load: Load) -> Usage:
    """Decode a load by a decoder without speculation: a step gives each request one token."""
    token_ids: list[list[int]] = [[] for _ in load]
    waiting = len(load)
    before = Counter(decoder.statistics())

    def counted() -> Counter[str]:
        now = decoder.statistics()
        return Counter({key: now[key] - before[key] for key in _COUNTS})

    queued, queued_seconds, prefill = Counter[str](), 0.0, 0.0
    steps: Counter[int] = Counter()
    start = last = time.perf_counter()
    for event in decoder.stream([prompt for prompt, _ in load], [params for _, params in load]):
        now = time.perf_counter()
        if token_ids[event.index]:
            steps[decoder.statistics()["base_forwards"]] += 1
        else:
            # First tokens come from prompts, which run while no slot takes a step.
            prefill += now - last
            waiting -= 1
            if not waiting:
                queued, queued_seconds = counted(), now - start
        token_ids[event.index].extend(event.token_ids)
        last = now
    busy = [count for _, count in sorted(steps.items())]
    return Usage(last - start, prefill, counted(), queued, queued_seconds, busy, token_ids)


def longest_first(load: Load) -> Load:
    """Those with the longest outputs first, as a caller who knew them could send them."""
    return sorted(load, key=lambda request: -request[1].max_tokens)


def decode_in_batches(decoder: Decoder, load: Load, slots: int) -> Usage:
    """Decode a load as many requests at a time as there are slots, each batch to its end."""
    starts = range(0, len(load), slots)
    parts = [decode(decoder, load[start : start + slots]) for start in starts]
    return Usage(
        sum(part.seconds for part in parts),
        sum(part.prefill_seconds for part in parts),
        sum((part.counts for part in parts), Counter()),
        Counter(),
        0.0,
        [count for part in parts for count in part.busy],
        [row for part in parts for row in part.token_ids],
    )


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


def record_of(name: str, own: Sequence[Usage], batches: Sequence[Usage]) -> Record:
    """A line of results; ratios are paired by repeat, counts are the first repeat's."""
    first = own[0]
    tokens = sum(len(row) for row in first.token_ids)
    record: Record = {
        "provider": name,
        "repeats": len(own),
        "tokens": tokens,
        **first.counts,
        "useful": useful(first.counts),
        "tokens_per_second": summary(tokens / u.seconds for u in own),
        "prefill_share": summary(u.prefill_seconds / u.seconds for u in own),
        "busy": first.busy,
    }
    if name == "batches":
        return record
    steps, queued = first.counts["slot_steps"], first.queued["slot_steps"]
    idle = steps - first.counts["useful_slot_steps"]
    idle_while_queued = queued - first.queued["useful_slot_steps"]
    return record | {
        "useful_while_queued": useful(first.queued),
        "slot_steps_while_queued": queued,
        "idle_in_tail": (idle - idle_while_queued) / steps if steps else math.nan,
        "tail_seconds_share": summary(1 - u.queued_seconds / u.seconds for u in own),
        "speed_over_batches": ratios([u.seconds for u in batches], [u.seconds for u in own]),
    }


def print_records(records: Sequence[Record], settings: Settings) -> None:
    """The table, and what the share of useful slot-steps is made of."""
    title = (
        f"{settings.requests} requests, prompts and outputs of {settings.shortest} to "
        f"{settings.longest} tokens, {settings.slots} slots, trio {settings.trio}"
    )
    caption = (
        "useful: share of the slot-steps (slots x steps) that gave a request a token; while "
        "queued: of those while requests were waiting. longest first: sent in that order. "
        f"batches: {settings.slots} at a time, each batch to its end. prefill: share of the time "
        "that ran prompts, when no slot takes a step. Medians."
    )
    columns: list[report.Column] = [
        ("slots", "provider", str),
        ("steps", "base_forwards", str),
        ("useful", "useful", report.percent),
        ("while\nqueued", "useful_while_queued", report.percent),
        ("tokens\n/s", "tokens_per_second/median", report.significant),
        ("prefill", "prefill_share/median", report.percent),
        ("x\nbatches", "speed_over_batches/median", report.significant),
    ]
    report.print_records(title, caption, records, columns)
    own, draws = records[0], records[0]["useful_at_best"]
    report.say(
        f"Useful: {own['useful']:.1%} of all slot-steps. The tail, from when no request was left "
        f"to refill a slot with, leaves {own['idle_in_tail']:.1%} of all slot-steps idle, and is "
        f"{own['tail_seconds_share']['median']:.1%} of the time. At best, sent in this order: "
        f"{own['useful_at_best_here']:.1%}; other draws of the lengths {draws['p10']:.1%} to "
        f"{draws['p90']:.1%}, median {draws['median']:.1%} ({draws['count']} draws, arithmetic)."
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
    name = options.trio_label(trio)
    settings = Settings(name, requests, slots, shortest, longest, seed, repeats)
    with options.user_errors():
        opened = trios.open_trio(trio, dtype)
    load = make_load(opened, draw_lengths(settings, seed))
    decoder = Decoder(opened, slots, 2 * longest)
    ways: dict[str, Callable[[int], Usage]] = {
        "refilled": lambda _: decode(decoder, load),
        "longest first": lambda _: decode(decoder, longest_first(load)),
        "batches": lambda _: decode_in_batches(decoder, load, slots),
    }
    with report.progress_bar(len(ways) * (repeats + 1)) as tick:
        usages = in_turns(ways, repeats, tick, warm_up=True)
    pairs = zip(usages["refilled"][0].token_ids, usages["batches"][0].token_ids, strict=True)
    differing = sum(one != two for one, two in pairs)
    shared = {**asdict(settings), "dtype": trios.dtypes(opened), "differing": differing}
    records = [{**shared, **record_of(way, own, usages["batches"])} for way, own in usages.items()]

    def at_best(seed: int) -> float:
        return useful_at_best((output for _, output in draw_lengths(settings, seed)), slots)

    # What no decoder could exceed that takes requests in the order they were sent.
    records[0]["useful_at_best_here"] = at_best(seed)
    records[0]["useful_at_best"] = summary(at_best(seed) for seed in range(_DRAWS))
    output = output or report.RESULTS / f"refill-{name}.jsonl"
    report.write_json_lines(output, "refill", records)
    print_records(records, settings)
    report.say(f"{requests - differing} of {requests} requests have the same tokens both ways.")
    report.say(f"Wrote {output}")


if __name__ == "__main__":
    typer.run(main)
