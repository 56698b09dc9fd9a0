"""The parts of ``python -m benchmarks.gpu`` that need no GPU: plan, timing, verdicts, options."""

import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import benchmarks.gpu.__main__ as command
import proxytune_kernels as ptk
from benchmarks.gpu import report, timing
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import (
    BATCH_SIZES,
    COMPILED,
    CUDA,
    EAGER,
    FLASHINFER,
    OURS,
    REJECTION,
    SAMPLE,
    SCORE,
    TRANSFORMERS,
    VERIFY,
    Case,
    fits,
    make_inputs,
    plan,
    sets_needed,
)
from benchmarks.gpu.device import CannotCapture, NoDevice, find_device, first_line, slug
from benchmarks.gpu.providers import Prepared
from benchmarks.gpu.targets import verdicts
from benchmarks.gpu.timing import COLD, SINGLE, WARM, Timed
from benchmarks.logits import KINDS
from benchmarks.op_cases import FILTERS, VOCAB_SIZES
from proxytune_kernels.ops.backends import Choice, choose
from tests.benchmarks.gpu_device import CpuDevice

PLAIN = (OURS, CUDA, EAGER, TRANSFORMERS, FLASHINFER)


class TestPlan:
    def test_every_shape_has_the_peers_that_targets_name(self):
        timed = {unit.case for unit in plan() if set(PLAIN) <= set(unit.providers)}
        wanted = product(KINDS, FILTERS, VOCAB_SIZES, BATCH_SIZES)
        assert timed == {Case(SAMPLE, *axes) for axes in wanted}
        assert BATCH_SIZES == (1, 8, 64, 256)
        assert VOCAB_SIZES == (32_000, 128_256, 151_936)

    def test_verify_has_4_and_8_drafts(self):
        for op in (VERIFY, REJECTION):
            positions = {unit.case.positions for unit in plan() if unit.case.op == op}
            assert positions == {5, 9}

    def test_targets_first_compiling_last(self):
        units = plan()
        first = [unit.case for unit in units[:12]]
        assert first[0] == Case(SAMPLE, "peaked", "top_p", 128_256, 256)
        assert {(c.vocab_size, c.kind) for c in first} == {(128_256, "peaked")}
        first_compiled = next(i for i, unit in enumerate(units) if unit.compiles)
        plain = [i for i, unit in enumerate(units) if unit.providers == PLAIN]
        assert max(plain) < first_compiled

    def test_ours_in_cuda_stands_beside_ours_in_triton(self):
        for unit in plan():
            plain = unit.case.op in (SAMPLE, VERIFY, REJECTION) and not unit.compiles
            assert (CUDA in unit.providers) == plain and OURS in unit.providers

    def test_nothing_is_timed_twice_but_ours(self):
        pairs = Counter((unit.case, name) for unit in plan() for name in unit.providers)
        assert {name for (_, name), count in pairs.items() if count > 1} == {OURS}

    def test_selection(self):
        units = plan((OURS, EAGER), [32_000], [1, 8])
        assert {unit.case.vocab_size for unit in units} == {32_000}
        assert {unit.case.batch_size for unit in units} == {1, 8}
        assert {unit.providers for unit in units} == {(OURS, EAGER)}
        assert Counter(unit.case for unit in units).most_common(1)[0][1] == 1

    def test_case(self):
        case = Case(VERIFY, vocab_size=1000, batch_size=3, positions=5)
        assert case.rows == 15
        assert case.logits_bytes == 3 * 15 * 1000 * 2
        assert case.params("cpu").batch_size == 3
        assert case.record()["sampling"] == {
            "alpha": 1.0, "temperature": 0.7, "top_k": 0, "top_p": 0.9,
        }  # fmt: skip
        assert str(case) == "verify peaked top_p V=1000 B=3 x 5"


