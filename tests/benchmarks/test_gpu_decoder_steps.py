"""Step times of the decoder's modes: from events to records, verdicts and a table."""

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.decoder import modes as decoder_modes
from benchmarks.gpu.decoder import report
from benchmarks.gpu.decoder.modes import (
    BASE_ONLY,
    DRAFTS,
    MODES,
    NAIVE,
    ONE_STREAM,
    OURS,
    SEPARATE,
    SHARED,
    SHARED_PAIR,
    modes,
    speculative,
)
from benchmarks.gpu.decoder.random_models import byte_tokenizer, random_model
from benchmarks.gpu.decoder.shapes import ModelShape
from benchmarks.gpu.decoder.steps import ModeTimes, intervals, records, time_modes
from benchmarks.gpu.decoder.targets import verdicts
from benchmarks.providers import Generation
from proxytune_kernels import Decoder, Trio

TINY = ModelShape(32, 48, 2, 4, 2, vocab_size=300, context=128)
DEVICE = {"device_name": "X9", "driver": "5"}


class TestIntervals:
    def test_plain_steps_of_two_rows(self):
        times = [[1.0, 1.5, 3.0], [1.0, 2.0, 2.25]]
        assert intervals(Generation([[0] * 3] * 2, times), 0) == [0.5, 1.5, 1.0, 0.25]

    def test_a_round_gives_several_tokens_at_once(self):
        # The first token is the prompt's. Rounds of 2 drafts: after 1, 3, 4 and 7 tokens of 9; the
        # last begins with 2 tokens left, and would have drafted 1.
        times = [1.0, 2.0, 2.0, 4.0, 7.0, 7.0, 7.0, 11.0, 11.0]
        assert intervals(Generation([[0] * 9], [times]), 2) == [1.0, 2.0, 3.0]
        # of 6 tokens left, 5 can be drafted and one more drawn
        assert intervals(Generation([[0] * 9], [times]), 5) == [1.0, 2.0]
        assert intervals(Generation([[0] * 9], [times]), 8) == []


class Scripted:
    """Decodes steps that last as long as it was told, one call after the other."""

    set_up_seconds = 0.5
    trio: Any = None
    roles: tuple[str, ...] = ("base",)

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, list(seconds), log

    def generate(self, prompts, max_tokens, *, greedy=False):
        self.log.append(self.name)
        step = self.seconds.pop(0)
        times = [1.0 + step * i for i in range(max_tokens)]
        return Generation([[0] * max_tokens] * len(prompts), [times] * len(prompts))


class Weights:
    """Stands for models that have so many bytes."""

    def __init__(self, count):
        self.count = count


@pytest.fixture
def scripted(monkeypatch):
    """Modes with given step times, and models of a given size."""
    from benchmarks.gpu.decoder import steps

    monkeypatch.setattr(steps, "step_bytes", lambda models: sum(m.count for m in models))
    log: list[str] = []

    def make(**seconds):
        named = {name.replace("_", "-"): values for name, values in seconds.items()}
        timed = [
            ModeTimes(MODES[name], Scripted(name, values, log), [Weights(10), Weights(20)])
            for name, values in named.items()
        ]
        return timed, log

    return make


class TestRecords:
    def test_in_turns(self, scripted):
        timed, log = scripted(naive=[0.03] * 2, ours=[0.02] * 2)
        assert time_modes(timed, [[1]], 4, 2) == {NAIVE: {}, OURS: {}}
        assert log == [NAIVE, OURS, NAIVE, OURS]

    def test_one_line_a_mode(self, scripted):
        timed, _ = scripted(
            naive=[0.06, 0.05],
            base_only=[0.010, 0.020],
            ours=[0.022, 0.040],
            ours_speculative_4=[0.033, 0.060],
        )
        time_modes(timed, [[1], [2]], 11, 2)
        lines = {line["mode"]: line for line in records(timed, 2, 11, 3000.0)}
        ours, four = lines[OURS], lines[speculative(4)]
        assert (ours["batch_size"], ours["repeats"], ours["drafts"]) == (2, 2, 0)
        assert ours["step_ms"]["median"] == pytest.approx(31.0)
        assert ours["mean_step_ms"]["median"] == pytest.approx(31.0)
        # 30 bytes at 3,000 a second
        assert ours["step_bytes"] == 30
        assert ours["floor_ms"] == pytest.approx(10.0)
        assert ours["step_over_floor"]["median"] == pytest.approx(3.1)
        # paired: 2.2 and 2.0, not 31 over 15
        assert ours["step_over_base_only"]["median"] == pytest.approx(2.1)
        assert ours["naive_over_step"]["median"] == pytest.approx((60 / 22 + 50 / 40) / 2)
        assert ours["break_even"] is None
        # the last token comes at 1.22 and 1.4 seconds
        assert ours["tokens_per_second"]["median"] == pytest.approx((22 / 1.22 + 22 / 1.4) / 2)
        assert (four["step_bytes"], four["floor_ms"], four["step_over_floor"]) == (None,) * 3
        assert four["step_over_ours"]["median"] == pytest.approx(1.5)
        # medians: 46.5 over 31 and over 15
        pays = four["break_even"]
        assert sum(pays[OURS] ** i for i in range(5)) == pytest.approx(46.5 / 31)
        assert sum(pays[BASE_ONLY] ** i for i in range(5)) == pytest.approx(46.5 / 15)

    def test_what_was_not_measured_is_none(self, scripted):
        timed, _ = scripted(ours_speculative_1=[0.05])
        time_modes(timed, [[1]], 9, 1)
        [line] = records(timed, 1, 9, 1.0)
        assert (line["step_over_base_only"], line["naive_over_step"]) == (None, None)
        assert line["break_even"] == {}

    def test_too_short_a_text(self, scripted):
        timed, _ = scripted(ours_speculative_8=[0.05])
        with pytest.raises(ValueError, match="ours-speculative-8: no whole step in 1 rows"):
            time_modes(timed, [[1]], 9, 1)


