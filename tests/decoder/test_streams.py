"""In what order streams wait for each other, with stand-ins for those of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from proxytune_kernels.decoder import Decoder
from proxytune_kernels.decoder.graphs import CudaCapture
from proxytune_kernels.decoder.loop import _moment, _Pending
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.decoder.sampler import StepResult
from tests.decoder.test_runner import make


class _Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: _Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class _Cuda:
    """What of torch.cuda the decoder uses; it writes down who does what on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.main = _Stream("main", self.log)
        self.current = self.main
        self.capturing = False
        self.graph_fails = False
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: _Stream("side", self.log))
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        self.sync_mode = "default"
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.sync_mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", partial(setattr, self, "sync_mode"))

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(
        self, graph: _Cuda, *, pool: str, stream: _Stream, capture_error_mode: str
    ) -> Iterator[None]:
        assert (graph, pool, capture_error_mode) == (self, "pool", "thread_local")
        assert self.sync_mode == "default"
        before, self.current, self.capturing = self.current, stream, True
        yield
        self.capturing = False
        if self.graph_fails:
            # torch gives the stream back behind this, and so not at all.
            raise RuntimeError("capture_end")
        self.current = before

    def replay(self) -> None:
        self.log.append(f"replay on {self.current.name}")

    def run(self, what: str) -> None:
        how = " captured" * self.capturing + " or an error" * (self.sync_mode == "error")
        self.log.append(f"{what} on {self.current.name}{how}")


class _Result:
    def __init__(self, part: tuple[str, ...], log: list[str]) -> None:
        self.name, self.log = "+".join(part), log

    def record_stream(self, stream: _Stream) -> None:
        self.log.append(f"{self.name} recorded on {stream.name}")


SEPARATE = [("base",), ("expert",), ("anti",)]


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize(
    ("streams", "parts", "places"),
    [
        (3, SEPARATE, ["main", "side0", "side1"]),
        (3, [("base",), ("pair",)], ["main", "side0"]),
        (2, SEPARATE, ["main", "side0", "side0"]),
        (1, SEPARATE, ["main", "main", "main"]),
    ],
)
def test_models_run_side_by_side(monkeypatch, capturing, streams, parts, places):
    runner = Runner({"base": make("llama")}, 1, 8)
    cuda = _Cuda(monkeypatch)
    cuda.capturing = capturing
    log = cuda.log
    sides = [f"side{i}" for i in range(streams - 1)]
    monkeypatch.setattr(runner, "_sides", [_Stream(side, log) for side in sides])

    def run(part: tuple[str, ...]) -> Any:
        log.append(f"{'+'.join(part)} on {cuda.current.name}")
        return _Result(part, log)

    results: list[Any] = runner._side_by_side(run, parts)
    assert [result.name for result in results] == ["+".join(part) for part in parts]
    used = sorted(set(places) - {"main"})
    beside = list(zip(parts, places, strict=True))
    ran = {part[0]: log.index(f"{part[0]} on {place}") for part, place in beside}
    for part, place in beside[1:]:
        if place == "main":
            continue
        # Its inputs are there before; what reads its logits comes after all that is there.
        first, last = log.index(f"{place} waits for main"), log.index(f"main waits for {place}")
        assert first < ran[part[0]] < last
        # Nothing that runs beside it is waited for before: neither by it, nor by the base.
        assert first < min(ran.values())
        assert max(ran.values()) < last
    assert sorted(e for e in log if "waits" in e) == sorted(
        [*(f"{s} waits for main" for s in used), *(f"main waits for {s}" for s in used)]
    )
    recorded = [f"{part[0]} recorded on main" for part in parts[1:]] if used else []
    assert [entry for entry in log if "recorded" in entry] == ([] if capturing else recorded)
    assert cuda.current is cuda.main