class TestInputs:
    @pytest.mark.parametrize("logits_bytes", [1, 30, 49, 50, 51, 99, 100, 101, 10_000])
    def test_twice_l2_is_read_between_two_uses(self, logits_bytes):
        """The fewest sets with which what is read between two uses of one is 2 x 50 or more."""
        count = sets_needed(logits_bytes, 50)
        assert (count - 1) * logits_bytes >= 100
        assert (count - 2) * logits_bytes < 100

    def test_memory(self):
        case = Case(vocab_size=1000, batch_size=1)  # 6,000 bytes
        assert fits(case, 9_000, 4 * 24_000)
        assert not fits(case, 9_000, 4 * 24_000 - 1)

    def test_sets_are_other_rows_and_drafts_are_the_experts(self):
        case = Case(VERIFY, vocab_size=500, batch_size=3, positions=3)
        one, other = make_inputs(case, 2, "cpu", CpuDevice.backend)
        again, _ = make_inputs(case, 2, "cpu", CpuDevice.backend)
        assert [x.shape for x in one.logits] == [(9, 500)] * 3
        assert one.logits[0].dtype == torch.bfloat16
        assert not torch.equal(one.logits[0], other.logits[0])
        assert torch.equal(one.logits[2], again.logits[2])
        expert = one.logits[1].view(3, 3, 500)
        for j in range(2):
            params = case.params("cpu")._replace(position=torch.full((3,), j))
            wanted = ptk.sample(expert[:, j], params=params)
            assert torch.equal(one.token_ids[:, j], wanted.token_ids)
        rejection, _ = make_inputs(replace(case, op=REJECTION), 2, "cpu", CpuDevice.backend)
        assert not torch.equal(rejection.token_ids, one.token_ids)

    def test_score_tokens(self):
        case = Case(SCORE, vocab_size=50, batch_size=2, positions=7)
        [inputs] = make_inputs(case, 1, "cpu", CpuDevice.backend)
        assert inputs.token_ids.shape == (2, 7)
        assert 0 <= int(inputs.token_ids.min()) <= int(inputs.token_ids.max()) < 50


class ScriptedDevice(CpuDevice):
    """Each run takes as many seconds as ``durations`` says for the call it makes."""

    def __init__(self, durations):
        super().__init__()
        self.durations, self.ran, self.clock = durations, [], 0.0

    def call(self, name):
        def do(inputs=None):
            self.ran.append(name)
            self.clock += self.durations[name]

        return do

    def seconds(self, run, times):
        start = self.clock
        for _ in range(times):
            run()
        return (self.clock - start) / times


