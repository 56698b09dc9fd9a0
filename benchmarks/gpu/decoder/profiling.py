"""Decoding under the profiler, and with synchronisation forbidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu.decoder import trace
from benchmarks.gpu.decoder.trace import Idle, Trace
from benchmarks.gpu.device import first_line
from benchmarks.prompts import make_prompts
from benchmarks.providers import ALPHA, TEMPERATURE, TOP_P, DecoderProvider
from proxytune_kernels import SamplingParams

STEPS = 20
"""Profiled, of one request."""
SHOWN = 3
"""Of them in the picture."""
_BEFORE = 8  # steps until the decoder runs evenly

Record = dict[str, Any]


@contextmanager
def _decoding(provider: DecoderProvider, prompt_length: int) -> Iterator[Iterator[object]]:
    """Events of one request that has decoded a few steps, and goes on for :data:`STEPS` more.

    It is over when the context is left: the slot is free for the next.
    """
    prompts = make_prompts(provider.decoder.trio, 1, prompt_length)
    params = SamplingParams(
        alpha=ALPHA,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        seed=0,
        max_tokens=_BEFORE + STEPS + 4,  # it does not end, nor run out of steps to run ahead to
        ignore_eos=True,
    )
    events = provider.decoder.stream(prompts, params)
    for _ in islice(events, _BEFORE):
        pass
    yield events
    for _ in events:
        pass


def _steps(events: Iterator[object]) -> None:
    done = sum(1 for _ in islice(events, STEPS))
    if done < STEPS:
        raise ValueError(f"the request must have {STEPS} steps left, and ended after {done}")


def profile(
    provider: DecoderProvider, prompt_length: int, path: Path, synchronize: Callable[[], None]
) -> tuple[Trace, Idle]:
    """Profile :data:`STEPS` steps at batch 1.

    Args:
        provider: decodes.
        prompt_length: tokens.
        path: where the trace goes.
        synchronize: waits for the device.

    Raises:
        NoKernels: nothing ran on a CUDA device.
    """
    with _decoding(provider, prompt_length) as events:
        # The decoder runs a step ahead: that one's end would be in the trace.
        synchronize()
        found = trace.record(lambda: _steps(events), path, ProfilerActivity.CUDA)
    return found, trace.idle(found.kernels)


def trace_record(found: Trace, idle: Idle) -> Record:
    """A line of results of a profile. The tracer itself widens the gaps: the share is a bound."""
    return {
        "op": "trace",
        "steps": STEPS,
        "profiled_step_ms": idle.microseconds / 1e3 / STEPS,
        "idle_share": idle.share,
        "longest_gap_us": idle.longest,
        "gaps": len(idle.gaps),
        "kernels_per_step": len(found.kernels) / STEPS,
        "streams": sorted({w.stream for w in found.work}),
        "waits_per_step": {name: count / STEPS for name, count in found.waits.items()},
    }


@contextmanager
def _synchronising_raises() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def synchronisation_record(provider: DecoderProvider, prompt_length: int) -> Record:
    """Decode with every call of torch that synchronises made an error.

    What is not one: waiting for an event, as the host does for the step before the last.
    """
    raised = None
    with _decoding(provider, prompt_length) as events:
        try:
            with _synchronising_raises():
                _steps(events)
        except RuntimeError as error:
            raised = first_line(error)
    graphs: str = provider.decoder.info()["graphs"]
    return {
        "op": "synchronisation",
        "captured": not graphs.startswith("none"),
        "graphs": graphs,
        "raised": raised,
    }