@pytest.fixture(scope="module")
def trios():
    base, expert, anti = (random_model(TINY, "cpu", seed) for seed in range(3))
    tokenizer = byte_tokenizer(300)
    trio = Trio.from_models(base, expert, anti, tokenizer)
    return {SEPARATE: trio, SHARED: Trio.from_models(base, anti, expert, tokenizer)}


class TestModes:
    def test_which_run_at_which_batch(self):
        assert modes(1) == list(MODES.values())
        assert [m.name for m in modes(4)] == [NAIVE, BASE_ONLY, OURS, SHARED_PAIR, speculative(4)]
        assert {m.drafts for m in modes(1)} == {0, *DRAFTS}
        assert all(m.options is None or m.name == BASE_ONLY or m.options["pair"] for m in modes(1))

    def test_options_reach_the_decoder(self, trios, monkeypatch):
        given = {}

        class Provider:
            def __init__(self, name, trio, **options):
                given[name] = (trio, options)
                self.decoder = SimpleNamespace(_runner=SimpleNamespace(_side="a stream"))

        monkeypatch.setattr(decoder_modes, "DecoderProvider", Provider)
        made: dict[str, Any] = {mode.name: mode.make(trios, 4, 80) for mode in MODES.values()}
        assert NAIVE not in given
        sides = {name: made[name].decoder._runner._side for name in given}
        assert sides == {name: None if name == ONE_STREAM else "a stream" for name in given}
        for name, (trio, options) in given.items():
            assert trio is trios[SHARED if name == SHARED_PAIR else SEPARATE]
            assert (options.pop("max_batch_size"), options.pop("max_seq_len")) == (4, 80)
            speculation = options.pop("speculation", None)
            assert (speculation is None) == (not MODES[name].drafts)
            if speculation is not None:
                assert (speculation.drafter, speculation.mode) == ("expert", "coupled")
                assert speculation.max_drafts == MODES[name].drafts
                assert not speculation.adaptive
            assert options == MODES[name].options

    def test_one_stream(self, trios):
        """What keeps the pair on the base's stream is not a public option: it has to be there."""
        assert "_side" in vars(Decoder(trios[SEPARATE], 1, 32)._runner)

    def test_naive_is_the_loop_over_all_roles(self, trios):
        assert MODES[NAIVE].make(trios, 1, 32).roles == ("base", "expert", "anti")
        assert MODES[BASE_ONLY].make(trios, 1, 32).roles == ("base",)


def decoded(mode, trio="13b", floor=1.05, base=2.0, batch_size=1, **others):
    return {
        "op": "decode", "trio": trio, "title": f"Llama {trio}", "mode": mode, "drafts": 0,
        "batch_size": batch_size, "step_ms": {"median": 12.34}, "step_bytes": 53_000_000_000,
        "floor_ms": 11.0, "step_over_floor": {"median": floor},
        "step_over_base_only": {"median": base}, "naive_over_step": {"median": 2.5},
        "break_even": None, **others,
    }  # fmt: skip


def verdict(records, part):
    [found] = [v for v in verdicts(records) if v.target.startswith(part)]
    return found