class TestTiming:
    SETS: Any = ("a", "b")  # a scripted device makes calls by name

    def test_calls_in_run(self):
        assert timing.calls_in_run(1e-3, 3, COLD) == 6  # 4 ms, every set as often
        assert timing.calls_in_run(1.0, 3, COLD) == 3
        assert timing.calls_in_run(1e-3, 1, WARM) == 4
        assert timing.calls_in_run(1e-9, 1, WARM) == 64
        assert timing.calls_in_run(1e-9, 5, SINGLE) == 1

    def test_modes(self):
        assert timing.modes(1, 100, 100) == (COLD, WARM, SINGLE)
        assert timing.modes(8, 100, 100) == (COLD, WARM)
        assert timing.modes(1, 101, 100) == (COLD,)

    def test_repeats(self):
        assert timing.repeats(100.0) == 5
        assert timing.repeats(0.05) == 10
        assert timing.repeats(1e-6) == 25

    @pytest.mark.parametrize(
        ("mode", "turns"), [(COLD, ["a", "b"] * 20), (WARM, ["a"] * 40), (SINGLE, ["a"])]
    )
    def test_sets_take_turns(self, mode, turns):
        device = ScriptedDevice({"a": 1e-4, "b": 1e-4})
        prepared = Prepared(lambda name: device.call(name)(), lambda _: None, {"x": 1})
        timed = timing.prepare(device, OURS, prepared, self.SETS, mode, may_launch=False)
        device.ran.clear()
        timed.run()
        assert device.ran == turns
        assert timed.calls == len(turns)
        assert timed.record() == {
            "provider": OURS,
            "mode": mode,
            "graph": True,
            "not_captured": None,
            "calls_per_run": len(turns),
            "input_sets": 2 if mode == COLD else 1,
            "config": {"x": 1},
        }

    def test_what_cant_be_captured_is_launched_and_marked(self):
        device = ScriptedDevice({"a": 1e-3})
        device.capturable = False
        prepared = Prepared(lambda name: device.call(name)(), lambda _: None, {})
        timed = timing.prepare(device, EAGER, prepared, self.SETS[:1], COLD, may_launch=True)
        device.ran.clear()
        timed.run()
        assert device.ran == ["a"] * timed.calls
        assert not timed.record()["graph"]
        assert "not permitted" in timed.record()["not_captured"]
        with pytest.raises(CannotCapture):
            timing.prepare(device, OURS, prepared, self.SETS[:1], COLD, may_launch=False)

    def test_samples_are_interleaved_per_call_and_warmed(self):
        device = ScriptedDevice({"cold": 4e-3, "warm": 1e-3})
        timed = [
            Timed(OURS, COLD, device.call("cold"), 8, 2, None, {}),
            Timed(OURS, WARM, device.call("warm"), 2, 1, None, {}),
        ]
        samples = timing.time_all(device, timed)
        # A sample of warm is 2 replays, to fill 2 ms, after one that is not timed.
        turn = ["cold", "warm", "warm", "warm"]
        assert device.ran[-4 * 25 :] == turn * 25
        assert samples[0] == pytest.approx([4e-3 / 8] * 25)
        assert samples[1] == pytest.approx([1e-3 / 2] * 25)

    def test_summary_and_rates(self):
        summary = timing.microseconds([3e-6, 1e-6, 2e-6])
        assert summary == pytest.approx(
            {"median": 2.0, "p10": 1.2, "p90": 2.8, "count": 3, "min": 1.0}
        )
        rates = timing.rates(2e-6, 4_000_000, 2.5e12)
        assert rates == pytest.approx({"gigabytes_per_second": 2000.0, "share_of_copy": 0.8})


class TestBudget:
    def test_learns_what_a_unit_takes(self):
        now = [100.0]
        budget = Budget(50, lambda: now[0])
        assert budget.fits("plain")
        for _ in range(20):
            budget.spent("plain", 30.0)
        assert budget.fits("plain")
        assert not budget.fits("plain", reserved=21.0)
        now[0] = 121.0
        assert not budget.fits("plain")
        assert budget.fits("compiled")
        now[0] = 200.0
        assert budget.left() == 0.0


def timed_record(provider=OURS, mode=COLD, us=10.0, share=0.9, ratio=20.0, **axes):
    case = Case(SAMPLE, **axes)
    return {
        **case.record(), "provider": provider, "mode": mode, "graph": provider != TRANSFORMERS,
        "microseconds": {"median": us}, "share_of_copy": share, "gigabytes_per_second": 1234.0,
        "time_over_ours": {"median": ratio},
    }  # fmt: skip


DEVICE = "NVIDIA Test 1"


def verdict(records, part):
    """Of the target that begins so, or of the only one that has this in it."""
    judged = verdicts(records, DEVICE)
    starting = [v for v in judged if v.target.startswith(part)]
    [found] = starting or [v for v in judged if part in v.target]
    return found