def test_streams_meet_after_an_error(monkeypatch):
    """What was launched goes on, in memory that others may get: they come after it."""
    runner = Runner({"base": make("llama")}, 1, 8)
    cuda = _Cuda(monkeypatch)
    monkeypatch.setattr(runner, "_sides", [_Stream("side", cuda.log)])

    def run(part: tuple[str, ...]) -> Any:
        if part == ("anti",):
            raise RuntimeError("it waits")
        return cuda.run(part[0])

    with pytest.raises(RuntimeError, match="it waits"):
        runner._side_by_side(run, [("base",), ("expert",), ("anti",)])
    with pytest.raises(RuntimeError, match="it waits"):
        CudaCapture(torch.device("cuda", 1)).warm_up(lambda: run(("anti",)))
    assert cuda.log == [
        "side waits for main", "base on main", "expert on side", "main waits for side",
        "side waits for main", "main waits for side",
    ]  # fmt: skip
    assert cuda.current is cuda.main


def test_how_many_streams(monkeypatch, trio):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr("proxytune_kernels.decoder.runner._one_cuda_device", lambda devices: True)
    for streams in (1, 2, 3):
        assert (
            len(Runner({"base": make("llama")}, 1, 8, streams=streams)._sides or []) == streams - 1
        )
    for wrong in (0, 4, True):
        with pytest.raises(ValueError, match=f"streams must be 1, 2 or 3, got {wrong}"):
            Decoder(trio, streams=wrong)


def test_one_model_needs_no_other_stream(monkeypatch):
    runner = Runner({"base": make("llama")}, 1, 8)
    cuda = _Cuda(monkeypatch)
    monkeypatch.setattr(runner, "_sides", [_Stream("side", cuda.log)] * 2)
    run: Callable[[Any], Any] = lambda _: cuda.run("base")  # noqa: E731
    runner._side_by_side(run, [("base",)])
    assert cuda.log == ["base on main"]


def test_a_capture(monkeypatch):
    """A run, one in which it is an error to wait, and the one that is recorded.

    Each begins in the state that was.
    """
    cuda = _Cuda(monkeypatch)
    state = torch.tensor([5])
    begun: list[int] = []

    def step() -> Any:
        cuda.run("step")
        begun.append(int(state))
        state.add_(1)
        return "result"

    replay: Callable[[], Any] = CudaCapture(torch.device("cuda", 1))(step, [state])
    assert begun == [5, 5, 5]
    assert int(state) == 5
    assert cuda.log == [
        "side waits for main", "step on side", "main waits for side",
        "side waits for main", "step on side or an error", "main waits for side",
        "step on side captured",
    ]  # fmt: skip
    assert replay() == "result"
    assert cuda.log[-1] == "replay on main"
    assert begun == [5, 5, 5]


@pytest.mark.parametrize("where", ["warm-up", "rehearsal", "capture"])
def test_a_failed_capture_leaves_stream_and_state(monkeypatch, where):
    cuda = _Cuda(monkeypatch)
    cuda.graph_fails = where == "capture"
    state = torch.tensor([5])

    def step() -> Any:
        state.add_(1)
        if where == "warm-up" or (where == "rehearsal" and cuda.sync_mode == "error"):
            raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="capture_end|out of order"):
        CudaCapture(torch.device("cuda", 0))(step, [state])
    assert int(state) == 5
    assert cuda.current is cuda.main
    assert cuda.sync_mode == "default"


class _OnDevice:
    """A column of a result on a GPU that is not the current one."""

    device = torch.device("cuda", 1)

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def to(self, device: str, *, non_blocking: bool, copy: bool) -> torch.Tensor:
        assert (device, non_blocking, copy) == ("cpu", True, True)
        self.log.append("copied")
        return torch.tensor([[3]])


def test_a_result_is_read_when_it_is_there(monkeypatch):
    """An event is behind the copies, on their stream, and waited for before they are read."""
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            log.append(f"recorded on {stream}")

        def synchronize(self) -> None:
            log.append("waited for")

        def elapsed_time(self, end: Any) -> float:
            assert end is not self
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    column: Any = _OnDevice(log)
    launched = _moment(torch.device("cuda", 1))
    pending = _Pending([], StepResult(column, column, column, column), 0, launched)
    recorded = "recorded on stream of cuda:1"
    assert log == [recorded, *["copied"] * 4, recorded]
    assert pending.lists()[0] == [[3]]
    assert log[-1] == "waited for"
    # By the device's clock: what ran before the step, and how long the host took, don't count.
    assert pending.seconds() == 1.5
