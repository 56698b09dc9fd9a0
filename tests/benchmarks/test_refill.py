"""benchmarks.refill on a tiny trio: loads, slot-steps, and what is counted when."""

import json
import math
from collections import Counter
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import refill
from benchmarks.refill import WAYS, Settings, draw_lengths, make_load, records_of
from benchmarks.slots import Load, Usage, decode, decode_in_batches, useful_at_best
from proxytune_kernels import Decoder, SamplingParams


def load_of(outputs, trio, length=3):
    params = [SamplingParams(seed=i, max_tokens=n, ignore_eos=True) for i, n in enumerate(outputs)]
    return Load([[5 + i] * length for i in range(len(outputs))], params)


def test_lengths_are_log_uniform_and_repeat():
    """Each length as often as the law says, the first and the last too: 5 standard deviations."""
    settings = Settings("tiny", None, 20_000, 8, 4, 8, 0, 1)
    lengths = draw_lengths(settings, 3)
    assert lengths == draw_lengths(settings, 3)
    assert lengths != draw_lengths(settings, 4)
    for column in zip(*lengths, strict=True):
        assert set(column) == set(range(4, 9))
        for n in range(4, 9):
            share = math.log((n + 0.5) / (n - 0.5)) / math.log(8.5 / 3.5)
            deviation = math.sqrt(20_000 * share * (1 - share))
            assert abs(column.count(n) - 20_000 * share) < 5 * deviation


def test_records_are_arithmetic(trio):
    """20 tokens: refilled in 2 s, a quarter of it prompts, the tail from 1.5 s; batches in 5 s."""
    load = load_of([12, 8], trio)
    counts = Counter(slot_steps=40, useful_slot_steps=18)
    queued = Counter(slot_steps=10, useful_slot_steps=8)
    refilled = Usage(2.0, 0.5, counts, queued, 1.5, [])
    batches = Usage(5.0, 0.5, Counter(slot_steps=60, useful_slot_steps=18), Counter(), 0.0, [])
    usages = {"refilled": [refilled], "longest first": [refilled], "batches": [batches]}
    busy: dict[str, Any] = {way: [way] for way in WAYS}
    own, _, other = records_of(load, usages, busy)
    assert own["useful"] == pytest.approx(18 / 40)
    assert own["useful_while_queued"] == pytest.approx(0.8)
    assert own["idle_in_tail"] == pytest.approx(20 / 40)
    assert own["tail_seconds_share"]["median"] == pytest.approx(0.25)
    assert own["prefill_share"]["median"] == pytest.approx(0.25)
    assert own["tokens_per_second"]["median"] == pytest.approx(10)
    assert own["speed_over_batches"]["median"] == pytest.approx(2.5)
    assert other["useful"] == pytest.approx(18 / 60)
    assert (own["busy"], other["busy"]) == (["refilled"], ["batches"])


def test_load_is_what_was_drawn(trio):
    settings = Settings("tiny", None, 5, 2, 2, 20, 7, 1)
    load = make_load(trio, settings)
    sizes = zip(load.prompts, load.params, strict=True)
    assert [(len(p), q.max_tokens) for p, q in sizes] == draw_lengths(settings, 7)
    assert all(q.ignore_eos for q in load.params)
    assert len({q.seed for q in load.params}) == 5


def test_longest_first_keeps_pairs(trio):
    load = load_of([3, 9, 5], trio)
    ordered = load.longest_first()
    assert [q.max_tokens for q in ordered.params] == [9, 5, 3]
    assert [p[0] for p in ordered.prompts] == [6, 7, 5]
    assert ordered.tokens == load.tokens == 17


def test_useful_at_best():
    # Two slots: 4 and 1 steps, then 2 more behind the 1; 7 of 2 x 4.
    assert useful_at_best([5, 2, 3], 2) == pytest.approx(7 / 8)
    assert useful_at_best([5, 5], 2) == 1.0
    assert useful_at_best([5], 2) == 0.5
    assert math.isnan(useful_at_best([1, 1], 2))


