"""The parts of ``python -m benchmarks.gpu`` that need no GPU: plan, times, options."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
import typer
from typer.testing import CliRunner

import benchmarks.gpu.__main__ as command
import proxytune_kernels as ptk
from benchmarks.gpu import report, timing
from benchmarks.gpu.cases import BATCH_SIZES, Case, fits, make_inputs, plan, sets_needed
from benchmarks.gpu.device import first_line, slug
from benchmarks.gpu.session import Budget, Journal, Outcome
from benchmarks.gpu.timing import Timed
from benchmarks.harness.logits import FILTERS, KINDS, VOCAB_SIZES

BACKEND = "cpu" if ptk.backends()["cpu"] is None else "reference"
PLAIN = ("ours", "cuda", "eager", "transformers", "flashinfer")
DEVICE = "NVIDIA Test 1"


class TestPlan:
    def test_every_shape_has_the_peers_that_targets_name(self):
        timed = {unit.case for unit in plan() if set(PLAIN) <= set(unit.providers)}
        wanted = product(KINDS, FILTERS, VOCAB_SIZES, BATCH_SIZES)
        assert timed == {Case("sample", *axes) for axes in wanted}
        for op in ("verify", "verify-rejection"):
            assert {unit.case.positions for unit in plan() if unit.case.op == op} == {5, 9}

    def test_targets_first_compiling_last(self):
        units = plan()
        first = [unit.case for unit in units[:12]]
        assert first[0] == Case("sample", "peaked", "top_p", 128_256, 256)
        assert {(c.vocab_size, c.kind) for c in first} == {(128_256, "peaked")}
        first_compiled = next(i for i, unit in enumerate(units) if unit.compiles)
        assert max(i for i, u in enumerate(units) if u.providers == PLAIN) < first_compiled

    def test_nothing_is_timed_twice_but_ours(self):
        pairs = Counter((unit.case, name) for unit in plan() for name in unit.providers)
        assert {name for (_, name), count in pairs.items() if count > 1} == {"ours"}
        for unit in plan():
            drawn = unit.case.op in ("sample", "verify", "verify-rejection") and not unit.compiles
            assert ("cuda" in unit.providers) == drawn and "ours" in unit.providers

    def test_selection(self):
        units = plan(("ours", "eager"), [32_000], [1, 8])
        assert {(u.case.vocab_size, u.case.batch_size) for u in units} == {(32_000, 1), (32_000, 8)}
        assert {unit.providers for unit in units} == {("ours", "eager")}
        assert Counter(unit.case for unit in units).most_common(1)[0][1] == 1


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
        case = Case("verify", vocab_size=500, batch_size=3, positions=3)
        assert case.logits_bytes == 3 * 9 * 500 * 2
        one, other = make_inputs(case, 2, "cpu", BACKEND)
        again, _ = make_inputs(case, 2, "cpu", BACKEND)
        assert [(x.shape, x.dtype) for x in one.logits] == [((9, 500), torch.bfloat16)] * 3
        assert not torch.equal(one.logits[0], other.logits[0])
        assert torch.equal(one.logits[2], again.logits[2])
        expert = one.logits[1].view(3, 3, 500)
        for j in range(2):
            params = case.params("cpu")._replace(position=torch.full((3,), j))
            assert torch.equal(
                one.token_ids[:, j], ptk.sample(expert[:, j], params=params).token_ids
            )
        rejection, _ = make_inputs(replace(case, op="verify-rejection"), 2, "cpu", BACKEND)
        assert not torch.equal(rejection.token_ids, one.token_ids)


def test_calls_in_a_graph_and_repeats():
    assert timing.calls_in_run(1e-3, 3, "cold") == 6  # 4 ms, every set as often
    assert timing.calls_in_run(1.0, 3, "cold") == 3
    assert timing.calls_in_run(1e-3, 1, "warm") == 4
    assert timing.calls_in_run(1e-9, 1, "warm") == 64
    assert timing.calls_in_run(1e-9, 5, "single") == 1
    assert [timing.repeats(seconds) for seconds in (100.0, 0.05, 1e-6)] == [5, 10, 25]
    case = Case(vocab_size=1000, batch_size=1)
    assert timing.modes(case, 6_000) == ("cold", "warm", "single")
    assert timing.modes(replace(case, batch_size=8), 48_000) == ("cold", "warm")
    assert timing.modes(case, 5_999) == ("cold",)


def test_records_are_paired_by_repeat_and_mode():
    case = Case(vocab_size=1000, batch_size=1)
    run = lambda: None  # noqa: E731
    names = (("ours", "cold"), ("ours", "warm"), ("eager", "cold"))
    timed = [Timed(name, mode, run, 4, {"graph": True}) for name, mode in names]
    samples = [[1e-6, 4e-6, 2e-6], [1e-6] * 3, [30e-6, 80e-6, 20e-6]]
    ours, warm, eager = timing.records(case, timed, samples, 6e9, checked=True)
    assert ours["microseconds"] == pytest.approx(
        {"median": 2.0, "p10": 1.2, "p90": 3.6, "count": 3, "min": 1.0}
    )
    assert (ours["gigabytes_per_second"], ours["share_of_copy"]) == pytest.approx((3.0, 0.5))
    # 30, 20 and 10 times; not the 15 of the medians
    assert eager["time_over_ours"]["median"] == pytest.approx(20.0)
    assert warm["time_over_ours"]["median"] == 1.0
    alone = timing.records(case, timed[2:], samples[2:], 6e9, checked=False)
    assert (alone[0]["time_over_ours"], alone[0]["checked"]) == (None, False)


def test_a_budget_learns_what_a_unit_takes():
    now = [100.0]
    budget = Budget(50, lambda: now[0])
    for _ in range(20):
        with budget.spending("plain"):
            now[0] += 30.0
        now[0] -= 30.0
    assert budget.fits("plain")
    assert not budget.fits("plain", reserved=21.0)
    now[0] = 121.0
    assert not budget.fits("plain")
    assert budget.fits("compiled")
    now[0] = 200.0
    assert budget.left() == 0.0


def test_what_fails_is_kept_in_the_journal(tmp_path):
    journal = Journal(tmp_path / "gpu.jsonl", {"device_name": DEVICE, "driver": "5"})
    journal.outcome("build", Outcome("Built.", fields={"built": True}))
    with journal.guarded("fine"):
        pass
    assert not journal.failed
    journal.note("wrong", failed=True)
    page = "page"
    journal.conclude(page, lambda path: path.touch())
    assert journal.failed
    lines = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"built": true' in lines[0] and f'"{DEVICE}"' in lines[1]
    assert (tmp_path / "gpu.md").read_text() == "page"
    assert (tmp_path / "gpu.png").exists()


def timed_record(provider="ours", mode="cold", us=10.0, share=0.9, ratio=20.0, **axes):
    return {
        **Case("sample", **axes).record(), "provider": provider, "mode": mode,
        "graph": provider != "transformers", "microseconds": {"median": us},
        "share_of_copy": share, "gigabytes_per_second": 1234.0, "time_over_ours": {"median": ratio},
    }  # fmt: skip


def test_table_page_and_picture(tmp_path, capsys):
    records = [
        timed_record(us=12.34, share=0.745),
        timed_record(mode="warm", us=5.6),
        timed_record("cuda", ratio=0.875),
        timed_record("transformers", ratio=101.0),
        timed_record("torch.compile", ratio=7.7),
        timed_record(us=99.0, vocab_size=32_000),
        timed_record(us=98.0, kind="flat"),
        timed_record(us=97.0),  # again: beside the compiled chain
    ]
    page = report.markdown(records, 3e12, "X9, driver 5")
    rows = [line for line in page.splitlines() if line.startswith("| 256")]
    assert rows == ["| 256, top_p | 12.3 | 5.60 | 1,234 | 74.5% | 0.88 | - | 7.70 | 101* | - |"]
    assert "`python -m benchmarks.gpu` on X9, driver 5" in page and "3,000 GB/s" in page
    report.print_times(records, 3e12, "X9")
    shown = capsys.readouterr().out
    assert "sample, flat, V=128,256" in shown and "B=256 top_p" in shown and "101*" in shown
    pytest.importorskip("matplotlib")
    report.draw(records, tmp_path / "times.png", "title")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_names():
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert (slug("Tesla T4/x"), slug("NVIDIA")) == ("tesla-t4-x", "unknown")
    assert first_line(RuntimeError("\none\ntwo")) == "RuntimeError: one"
    assert first_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "benchmarks.gpu: no CUDA device: torch "),
        (["--decoder"], "benchmarks.gpu: no CUDA device: torch "),
        (["--stage", "check,tiem"], "--stage must be among build, contract, check"),
        (["--vocab-sizes", "7"], "--vocab-sizes must be among 32000"),
        (["--decoder", "--batch-sizes", "8"], "--batch-sizes must be among 1, 4, 16"),
        (["--decoder", "--workers", "2"], "--workers does not go with --decoder"),
        (["--trios", "13b"], "--trios goes with --decoder only"),
    ],
)
def test_command(monkeypatch, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", "").split())
