"""The CUDA device's use of torch, against stand-ins that record it: no GPU has to be there."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu.device import CannotCapture, CudaDevice, NoDevice, find_device


@pytest.fixture
def cuda(monkeypatch):
    """What CudaDevice uses of torch.cuda; ``events`` says in which order."""
    events: list[str] = []
    state = SimpleNamespace(events=events, stream="default", end_of_capture=None)

    @contextmanager
    def stream(other):
        before, state.stream = state.stream, other
        try:
            yield
        finally:
            state.stream = before

    @contextmanager
    def graph(cuda_graph, stream):
        # As torch's: where the end of a capture raises, its stream stays the current one.
        before, state.stream = state.stream, stream
        events.append("begin")
        try:
            yield
        finally:
            events.append("end")
            if state.end_of_capture is not None:
                raise state.end_of_capture
            state.stream = before

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.now

        def synchronize(self):
            events.append("synchronize event")

        def elapsed_time(self, end):
            return end.at - self.at  # milliseconds

    properties = SimpleNamespace(
        name="NVIDIA X", L2_cache_size=50, total_memory=80, major=9, minor=0,
        multi_processor_count=132,
    )  # fmt: skip
    side = SimpleNamespace(wait_stream=lambda other: events.append(f"side waits for {other}"))
    for name, value in {
        "current_device": lambda: 0,
        "get_device_properties": lambda index: properties,
        "Stream": lambda: side,
        "stream": stream,
        "current_stream": lambda: state.stream,
        "synchronize": lambda: events.append("synchronize"),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: events.append("replay")),
        "graph": graph,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    state.side, state.Event = side, Event
    return state


def test_capture(cuda):
    def call(name):
        def run():
            assert cuda.stream is cuda.side
            cuda.events.append(name)

        return run

    replay = CudaDevice().capture([call("a"), call("b"), call("a")])
    assert cuda.events == [
        "side waits for default", "a", "a", "synchronize", "begin", "a", "b", "a", "end",
    ]  # fmt: skip
    assert cuda.stream == "default"
    replay()
    assert cuda.events[-1] == "replay"


def test_what_breaks_a_capture_is_named(cuda):
    calls = [0]
    cuda.end_of_capture = RuntimeError("capture_end failed")

    def fails_when_captured():
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("operation not permitted when stream is capturing\nhint")

    with pytest.raises(CannotCapture, match="RuntimeError: operation not permitted when stream is"):
        CudaDevice().capture([fails_when_captured])
    assert cuda.stream == "default"


def test_the_end_of_a_capture_may_break_it(cuda):
    cuda.end_of_capture = RuntimeError("dependency on uncaptured work")
    with pytest.raises(CannotCapture, match="dependency on uncaptured work"):
        CudaDevice().capture([lambda: None])
    assert cuda.stream == "default"


def test_warm_up_errors_and_memory_are_not_the_captures(cuda):
    def wrong():
        raise ValueError("bad argument")

    with pytest.raises(ValueError, match="bad argument"):
        CudaDevice().capture([wrong])
    calls = [0]

    def full():
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        CudaDevice().capture([full])


def test_seconds(cuda):
    def run():
        cuda.Event.now += 2.5

    assert CudaDevice().seconds(run, 4) == pytest.approx(2.5e-3)
    assert cuda.events == ["synchronize event"]


def test_find_and_describe(cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.gpu.device.ptk.backends", lambda: {"triton": None})
    monkeypatch.setattr("benchmarks.gpu.device._driver_version", lambda: "580.1")
    device = find_device()
    assert (device.name, device.l2_bytes, device.memory_bytes) == ("NVIDIA X", 50, 80)
    described = device.describe()
    assert described.pop("host_cpu")
    assert described == {
        "device": "cuda",
        "device_name": "NVIDIA X",
        "driver": "580.1",
        "cuda": "13.0",
        "compute_capability": "9.0",
        "multiprocessors": 132,
        "l2_bytes": 50,
        "device_memory_bytes": 80,
    }
    monkeypatch.setenv("TRITON_INTERPRET", "true")
    with pytest.raises(NoDevice, match="unset it"):
        find_device()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr("benchmarks.gpu.device.ptk.backends", lambda: {"triton": "too old"})
    with pytest.raises(NoDevice, match="the triton backend can't run here: too old"):
        find_device()
