"""A whole run of ``python -m benchmarks.gpu``, with a processor in the place of the GPU."""

import json
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import proxytune_kernels as ptk
from benchmarks.gpu import checks, contract, flashinfer_peer, providers, timing, tools
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import (
    COMBINE,
    COMPILED,
    CUDA,
    EAGER,
    FLASHINFER,
    HEADS,
    OURS,
    REJECTION,
    SAMPLE,
    SCORE,
    TRANSFORMERS,
    VERIFY,
    Case,
    Unit,
)
from benchmarks.gpu.contract import Outcome
from benchmarks.gpu.run import Options, run
from benchmarks.gpu.samplers import eager_sampler
from benchmarks.gpu.timing import COLD, SINGLE, WARM
from benchmarks.op_cases import FILTERS
from tests.benchmarks.gpu_device import CpuDevice

PLAIN = (OURS, CUDA, EAGER, TRANSFORMERS, FLASHINFER)
# transformers is optional
HERE = tuple(name for name in PLAIN if name != TRANSFORMERS or find_spec("transformers"))
SMALL = (
    Unit(Case(SAMPLE, "peaked", "top_p", 300, 1), HERE),
    Unit(Case(SAMPLE, "flat", "top_k+top_p", 400, 3), HERE),
    Unit(Case(VERIFY, vocab_size=300, batch_size=3, positions=5), (OURS, CUDA, EAGER, FLASHINFER)),
    Unit(Case(REJECTION, vocab_size=300, batch_size=3, positions=5), (OURS, CUDA)),
    Unit(Case(COMBINE, filters="none", vocab_size=300, batch_size=3), (OURS, EAGER, COMPILED)),
    Unit(Case(SCORE, filters="none", vocab_size=300, batch_size=3, positions=4),
         (OURS, EAGER, COMPILED)),
    Unit(Case(HEADS, "random", vocab_size=300, batch_size=3), (OURS, EAGER)),
    Unit(Case(SAMPLE, "peaked", "top_p", 300, 1), (OURS, COMPILED)),
)  # fmt: skip


def stand_in(filters, device):
    """The eager chain under FlashInfer's name."""
    return replace(eager_sampler(filters), name=FLASHINFER, peer=None)


