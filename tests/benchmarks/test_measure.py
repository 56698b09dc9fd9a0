import json
import os
import sys

import pytest
import torch

from benchmarks import memory
from benchmarks.environment import environment
from benchmarks.measure import Summary, Timer, collect, interleaved, paired_ratios
from benchmarks.memory import PeakMemory, in_fresh_process
from benchmarks.report import write_json_lines


def test_summary():
    values = [float(v) for v in range(100, -1, -1)]
    assert Summary.of(values) == Summary(median=50.0, p10=10.0, p90=90.0, count=101)


def test_summary_of_nothing():
    with pytest.raises(ValueError, match="at least one measurement"):
        Summary.of([])


def test_a_sample_shrugs_off_interruptions(monkeypatch):
    """One call in ten takes a hundred times as long: the sample is that of the other nine."""
    now, calls = [0.0], [0]
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: now[0])

    def call():
        calls[0] += 1
        now[0] += 0.05 if calls[0] % 10 == 0 else 0.0005

    timer = Timer.calibrated(call)
    assert (timer.loops, timer.shots) == (1, 10)
    assert timer.sample() == pytest.approx(0.0005)


def test_paired_ratios_cancel_what_slows_a_repeat():
    slowdown = [1.0, 8.0, 1.0, 3.0]
    ratios = paired_ratios([6.0 * s for s in slowdown], [2.0 * s for s in slowdown])
    assert ratios == Summary(3.0, 3.0, 3.0, 4)


def test_paired_ratios_need_pairs():
    with pytest.raises(ValueError):
        paired_ratios([1.0, 2.0], [1.0])


def test_interleaved_takes_turns():
    ran = []
    calls = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}
    names = [name for name, _ in interleaved(calls, 3)]
    assert names == ["a", "b"] * 3
    assert {"a", "b"} == set(ran)


def test_interleaved_reports_seconds_per_call(monkeypatch):
    """On a clock that each call advances: what comes out does not depend on how often it looped."""
    now = [0.0]
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: now[0])

    def lasting(seconds):
        def call():
            now[0] += seconds

        return call

    calls = {"short": lasting(0.001), "long": lasting(0.25)}
    seconds = collect(interleaved(calls, 2))
    assert seconds["short"] == pytest.approx([0.001] * 2)
    assert seconds["long"] == pytest.approx([0.25] * 2)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only")
def test_peak_memory_sees_what_was_freed():
    size = 64 * 2**20
    with PeakMemory() as peak:
        block = torch.ones(size // 4)
        del block
    slack = 2 * 2**20  # the kernel's batched counts (0.3 MB), the interpreter's own allocations
    assert size - slack <= peak.extra_bytes <= size + slack
    assert peak.total_bytes > peak.extra_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only")
def test_peak_memory_starts_anew():
    torch.ones(32 * 2**20)
    with PeakMemory() as peak:
        pass
    assert peak.extra_bytes < 2 * 2**20


def test_fresh_process_is_another():
    assert in_fresh_process("os:getpid") != os.getpid()
    assert in_fresh_process("json:dumps", obj=[1, 2]) == "[1, 2]"


def test_fresh_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)json:loads.*Expecting value"):
        in_fresh_process("json:loads", s="no json")


def test_no_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing")
    with pytest.raises(RuntimeError, match="needs Linux"), PeakMemory():
        pass


def test_json_lines_stand_alone(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    write_json_lines(path, "demo", [{"provider": "a", "x": 1.5}, {"provider": "b", "x": 2}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["benchmark"], r["provider"], r["x"]) for r in lines] == [
        ("demo", "a", 1.5),
        ("demo", "b", 2),
    ]
    for record in lines:
        where = record["environment"]
        assert set(where) == set(environment())
        assert {"revision", "dirty", "device_name", "cores", "threads", "torch"} <= set(where)
        assert where["torch"] == torch.__version__
        assert where["threads"] == torch.get_num_threads()
