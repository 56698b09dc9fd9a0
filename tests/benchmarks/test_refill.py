"""benchmarks.refill on a tiny trio: loads, slot-steps, and what is counted when."""

import json
import math
from collections import Counter

import pytest

from benchmarks import refill
from benchmarks.refill import (
    Settings,
    Usage,
    decode,
    decode_in_batches,
    draw_lengths,
    longest_first,
    record_of,
    useful,
    useful_at_best,
)
from proxytune_kernels import Decoder, SamplingParams

# Prompts of three tokens, outputs of 7, 3, 2 and 2.
LOAD = [
    ([5 + i] * 3, SamplingParams(seed=i, max_tokens=n, ignore_eos=True))
    for i, n in enumerate((7, 3, 2, 2))
]


def test_lengths_are_log_uniform_and_repeat():
    """Each length as often as the law says, the first and the last too: 5 standard deviations."""
    settings = Settings("tiny", 20_000, 8, 4, 8, 0, 1)
    lengths = draw_lengths(settings, 3)
    assert lengths == draw_lengths(settings, 3) != draw_lengths(settings, 4)
    for column in zip(*lengths, strict=True):
        for n in range(4, 9):
            share = math.log((n + 0.5) / (n - 0.5)) / math.log(8.5 / 3.5)
            deviation = math.sqrt(20_000 * share * (1 - share))
            assert abs(column.count(n) - 20_000 * share) < 5 * deviation


def test_records_are_arithmetic():
    """20 tokens: refilled in 2 s, a quarter of it prompts, the tail from 1.5 s; batches in 5 s."""
    rows = [[1] * 12, [1] * 8]
    counts = Counter(slot_steps=40, useful_slot_steps=18)
    queued = Counter(slot_steps=10, useful_slot_steps=8)
    own = [Usage(2.0, 0.5, counts, queued, 1.5, [], rows)]
    batches = [Usage(5.0, 0.5, counts, Counter(), 0.0, [], rows)]
    record = record_of("refilled", own, batches)
    assert record["useful"] == pytest.approx(18 / 40)
    assert record["useful_while_queued"] == pytest.approx(0.8)
    assert record["idle_in_tail"] == pytest.approx(20 / 40)
    assert record["tail_seconds_share"]["median"] == pytest.approx(0.25)
    assert record["tokens_per_second"]["median"] == pytest.approx(10)
    assert record["prefill_share"]["median"] == pytest.approx(0.25)
    assert record["speed_over_batches"]["median"] == pytest.approx(2.5)
    assert "speed_over_batches" not in record_of("batches", batches, batches)


def test_useful_at_best():
    # Two slots: 4 and 1 steps, then 2 more behind the 1; 7 of 2 x 4.
    assert useful_at_best([5, 2, 3], 2) == pytest.approx(7 / 8)
    assert useful_at_best([5], 2) == 0.5
    assert math.isnan(useful_at_best([1, 1], 2))


def test_counts_of_a_refilled_load_and_of_batches(trio):
    """Two slots: 6 steps and 2 + 1 + 1 beside them, the last request's from the fourth on."""
    decoder = Decoder(trio, 2, 32)
    usage = decode(decoder, LOAD)
    # A prompt runs between two steps, so a slot is never left out of one.
    assert (usage.counts["base_forwards"], usage.counts["slot_steps"]) == (6, 12)
    assert useful(usage.counts) == pytest.approx(10 / 12)
    assert usage.queued["slot_steps"] == 6
    assert useful(usage.queued) == 1.0
    assert usage.busy == [2, 2, 2, 2, 1, 1]
    assert [len(row) for row in usage.token_ids] == [7, 3, 2, 2]
    assert 0 < usage.prefill_seconds < usage.queued_seconds < usage.seconds
    # Another run is counted by itself. Batches take 6 steps for two requests, 1 for the others.
    batches = decode_in_batches(decoder, LOAD, 2)
    assert batches.counts["slot_steps"] == 14
    assert batches.busy == [2, 2, 1, 1, 1, 1, 2]
    assert batches.token_ids == usage.token_ids
    assert [params.max_tokens for _, params in longest_first(LOAD[::-1])] == [7, 3, 2, 2]


def test_command(run_command, trio_directory, tmp_path):
    output = tmp_path / "out.jsonl"
    result = run_command(
        refill.main, "--trio", trio_directory, "--requests", 9, "--slots", 3, "--shortest", 2,
        "--longest", 16, "--repeats", 2, "--output", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    own, first, batches = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["provider"] for r in (own, first, batches)] == [
        "refilled", "longest first", "batches",
    ]  # fmt: skip
    outputs = [output for _, output in draw_lengths(Settings("", 9, 3, 2, 16, 0, 1), 0)]
    for record in (own, first, batches):
        assert record["tokens"] == sum(outputs)
        assert record["useful_slot_steps"] == sum(record["busy"]) == sum(outputs) - 9
        assert record["slot_steps"] == 3 * record["base_forwards"] == 3 * len(record["busy"])
        assert (record["repeats"], record["differing"]) == (2, 0)
    assert batches["useful"] < own["useful"] <= own["useful_at_best_here"]
    assert own["useful_at_best_here"] == pytest.approx(useful_at_best(outputs, 3))
    assert f"Useful: {own['useful']:.1%}" in result.output
    result = run_command(refill.main, "--shortest", 5, "--longest", 4)
    assert "--longest must be at least --shortest 5, got 4" in " ".join(result.output.split())