class TestTargets:
    def test_nothing_measured(self):
        judged = verdicts([], DEVICE)
        assert [v.met for v in judged] == [None] * 14
        assert str(judged[0]) == (
            "not measured: B=256, V=128,256, top_p: at least 70% of copy bandwidth"
        )

    @pytest.mark.parametrize(
        ("provider", "whose", "filters", "least"),
        [(OURS, "", "top_p", 0.70), (OURS, "", "none", 0.85), (CUDA, "cuda: ", "top_p", 0.75)],
    )
    def test_copy_share(self, provider, whose, filters, least):
        part = f"{whose}B=256, V=128,256, {filters}: at least"
        good = timed_record(provider, share=least, filters=filters)
        assert verdict([good], part).met is True
        assert verdict([{**good, "share_of_copy": least - 0.001}], part).met is False
        for other in ({"kind": "flat"}, {"batch_size": 64}, {"vocab_size": 32_000}):
            elsewhere = timed_record(provider, share=0.1, filters=filters, **other)
            assert verdict([elsewhere], part).met is None
        assert verdict([{**good, "mode": WARM}], part).met is None
        assert verdict([{**good, "provider": EAGER}], part).met is None

    @pytest.mark.parametrize(("provider", "most"), [(OURS, 12.0), (CUDA, 8.0)])
    def test_batch_1(self, provider, most):
        part = f"under {most:.0f} us"
        good = [timed_record(provider, us=most - 0.1, batch_size=1, filters=f, mode=m)
                for f in FILTERS for m in (COLD, SINGLE)]  # fmt: skip
        assert verdict(good, part).met is True
        slow = verdict([*good[:-1], {**good[-1], "microseconds": {"median": most}}], part)
        assert slow.met is False
        assert slow.measured == (
            f"at worst {most:.0f} us, peaked top_k+top_p V=128,256 B=1, single; missed at 1 of 6"
        )
        others = [
            timed_record(provider, us=99.0, batch_size=8),
            timed_record(provider, us=99.0, batch_size=1, kind="flat"),
        ]
        assert verdict(good + others, part).met is True

    def test_the_default_is_never_the_slower_one(self, monkeypatch):
        """Only where the table has cuda: not beyond its rows, and not on another device."""
        part = "cuda: never slower than triton"
        slow = timed_record(CUDA, ratio=1.01, batch_size=64)
        verified = {**timed_record(CUDA, ratio=0.9, batch_size=8), "op": "verify", "positions": 5}
        assert verdict([slow, verified], part).met is None
        lines = (
            Choice(DEVICE, "sample", (128_256, 128_256), (1, 64), "cuda", "none"),
            Choice(DEVICE, "verify", (1, 2**19), (40, 40), "cuda", "none"),
        )
        monkeypatch.setattr(sys.modules[choose.__module__], "CHOICES", lines)
        missed = verdict([slow, verified], part)
        assert missed.met is False
        assert missed.measured.startswith("at worst 1.01x, sample peaked top_p V=128,256 B=64")
        assert verdict([verified], part).met is True
        assert verdict([timed_record(CUDA, ratio=9.0, batch_size=256)], part).met is None
        [other] = [v for v in verdicts([slow], "NVIDIA Other") if part in v.target]
        assert other.met is None

    @pytest.mark.parametrize(
        ("peer", "least", "part"), [(EAGER, 10.0, "eager chain"), (FLASHINFER, 2.0, "FlashInfer")]
    )
    def test_times_faster(self, peer, least, part):
        records = [timed_record(peer, ratio=least), timed_record(peer, ratio=99.0, kind="flat")]
        assert verdict(records, part).met is True
        records.append(timed_record(peer, ratio=least - 0.1, batch_size=8))
        missed = verdict(records, part)
        assert missed.met is False
        assert missed.measured.endswith("peaked top_p V=128,256 B=8; missed at 1 of 3")
        alone = {**timed_record(peer), "time_over_ours": None}
        assert verdict([alone], part).met is None
        assert verdict([timed_record(COMPILED, ratio=1.0)], part).met is None

    def test_flat(self):
        records = [timed_record(us=10.0), timed_record(us=25.0, kind="flat")]
        assert verdict(records, "flat logits").met is True
        records[1] = timed_record(us=25.1, kind="flat")
        assert verdict(records, "flat logits").met is False
        assert verdict(records[1:], "flat logits").met is None

    def test_first_times_of_ours_count(self):
        first, again = timed_record(share=0.9), timed_record(share=0.1)
        assert verdict([first, again], "B=256, V=128,256, top_p: at least").met is True

    @pytest.mark.parametrize(
        ("provider", "whose", "filters", "most"),
        [(OURS, "", "none", 1.05), (OURS, "", "top_p", 1.15), (CUDA, "cuda: ", "top_p", 1.05)],
    )
    def test_dram(self, provider, whose, filters, most):
        part = f"{whose}DRAM bytes read, {filters}"
        for ratio, met in ((most, True), (most + 0.001, False)):
            case = {"provider": provider, "filters": filters, "ratio": ratio}
            record = {"op": "profile", "cases": [case]}
            assert verdict([record], part).met is met
        assert verdict([{"op": "profile", "text": "not run"}], part).met is None

    @pytest.mark.parametrize(
        ("errors", "met"),
        [
            ({"memcheck": 0, "racecheck": 0, "initcheck": 0, "synccheck": 0}, True),
            ({"memcheck": 0, "racecheck": 2, "initcheck": None}, False),
            ({"memcheck": 0, "racecheck": None, "initcheck": 0}, None),
        ],
    )
    def test_sanitizers(self, errors, met):
        assert verdict([{"op": "sanitize", "errors": errors}], "memcheck").met is met