class BuiltAtOnce:
    reason: str | None = None

    def __init__(self, limit_seconds):
        pass

    def wait(self):
        return self.reason


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Run units on a CPU; torch.compile compiles nothing, the eager chain stands for FlashInfer."""
    monkeypatch.setattr(gpu_run, "COPY_BYTES", 2**16)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(flashinfer_peer, "missing", lambda: None)
    monkeypatch.setattr(flashinfer_peer, "Build", BuiltAtOnce)
    monkeypatch.setattr(providers, "make_sampler", stand_in)
    monkeypatch.setattr(checks, "_DRAWS", 64)
    monkeypatch.setattr(timing, "_RUN_SECONDS", 1e-4)
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(timing, "_REPEATS", (2, 2))
    output = tmp_path / "results" / "gpu.jsonl"

    def go(units=SMALL, stages=("check", "time"), device=None, seconds=600.0, plot=False):
        options = Options(stages, tuple(units), 1, output, plot)
        code = run(device or CpuDevice(), options, Budget(seconds))
        return code, [json.loads(line) for line in output.read_text().splitlines()]

    return go


def notes(records):
    return [r["text"] for r in records if r["op"] == "note"]


def test_a_copy_counts_what_is_read_and_written(monkeypatch):
    monkeypatch.setattr(gpu_run, "COPY_BYTES", 1000)
    monkeypatch.setattr(CpuDevice, "seconds", lambda self, run, times: 0.5)
    assert gpu_run.copy_rates(CpuDevice()) == [4000.0] * 10


class TestRun:
    def test_whole(self, bench, tmp_path, capsys):
        code, records = bench()
        assert code == 0
        assert notes(records) == []
        timed = [r for r in records if "provider" in r]
        got = Counter((r["op"], r["vocab_size"], r["provider"], r["mode"]) for r in timed)
        wanted = Counter(
            (unit.case.op, unit.case.vocab_size, name, mode)
            for unit in SMALL
            for name in unit.providers
            for mode in timing.modes(unit.case.batch_size, unit.case.logits_bytes, 10_000)
        )
        assert got == wanted
        assert {r["mode"] for r in timed} == {COLD, WARM, SINGLE}
        for r in timed:
            assert r["benchmark"] == "gpu"
            assert r["checked"]
            assert r["graph"]
            assert r["microseconds"]["count"] == 2
            assert r["microseconds"]["min"] <= r["microseconds"]["median"]
            assert r["environment"]["device_name"] == CpuDevice.name
            assert r["environment"]["driver"] == "1.2.3"
            assert "triton" in r["environment"]
            if r["provider"] == OURS:
                assert r["time_over_ours"]["median"] == 1.0
        [copy] = [r for r in records if r["op"] == "copy"]
        assert copy["bytes"] == 2**17
        assert len(copy["bytes_per_second"]) == 10
        assert len([r for r in records if r["op"] == "target"]) == 14
        folder = tmp_path / "results"
        assert {path.name for path in folder.iterdir()} == {"gpu.jsonl", "gpu.md"}
        shown = capsys.readouterr().out
        assert "The operators on a GPU" in shown
        assert "not measured: memcheck, racecheck, initcheck and synccheck clean" in shown

    def test_pictures(self, bench, tmp_path):
        pytest.importorskip("matplotlib")
        bench(SMALL[:2], plot=True)
        for name in ("gpu-times.png", "gpu-bandwidth.png"):
            assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")

    def test_optional_packages(self, bench, monkeypatch, tmp_path):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        code, records = bench([Unit(SMALL[0].case, PLAIN)], plot=True)
        assert code == 0
        assert notes(records) == [
            "transformers: not measured: transformers is not installed (pip install transformers)",
            "No pictures: matplotlib is not installed (pip install matplotlib).",
        ]
        there = {r["provider"] for r in records if "provider" in r}
        assert there == {OURS, CUDA, EAGER, FLASHINFER}
        assert list(tmp_path.rglob("*.png")) == []

    def test_compile_says_its_mode(self, bench):
        _, records = bench(SMALL[-1:])
        [config] = {json.dumps(r["config"]) for r in records if r.get("provider") == COMPILED}
        config = json.loads(config)
        assert config["mode"] in ("default", "max-autotune-no-cudagraphs")
        assert config["mode_microseconds"].keys() == {"default", "max-autotune-no-cudagraphs"}

    def test_check_alone_times_nothing(self, bench):
        device = CpuDevice()
        code, records = bench(SMALL[:2], stages=("check",), device=device)
        assert code == 0
        assert [r for r in records if "provider" in r] == []
        assert device.captured == 0

    def test_time_alone_is_marked(self, bench):
        _, records = bench(SMALL[:1], stages=("time",))
        assert {r["checked"] for r in records if "provider" in r} == {False}

    def test_wrong_ours_is_not_timed(self, bench, monkeypatch):
        right = ptk.sample

        def unfiltered(base, expert=None, anti=None, params=None, **options):
            params = params._replace(top_p=torch.ones(len(base)))
            return right(base, expert, anti, params, **options)

        monkeypatch.setattr(ptk, "sample", unfiltered)
        code, records = bench(SMALL[:1])
        assert code == 1
        assert "ours: wrong, not timed" in notes(records)[0]
        assert {r["provider"] for r in records if "provider" in r} == {*HERE} - {OURS, CUDA}
        assert {r["time_over_ours"] for r in records if "provider" in r} == {None}

    def test_wrong_peer_is_not_timed_and_no_failure(self, bench, monkeypatch):
        def unfiltered(filters, device):
            return stand_in(FILTERS["none"], device)

        monkeypatch.setattr(providers, "make_sampler", unfiltered)
        code, records = bench(SMALL[:1])
        assert code == 0
        [note] = notes(records)
        assert "flashinfer: wrong, not timed" in note
        assert FLASHINFER not in {r.get("provider") for r in records}

    def test_peer_that_is_not_there(self, bench, monkeypatch):
        monkeypatch.setattr(flashinfer_peer, "missing", lambda: "flashinfer is not installed")
        code, records = bench(SMALL[:1])
        assert code == 0
        assert notes(records) == ["flashinfer: not measured: flashinfer is not installed"]
        assert FLASHINFER not in {r.get("provider") for r in records}

    def test_peer_that_does_not_build(self, bench, monkeypatch):
        monkeypatch.setattr(BuiltAtOnce, "reason", "no nvcc")
        _, records = bench(SMALL[:1])
        assert notes(records) == ["flashinfer: not measured: no nvcc"]

    def test_ours_must_be_capturable(self, bench):
        device = CpuDevice()
        device.capturable = False
        code, records = bench(SMALL[:1], device=device)
        assert code == 1
        assert "ours: can't be captured" in notes(records)[0]
        others = [r for r in records if "provider" in r]
        assert {r["provider"] for r in others} == {*HERE} - {OURS, CUDA}
        assert not any(r["graph"] for r in others)

    def test_lost_device_ends_the_measurements(self, bench, monkeypatch):
        device = CpuDevice()

        def fail(*arguments, **options):
            device.lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(ptk, "combine", fail)
        code, records = bench([SMALL[0], SMALL[4], SMALL[1]], device=device)
        assert code == 1
        assert "nothing more is measured" in notes(records)[-1]
        assert {r["op"] for r in records if "provider" in r} == {SAMPLE}
        assert {r["vocab_size"] for r in records if "provider" in r} == {300}

    def test_too_little_memory(self, bench, monkeypatch):
        monkeypatch.setattr(CpuDevice, "memory_bytes", 1000)
        code, records = bench(SMALL[:1])
        assert code == 0
        assert "need more memory" in notes(records)[0]

        def full(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(CpuDevice, "memory_bytes", 2**30)
        monkeypatch.setattr(providers, "make_sampler", full)
        code, records = bench(SMALL[:1])
        assert code == 0
        [note] = notes(records)
        assert "flashinfer: not measured, the device's memory does not suffice" in note

    def test_out_of_time(self, bench):
        code, records = bench(seconds=11.0)
        assert code == 0
        [note] = notes(records)
        assert note.startswith(f"Not measured for lack of time, {len(SMALL)} of {len(SMALL)}")
        assert all(str(unit) in note for unit in SMALL)

    def test_contract_failure_is_the_exit_code(self, bench, monkeypatch):
        failed = Outcome("Contract suite: 1 failed.", True, {"failures": ["test_x"]})
        asked = []

        def run_contract(*arguments):
            asked.append(arguments)
            return failed

        monkeypatch.setattr(contract, "run_contract", run_contract)
        built = Outcome("The C++ extension is there.", False, {})
        monkeypatch.setattr(contract, "build_extension", lambda limit: built)
        code, records = bench(SMALL[:1], stages=("build", "contract", "check", "time"))
        assert code == 1
        [(backend, workers, limit, log)] = asked
        assert (backend, workers, log.name) == (CpuDevice.backend, 1, "gpu.contract.log")
        assert 250 < limit < 300  # half of what is left, less what later stages need
        assert [r["op"] for r in records[:2]] == ["build", "contract"]
        assert records[1]["failures"] == ["test_x"]
        assert any("provider" in r for r in records)

    def test_tools(self, bench, monkeypatch):
        profiled = [{"provider": name, "filters": "none", "ratio": 1.01} for name in (OURS, CUDA)]
        asked = []

        def profile(limit, providers):
            asked.append(providers)
            return Outcome("Profile: done.", False, {"cases": profiled})

        monkeypatch.setattr(tools, "profile", profile)
        errors = {"errors": dict.fromkeys(tools.SANITIZERS, 0)}
        monkeypatch.setattr(tools, "sanitize", lambda limit: Outcome("Ok.", False, errors))
        code, records = bench((), stages=("profile", "sanitize"))
        assert code == 0
        met = {r["target"]: r["met"] for r in records if r["op"] == "target"}
        assert met["DRAM bytes read, none, peaked: at most 1.05x the logits"] is True
        assert met["cuda: DRAM bytes read, none, peaked: at most 1.05x the logits"] is True
        assert met["memcheck, racecheck, initcheck and synccheck clean"] is True
        assert asked == [(OURS, CUDA)]

    def test_cuda_that_is_not_usable_is_left_out_by_name(self, bench, monkeypatch):
        reason = "the CUDA C++ extension is not built"
        usable = {CpuDevice.backend: None, "cuda": reason}
        monkeypatch.setattr("benchmarks.gpu.run.ptk.backends", lambda: usable)
        monkeypatch.setattr(CpuDevice, "cuda_backend", "cuda")
        asked = []

        def run_contract(*arguments):
            asked.append(arguments[0])
            return Outcome("Contract suite: fine.", False, {})

        monkeypatch.setattr(contract, "run_contract", run_contract)
        code, records = bench(SMALL[:1], stages=("contract", "check"))
        assert code == 0 and asked == [CpuDevice.backend]
        assert f"cuda: not measured: {reason}" in notes(records)
        assert CUDA not in {r.get("provider") for r in records}

    def test_the_contract_suite_is_run_for_both(self, bench, monkeypatch):
        usable = {CpuDevice.backend: None, "cuda": None}
        monkeypatch.setattr("benchmarks.gpu.run.ptk.backends", lambda: usable)
        monkeypatch.setattr(CpuDevice, "cuda_backend", "cuda")
        asked = []

        def run_contract(*arguments):
            asked.append(arguments[0])
            return Outcome("Contract suite: fine.", False, {})

        monkeypatch.setattr(contract, "run_contract", run_contract)
        bench((), stages=("contract",))
        assert asked == [f"{CpuDevice.backend} or cuda"]