def test_counts_of_a_refilled_load(trio):
    """Two slots, 6 steps and 2 + 1 + 1 beside them; the last request's begins after 4 steps."""
    busy: list[int] = []
    load = load_of([7, 3, 2, 2], trio)
    decoder = Decoder(trio, 2, 32)
    usage = decode(decoder, load, busy)
    # A prompt runs between two steps, so a slot is never left out of one.
    assert usage.counts["base_forwards"] == 6
    assert usage.counts["slot_steps"] == 12
    assert usage.counts["useful_slot_steps"] == 10
    assert usage.useful(usage.counts) == pytest.approx(10 / 12)
    assert usage.queued["slot_steps"] == 6
    assert usage.useful(usage.queued) == 1.0
    assert busy == [2, 2, 2, 2, 1, 1]
    assert [len(row) for row in usage.token_ids] == [7, 3, 2, 2]
    assert 0 < usage.prefill_seconds < usage.seconds
    assert usage.prefill_seconds < usage.queued_seconds < usage.seconds
    # Another run is counted by itself.
    assert decode(decoder, load).counts == usage.counts


def test_counts_of_batches(trio):
    """The same in batches: 6 steps for the first two requests, 1 for the others."""
    busy: list[int] = []
    load = load_of([7, 3, 2, 2], trio)
    usage = decode_in_batches(Decoder(trio, 2, 32), load, 2, busy)
    assert usage.counts["slot_steps"] == 14
    assert usage.counts["useful_slot_steps"] == 10
    assert busy == [2, 2, 1, 1, 1, 1, 2]
    assert usage.token_ids == decode(Decoder(trio, 2, 32), load).token_ids


def test_prefill_is_timed_apart(trio, monkeypatch):
    """With a clock that only prompts move, all the time is prefill; with one for steps, none."""
    for method, share in (("prefill", 1.0), ("forward", 0.0)):
        decoder = Decoder(trio, 2, 32)
        clock = [0.0]
        right = getattr(decoder._runner, method)

        def slow(*arguments, right=right, clock=clock, **keywords):
            clock[0] += 1.0
            return right(*arguments, **keywords)

        monkeypatch.setattr(decoder._runner, method, slow)
        monkeypatch.setattr("benchmarks.slots.time.perf_counter", lambda clock=clock: clock[0])
        usage = decode(decoder, load_of([7, 3, 2, 2], trio))
        assert usage.seconds > 2
        assert usage.prefill_seconds / usage.seconds == share


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(refill.main)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_command(command, trio_directory, tmp_path):
    output = tmp_path / "out.jsonl"
    result = command(
        "--trio", trio_directory, "--requests", 9, "--slots", 3, "--shortest", 2, "--longest", 16,
        "--repeats", 2, "--output", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    records = {r["provider"]: r for r in map(json.loads, output.read_text().splitlines())}
    assert list(records) == ["refilled", "longest first", "batches"]
    lengths = draw_lengths(Settings("", None, 9, 3, 2, 16, 0, 1), 0)
    outputs = [output for _, output in lengths]
    for record in records.values():
        assert record["tokens"] == sum(outputs)
        assert record["useful_slot_steps"] == sum(record["busy"]) == sum(outputs) - 9
        assert record["slot_steps"] == 3 * record["base_forwards"] == 3 * len(record["busy"])
        assert record["repeats"] == 2
        assert record["differing"] == 0
    own = records["refilled"]
    idle = own["slot_steps"] - own["useful_slot_steps"]
    queued = own["slot_steps_while_queued"] * (1 - own["useful_while_queued"])
    assert own["idle_in_tail"] == pytest.approx((idle - queued) / own["slot_steps"])
    # Prompts that wait for one another cost a few slot-steps; batches waste more.
    assert records["batches"]["useful"] < own["useful"] <= own["useful_at_best_here"]
    assert own["useful_at_best_here"] == pytest.approx(useful_at_best(outputs, 3))
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    verdict = "met" if own["useful"] >= 0.9 else "missed"
    assert f"target 90%: {verdict}" in result.output


def test_wrong_lengths(command):
    result = command("--shortest", 5, "--longest", 4)
    assert result.exit_code == 2
    assert "--longest must be at least --shortest 5, got 4" in " ".join(result.output.split())