class TestReport:
    def test_markdown(self):
        records = [
            timed_record(us=12.34, share=0.745),
            timed_record(mode=WARM, us=5.6),
            timed_record(CUDA, ratio=0.875),
            timed_record(TRANSFORMERS, ratio=101.0),
            timed_record(COMPILED, ratio=7.7),
            timed_record(us=99.0, vocab_size=32_000),
            timed_record(us=98.0, kind="flat"),
            timed_record(us=97.0),  # again: beside the compiled chain
        ]
        page = report.markdown(
            records, {"device_name": "X9", "driver": "5"}, 3e12, verdicts([], "X9")
        )
        rows = [line for line in page.splitlines() if line.startswith("| 256")]
        assert rows == ["| 256, top_p | 12.3 | 5.60 | 1,234 | 74.5% | 0.88 | - | 7.70 | 101* | - |"]
        assert "`python -m benchmarks.gpu` on X9, driver 5" in page
        assert "3,000 GB/s" in page
        assert "- not measured: memcheck" in page


def test_slug():
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert slug("NVIDIA H200") == "h200"
    assert slug("Tesla T4/x") == "tesla-t4-x"
    assert slug("NVIDIA") == "unknown"


def test_first_line():
    assert first_line(RuntimeError("\none\ntwo")) == "RuntimeError: one"
    assert first_line(KeyError()) == "KeyError"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
class TestCommand:
    def test_no_device(self):
        with pytest.raises(NoDevice, match=r"^no CUDA device: torch .*\d"):
            find_device()
        result = CliRunner().invoke(self.app(), [])
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("benchmarks.gpu: no CUDA device: torch ")
        assert len(result.stderr.splitlines()) == 1

    def test_help(self):
        result = CliRunner().invoke(self.app(), ["--help"])
        assert result.exit_code == 0
        assert "--budget" in result.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--stage", "check,tiem"], "--stage must be among build, contract, check"),
            (["--vocab-sizes", "7"], "--vocab-sizes must be among 32000"),
        ],
    )
    def test_wrong_option(self, arguments, message):
        result = CliRunner().invoke(self.app(), arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("│", "").split())

    def test_options_reach_the_run(self, monkeypatch):
        given = []

        def run(*arguments):
            given.append(arguments)
            return 1

        monkeypatch.setattr(command, "find_device", CpuDevice)
        monkeypatch.setattr(command, "run", run)
        arguments = ["--stage", "time,check", "--batch-sizes", "8", "--workers", "2", "--no-plot"]
        assert CliRunner().invoke(self.app(), arguments).exit_code == 1
        [(_, options, budget)] = given
        assert options.stages == ("check", "time")
        assert options.output.name == "gpu-test-1-gb.jsonl"
        assert {unit.case.batch_size for unit in options.units} == {8}
        assert (options.workers, options.plot) == (2, False)
        assert 500 < budget.left() <= 540

    @staticmethod
    def app():
        import typer

        app = typer.Typer()
        app.command()(command.main)
        return app