class TestTargets:
    def test_nothing_measured(self):
        judged = verdicts([])
        assert [v.met for v in judged] == [None] * 8
        assert str(judged[0]) == (
            "not measured: 13b, batch 1, ours: a step at most 1.10x its bytes' time"
        )

    @pytest.mark.parametrize("trio", ["13b", "70b"])
    @pytest.mark.parametrize("mode", [OURS, SHARED_PAIR])
    def test_step_over_bytes(self, trio, mode):
        part = f"{trio}, batch 1, {mode}: a step at most 1.10x"
        assert verdict([decoded(mode, trio, floor=1.10)], part).met is True
        missed = verdict([decoded(mode, trio, floor=1.101)], part)
        assert (missed.met, missed.measured) == (False, "1.101x")
        for other in (
            decoded(mode, trio, batch_size=4),
            decoded(NAIVE, trio),
            decoded(mode, "70b" if trio == "13b" else "13b"),
            decoded(mode, trio, step_over_floor=None),
        ):
            assert verdict([other], part).met is None

    @pytest.mark.parametrize(("mode", "most"), [(OURS, 2.15), (SHARED_PAIR, 1.65)])
    def test_over_base_only(self, mode, most):
        part = f"13b, batch 1, {mode}: at most {most}x the base alone"
        assert verdict([decoded(mode, base=most)], part).met is True
        assert verdict([decoded(mode, base=most + 0.001)], part).met is False
        assert verdict([decoded(mode, "70b", base=1.0)], part).met is None

    def test_idle(self):
        part = "no kernel runs in less than 3%"
        low = {"op": "trace", "trio": "13b", "idle_share": 0.0299}
        assert verdict([low], part).met is True
        assert verdict([{**low, "idle_share": 0.03}], part).met is False
        both = verdict([low, {**low, "trio": "70b", "idle_share": 0.05}], part)
        assert (both.met, both.measured) == (False, "5.00%, 70b")

    def test_synchronisation(self):
        part = "no host synchronisation"
        good = {"op": "synchronisation", "captured": True, "graphs": "1 captured", "raised": None}
        assert verdict([good], part).met is True
        raised = verdict([good, {**good, "raised": "RuntimeError: called a sync"}], part)
        assert (raised.met, raised.measured) == (False, "RuntimeError: called a sync")
        eager = verdict([{**good, "captured": False, "graphs": "none: old device"}], part)
        assert (eager.met, eager.measured) == (None, "steps are not captured: none: old device")


class TestReport:
    ROUND = decoded(
        speculative(4), drafts=4, step_bytes=None, floor_ms=None, step_over_floor=None,
        break_even={OURS: 0.1234, BASE_ONLY: None},
    )  # fmt: skip

    def test_cells(self):
        assert report.cells(decoded(OURS)) == [
            "ours", "12.3", "53.0", "1.05", "2.00", "2.50", "-", "-",
        ]  # fmt: skip
        assert report.cells(self.ROUND) == [
            "ours-speculative-4", "12.3", "-", "-", "2.00", "2.50", "12%", "never",
        ]  # fmt: skip
        alone = decoded(speculative(4), drafts=4, break_even={}, step_over_base_only=None)
        assert report.cells(alone)[4:] == ["-", "2.50", "-", "-"]

    def test_markdown(self):
        lines = [decoded(OURS), self.ROUND, decoded(OURS, batch_size=4), decoded(OURS, "70b")]
        sizes = {"base": 26_031_728_640, "shared pair": 13_556_785_152}
        weights = {"title": "Llama 13b", "bytes": sizes}
        page = report.markdown([weights], lines, DEVICE, 3e12, verdicts([]))
        assert "- Llama 13b: weights of base 26.0 GB, shared pair 13.6 GB." in page
        heads = [line for line in page.splitlines() if line.startswith("**")]
        assert heads == [
            "**Llama 13b, batch 1**", "**Llama 13b, batch 4**", "**Llama 70b, batch 1**",
        ]  # fmt: skip
        assert page.count("| ours | 12.3 | 53.0 | 1.05 | 2.00 | 2.50 | - | - |") == 3
        # beside batch 1 of each trio
        assert page.count("| the paper |  |  |  | 2.40 |  |  |  |") == 1
        assert page.count("| the paper |  |  |  | 1.50 |  |  |  |") == 1
        assert "3,000 GB/s" in page
        assert "`python -m benchmarks.gpu --decoder` on X9, driver 5" in page
        assert "- not measured: no host synchronisation" in page
        widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
        assert widths == {9}

    def test_table(self, capsys):
        report.print_modes([decoded(OURS), self.ROUND], DEVICE, 3e12)
        shown = capsys.readouterr().out
        assert "Llama 13b, batch 1" in shown
        for cell in ("ours-speculative-4", "12.3", "never", "2.40"):
            assert cell in shown
