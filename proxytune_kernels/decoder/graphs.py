"""Captured steps: one CUDA graph for each number of slots and kind of step.

A graph replays the kernels of one step on the addresses it was captured with. What differs from
step to step (tokens, lengths, parameters, which slots run) lies in tensors at fixed places; what a
graph must be made for (its shapes) is rounded up, so that a few graphs serve all steps.

A step that waits for the device can't be captured, and a capture that fails leaves the allocator of
torch 2.11 unable to free memory. So a step is run first where waiting is an error, then captured.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from proxytune_kernels.decoder.sampler import StepResult

MAX_GRAPHS = 64
"""Captured steps of a decoder at most: each holds memory on the device. The rest run eagerly."""

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
            for run in (self.warm_up, self.rehearse):
                run(step)
                # Each run begins where the step does: a full row has no room for another.
                restore()
            return self.record(step)
        finally:
            restore()

    @abstractmethod
    def warm_up(self, step: Replay) -> None:
        """Run ``step`` without recording it."""

    @abstractmethod
    def rehearse(self, step: Replay) -> None:
        """Run ``step`` without recording it; a RuntimeError where it waits for the device."""

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
        try:
            with torch.cuda.stream(self._stream):
                step()
        finally:
            # After an error, too: what was launched goes on.
            main.wait_stream(self._stream)

    def rehearse(self, step: Replay) -> None:
        """See :class:`Capture`. Torch's mode is that of all threads: others must not wait, too."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.warm_up(step)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, step: Replay) -> Replay:
        """See :class:`Capture`."""
        graph = torch.cuda.CUDAGraph()
        main = torch.cuda.current_stream(self._device)
        # The outer stream: a capture that fails may leave its own as the current one.
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(main),
            torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                # Other threads may use the device meanwhile.
                capture_error_mode="thread_local",
            ),
        ):
            result = step()

        def replay() -> StepResult:
            graph.replay()
            return result

        return replay


class StepGraphs:
    """Runs steps from graphs, and makes those that are not there yet.

    Args:
        capture: makes them.
        max_batch_size: slots there are.
        most: graphs at most; other kinds of steps run eagerly.
    """

    def __init__(self, capture: Capture, max_batch_size: int, most: int = MAX_GRAPHS) -> None:
        self._capture = capture
        self._most = most
        rows = {power_of_two(slots, 1) for slots in range(1, max_batch_size + 1)}
        self.sizes = sorted({min(r, max_batch_size) for r in rows}, reverse=True)
        """Rows that graphs are made for, the most first: the others fit into its memory."""
        self._replays: dict[Hashable, Replay] = {}
        self._without: set[Hashable] = set()
        # No more is tried: what is freed later is for requests, and each try costs a step.
        self._no_memory = False
        self.tried = 0
        """How many captures were begun."""
        self.failed: str | None = None
        """Why nothing is captured any more; None while it is."""

    @property
    def count(self) -> int:
        """How many graphs there are."""
        return len(self._replays)

    def info(self) -> str:
        """What runs from graphs, as words."""
        if self.failed is not None:
            return f"none: {self.failed}"
        why = "no memory for more" if self._no_memory else "the most there may be"
        more = f", {why}: {len(self._without)} other kinds of step run eagerly"
        return f"{self.count} captured{more if self._without else ''}"

    def run(self, slots: int, kind: Hashable, step: Step, state: Sequence[Tensor]) -> StepResult:
        """Run a step of the first slots, from its graph where it can have one.

        Args:
            slots: how many.
            kind: what else the step depends on.
            step: rows -> result.
            state: what the step changes.

        Returns:
            The first rows of the graph's own tensors: the next run writes over them.
        """
        rows = min(size for size in self.sizes if size >= slots)
        replay = self.prepare(rows, kind, step, state)
        return step(slots) if replay is None else replay().first(slots)

    def prepare(
        self, rows: int, kind: Hashable, step: Step, state: Sequence[Tensor]
    ) -> Replay | None:
        """The graph of a step of one of :attr:`sizes`, made if there is room; None without one."""
        key = (rows, kind)
        if self.failed is not None:
            return None
        if key in self._replays:
            return self._replays[key]
        if self.count >= self._most or self._no_memory:
            self._without.add(key)
            return None
        self.tried += 1
        try:
            self._replays[key] = self._capture(lambda: step(rows), state)
        except torch.OutOfMemoryError:
            self._no_memory = True
            self._without.add(key)
            return None
        except RuntimeError as error:
            self.failed = f"a step can't be captured: {' '.join(str(error).split())}"
            return None
        return self._replays[key]


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes a second
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def power_of_two(count: int, least: int) -> int:
    """The least power of two that is no less than ``count`` or ``least``, itself one."""
    return max(least, 1 << (count - 1).bit_length())
