"""Decodes a load of requests, and counts what the decoder's slots did meanwhile."""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from proxytune_kernels import Decoder, SamplingParams

_COUNTS = ("slot_steps", "useful_slot_steps", "base_forwards", "prefill_forwards")


@dataclass(frozen=True)
class Load:
    """Requests to decode, in the order they were sent."""

    prompts: list[list[int]]
    params: list[SamplingParams]

    def part(self, start: int, count: int) -> Load:
        """Some of them."""
        end = start + count
        return Load(self.prompts[start:end], self.params[start:end])

    def longest_first(self) -> Load:
        """Those with the longest outputs first, as a caller who knew them could send them."""
        pairs = zip(self.prompts, self.params, strict=True)
        prompts, params = zip(*sorted(pairs, key=lambda pair: -pair[1].max_tokens), strict=True)
        return Load(list(prompts), list(params))

    @property
    def tokens(self) -> int:
        """Output tokens of all."""
        return sum(params.max_tokens for params in self.params)


@dataclass
class Usage:
    """What decoding a load took.

    ``prefill_seconds`` is the time that ran prompts, when no slot takes a step. ``queued`` holds
    what was counted, and the seconds, up to when the last request had its first token: the queue
    was empty from there on.
    """

    seconds: float
    prefill_seconds: float
    counts: Counter[str]
    queued: Counter[str]
    queued_seconds: float
    token_ids: list[list[int]]

    def useful(self, counts: Counter[str]) -> float:
        """Share of the slot-steps in which a request got a token; NaN where there was no step."""
        steps = counts["slot_steps"]
        return counts["useful_slot_steps"] / steps if steps else math.nan


def decode(decoder: Decoder, load: Load, busy: list[int] | None = None) -> Usage:
    """Decode a load.

    Args:
        decoder: without speculation, so that a step gives each request in it one token.
        load: what to decode.
        busy: of each step, how many slots did useful work is added to it.
    """
    token_ids: list[list[int]] = [[] for _ in load.prompts]
    waiting = len(load.prompts)
    before = Counter(decoder.statistics())
    queued, queued_seconds, prefill = Counter[str](), 0.0, 0.0
    steps: Counter[int] = Counter()
    start = last = time.perf_counter()
    for event in decoder.stream(load.prompts, load.params):
        now = time.perf_counter()
        if token_ids[event.index]:
            if busy is not None:
                steps[decoder.statistics()["base_forwards"]] += 1
        else:
            # First tokens come from prompts, which run while no slot takes a step.
            prefill += now - last
            waiting -= 1
            if not waiting:
                queued, queued_seconds = _counted(decoder, before), now - start
        token_ids[event.index].extend(event.token_ids)
        last = now
    if busy is not None:
        busy.extend(count for _, count in sorted(steps.items()))
    return Usage(
        last - start, prefill, _counted(decoder, before), queued, queued_seconds, token_ids
    )


def _counted(decoder: Decoder, before: Counter[str]) -> Counter[str]:
    now = decoder.statistics()
    return Counter({key: now[key] - before[key] for key in _COUNTS})


def decode_in_batches(
    decoder: Decoder, load: Load, slots: int, busy: list[int] | None = None
) -> Usage:
    """Decode a load as many requests at a time as there are slots, each batch to its end."""
    parts = [
        decode(decoder, load.part(start, slots), busy)
        for start in range(0, len(load.prompts), slots)
    ]
    return Usage(
        sum(part.seconds for part in parts),
        sum(part.prefill_seconds for part in parts),
        sum((part.counts for part in parts), Counter()),
        Counter(),
        0.0,
        [row for part in parts for row in part.token_ids],
    )


def useful_at_best(outputs: Sequence[int], slots: int) -> float:
    """Share of useful slot-steps where each free slot takes the next request at once.

    Arithmetic, no decoding: a request takes a step for each token but the first, which comes of its
    prompt.
    """
    free = [0] * slots
    for output in outputs:
        heapq.heapreplace(free, free[0] + output - 1)
    steps = max(free)
    return sum(output - 1 for output in outputs) / (slots * steps) if steps else math.nan
