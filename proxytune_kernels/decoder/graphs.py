"""Captured steps: one CUDA graph for each number of slots and kind of step.

A graph replays the kernels of one step on the addresses it was captured with. What differs from
step to step (tokens, lengths, parameters, which slots run) lies in tensors at fixed places; what a
graph must be made for (its shapes) is rounded up, so that a few graphs serve all steps.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from proxytune_kernels.decoder.sampler import StepResult

_WARM_UPS = 2

Step = Callable[[int], StepResult]
Replay = Callable[[], StepResult]


class Capture(ABC):
    """Makes a step that can be run again out of one that is run now."""

    def __call__(self, step: Replay, state: Sequence[Tensor]) -> Replay:
        """Capture ``step``; what it changes (``state``) is as before when this returns."""
        saved = [tensor.clone() for tensor in state]

        def restore() -> None:
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)

        try:
            # Libraries set themselves up, and kernels are compiled, at their first calls.
            for _ in range(_WARM_UPS):
                self.warm_up(step)
                # Each run begins where the step does: a full row has no room for another.
                restore()
            return self.record(step)
        finally:
            restore()

    @abstractmethod
    def warm_up(self, step: Replay) -> None:
        """Run ``step`` without recording it."""

    @abstractmethod
    def record(self, step: Replay) -> Replay:
        """Record ``step``; a RuntimeError says why it can't be."""


class CudaCapture(Capture):
    """Captures into CUDA graphs, which share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Of this device, which need not be the current one.
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, step: Replay) -> None:
        """See :class:`Capture`."""
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            step()
        main.wait_stream(self._stream)

    def record(self, step: Replay) -> Replay:
        """See :class:`Capture`."""
        graph = torch.cuda.CUDAGraph()
        main = torch.cuda.current_stream(self._device)
        # The outer stream: a capture that fails may leave its own as the current one.
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(main),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
        ):
            result = step()

        def replay() -> StepResult:
            graph.replay()
            return result

        return replay


class StepGraphs:
    """Runs steps from graphs, and makes those that are not there yet."""

    def __init__(self, capture: Capture, max_batch_size: int) -> None:
        self._capture = capture
        self._max_batch_size = max_batch_size
        self._replays: dict[Hashable, Replay] = {}
        self.tried = 0
        """How many captures were begun."""
        self.failed: str | None = None
        """Why nothing is captured any more; None while it is."""

    @property
    def count(self) -> int:
        """How many graphs there are."""
        return len(self._replays)

    def run(self, slots: int, kind: Hashable, step: Step, state: Sequence[Tensor]) -> StepResult:
        """Run a step of the first slots, from its graph.

        Args:
            slots: how many.
            kind: what else the step depends on.
            step: rows -> result.
            state: what the step changes.

        Returns:
            The first rows of the graph's own tensors: the next run writes over them.
        """
        if self.failed is not None:
            return step(slots)
        rows = min(power_of_two(slots, 1), self._max_batch_size)
        key = (rows, kind)
        if key not in self._replays:
            self.tried += 1
            try:
                self._replays[key] = self._capture(lambda: step(rows), state)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.failed = f"a step can't be captured: {' '.join(str(error).split())}"
                return step(slots)
        return self._replays[key]().first(slots)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes a second
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def power_of_two(count: int, least: int) -> int:
    """The least power of two that is no less than ``count`` or ``least``, itself one."""
    return max(least, 1 << (count - 1).bit_length())
