"""What a device did and when: kernels of a profile, the time without any, and where the host waits.

Read from the file that :mod:`torch.profiler` exports, in Chrome's trace format: complete events
("ph": "X") with a category, a start and a duration in microseconds; work on the device has its
stream among its arguments.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.harness.decoding import DecoderProvider
from benchmarks.harness.logits import ALPHA, TEMPERATURE, TOP_P
from benchmarks.harness.trios import make_prompts
from proxytune_kernels import SamplingParams

STEPS = 20
"""Profiled, of one request."""
_BEFORE = 8  # steps until the decoder runs evenly

_WAITS = frozenset(
    {
        *("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
        *("cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize"),
    }
)
"""Calls that return when the device has come so far."""


def merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals as disjoint ones, in order; those that touch become one."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


def trace_record(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of results of the events of a profile of :data:`STEPS` steps.

    Idle is the time without a kernel on any stream, from the first kernel's start to the last one's
    end. The tracer itself widens the gaps: the share is a bound.
    """
    complete = [e for e in events if e.get("ph") == "X"]
    kernels = [e for e in complete if e.get("cat") == "kernel"]
    calls = (e["name"] for e in complete if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    waits = Counter(name for name in calls if name in _WAITS)
    if not kernels:
        raise ValueError("the profile has no kernel in it")
    busy = merged((float(k["ts"]), float(k["ts"]) + float(k["dur"])) for k in kernels)
    gaps = [following[0] - before[1] for before, following in pairwise(busy)]
    whole = busy[-1][1] - busy[0][0]
    return {
        "op": "trace",
        "steps": STEPS,
        "profiled_step_ms": whole / 1e3 / STEPS,
        "idle_share": sum(gaps) / whole,
        "longest_gap_us": max(gaps, default=0.0),
        "gaps": len(gaps),
        "kernels_per_step": len(kernels) / STEPS,
        "streams": sorted({int(k["args"]["stream"]) for k in kernels}),
        "waits_per_step": {name: count / STEPS for name, count in waits.items()},
    }


def profiled(run: Callable[[], object], activity: ProfilerActivity) -> list[dict[str, Any]]:
    """The events of what ``run`` does; ``ProfilerActivity.CUDA`` records kernels and the driver."""
    # The first profile of a process sets the tracer up, which takes longer than a step.
    with torch.profiler.profile(activities=[activity]):
        pass
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


@contextmanager
def decoding(provider: DecoderProvider, prompt_length: int) -> Iterator[Callable[[], None]]:
    """A request that has decoded a few steps; what is given decodes :data:`STEPS` more.

    The request is over when the context is left: the slot is free for the next.
    """
    params = SamplingParams(
        alpha=ALPHA,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        seed=0,
        max_tokens=_BEFORE + STEPS + 4,  # it does not end, nor run out of steps to run ahead to
        ignore_eos=True,
    )
    events = provider.decoder.stream(make_prompts(provider.trio, 1, prompt_length), params)

    def steps() -> None:
        done = sum(1 for _ in islice(events, STEPS))
        if done < STEPS:
            raise ValueError(f"the request must have {STEPS} steps left, and ended after {done}")

    for _ in islice(events, _BEFORE):
        pass
    yield steps
    for _ in events:
        pass


def profile(provider: DecoderProvider, prompt_length: int) -> dict[str, Any]:
    """Profile :data:`STEPS` steps at batch 1."""
    with decoding(provider, prompt_length) as steps:
        # The decoder runs a step ahead: that one's end would be in the trace.
        torch.cuda.synchronize()
        return trace_record(profiled(steps, ProfilerActivity.CUDA))
