"""What the draft controller learns of steps' times, on a clock that the test moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch._dynamo.utils

from proxytune_kernels.decoder import Speculation, loop
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.decoder.speculation import DraftController
from proxytune_kernels.decoder.step import Stepper
from proxytune_kernels.params import SamplingParams
from tests.decoder.conftest import BACKEND
from tests.decoder.tape import Tape, make_decoder

NEEDS_TAPE = pytest.mark.skipif(BACKEND == "reference", reason="the reference can't be captured")


class Clock:
    """``time``, in the loop: a step takes a second, and whatever else it waits for 100."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits = 0

    def wait(self) -> None:
        self.waits += 1
        self.now += 100.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


@pytest.mark.parametrize("way", ["kernels", "compiler", pytest.param("captures", marks=NEEDS_TAPE)])
def test_only_steps_are_timed(near, monkeypatch, way):
    """Not a capture, not a kernel that is compiled at its first call, not torch.compile."""
    clock, learned = Clock(), []
    shapes: set[Any] = set()
    counters: Any = torch._dynamo.utils.counters
    monkeypatch.setitem(counters["stats"], "unique_graphs", 0)
    run, forward, warm_up = Stepper.run, Runner.forward, Tape.warm_up
    observe = DraftController.observe_time
    forwards = 0

    def timed_run(self: Stepper, *arguments: Any) -> Any:
        result = run(self, *arguments)
        clock.now += 1.0
        return result

    def slow_forward(self: Runner, roles: Any, token_ids: Any, *offset: int) -> Any:
        nonlocal forwards
        forwards += 1
        shape = (roles, token_ids.shape, offset)
        if way == "kernels" and shape not in shapes:
            clock.wait()
        if way == "compiler" and forwards % 7 == 0:
            # As where a guard fails, whenever that is.
            counters["stats"]["unique_graphs"] += 1
            clock.wait()
        shapes.add(shape)
        return forward(self, roles, token_ids, *offset)

    def slow_warm_up(self: Tape, step: Any) -> None:
        clock.wait()
        warm_up(self, step)

    def observed(self: DraftController, rows: int, drafts: int, seconds: float) -> None:
        learned.append(seconds)
        observe(self, rows, drafts, seconds)

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(Stepper, "run", timed_run)
    monkeypatch.setattr(Runner, "forward", slow_forward)
    monkeypatch.setattr(Tape, "warm_up", slow_warm_up)
    monkeypatch.setattr(DraftController, "observe_time", observed)
    decoder = make_decoder(
        monkeypatch, near, 3, taped=way == "captures", speculation=Speculation(max_drafts=3)
    )
    params = [
        SamplingParams(alpha=alpha, temperature=0, max_tokens=40, ignore_eos=True)
        for alpha in (1.0, 0.5, 0.0, 1.0)
    ]
    decoder.generate([[5, 6, 7], [8], [9, 10], [11]], params)
    assert set(learned) == {1.0}
    assert len(learned) > 10
    assert clock.waits > 4 and decoder.statistics()["speculative_rounds"] > 0
