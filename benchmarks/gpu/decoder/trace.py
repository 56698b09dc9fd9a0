"""What a device did and when: kernels of a profile, the time without any, and where the host waits.

Read from the file that :mod:`torch.profiler` exports, in Chrome's trace format: complete events
("ph": "X") with a category, a start and a duration in microseconds; work on the device has its
stream among its arguments.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

KERNEL = "kernel"
_DEVICE_WORK = {KERNEL: KERNEL, "gpu_memcpy": "copy", "gpu_memset": "fill"}
_HOST_CALLS = ("cuda_runtime", "cuda_driver")
_WAITS = frozenset(
    {
        *("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
        *("cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize"),
    }
)
"""Calls that return when the device has come so far."""


@dataclass(frozen=True)
class Work:
    """One thing that the device did."""

    name: str
    kind: str
    """``kernel``, ``copy`` or ``fill``."""
    start: float
    """Microseconds, by the trace's clock."""
    end: float
    stream: int


@dataclass(frozen=True)
class Trace:
    """What was profiled."""

    work: tuple[Work, ...]
    """In the order it started."""
    waits: Counter[str]
    """How often the host called each function that waits for the device."""

    @property
    def kernels(self) -> list[Work]:
        """The kernels alone, in the order they started."""
        return [w for w in self.work if w.kind == KERNEL]


class NoKernels(ValueError):
    """A trace without a kernel says nothing of the device."""


def record(run: Callable[[], object], path: Path, activity: ProfilerActivity) -> Trace:
    """Profile what ``run`` does, and keep the trace at ``path``.

    Args:
        run: ends when the device has done its work, or leaves that to the profiler, which waits.
        path: of the JSON file; its directory exists.
        activity: ``ProfilerActivity.CUDA`` records kernels and the calls to the driver.
    """
    # The first profile of a process sets the tracer up, which takes longer than a step.
    with torch.profiler.profile(activities=[activity]):
        pass
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
    profiler.export_chrome_trace(str(path))
    return read(path)


def read(path: Path) -> Trace:
    """Work and waits of an exported profile."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    work = [
        Work(
            name=event["name"],
            kind=_DEVICE_WORK[event["cat"]],
            start=float(event["ts"]),
            end=float(event["ts"]) + float(event["dur"]),
            stream=int(event["args"]["stream"]),
        )
        for event in events
        if event.get("cat") in _DEVICE_WORK
    ]
    names = (event["name"] for event in events if event.get("cat") in _HOST_CALLS)
    waits = Counter(name for name in names if name in _WAITS)
    return Trace(tuple(sorted(work, key=lambda w: (w.start, w.end))), waits)


def merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals as disjoint ones, in order; those that touch become one."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


@dataclass(frozen=True)
class Idle:
    """The time in which no kernel ran on any stream."""

    microseconds: float
    """From the first kernel's start to the last one's end."""
    share: float
    """Of that time, in [0, 1)."""
    gaps: tuple[tuple[float, float], ...]
    """Start and end of each, in order."""

    @property
    def longest(self) -> float:
        """Microseconds of the longest gap; 0 without one."""
        return max((end - start for start, end in self.gaps), default=0.0)


def idle(kernels: Sequence[Work]) -> Idle:
    """How long the device waited between kernels.

    Raises:
        NoKernels: there are none.
    """
    if not kernels:
        raise NoKernels("the profile has no kernel in it")
    busy = merged((k.start, k.end) for k in kernels)
    gaps = tuple((a[1], b[0]) for a, b in pairwise(busy))
    whole = busy[-1][1] - busy[0][0]
    return Idle(whole, sum(end - start for start, end in gaps) / whole, gaps)


def middle(trace: Trace, steps: int, shown: int) -> tuple[float, float]:
    """Start and end of ``shown`` of the ``steps`` that a trace holds, from its middle.

    A step is taken to last as long as all others.
    """
    kernels = trace.kernels
    start, end = kernels[0].start, max(k.end for k in kernels)
    half = (end - start) / steps * shown / 2
    centre = (start + end) / 2
    return centre - half, centre + half
