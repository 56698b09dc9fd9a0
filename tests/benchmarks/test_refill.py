"""benchmarks.refill on a tiny trio: loads, slot-steps, and what is counted."""

import math
from collections import Counter

import pytest

from benchmarks import refill
from benchmarks.refill import Usage, draw_lengths, record_of, run, useful_at_best
from proxytune_kernels import Decoder, SamplingParams


def test_lengths_are_log_uniform_and_repeat():
    """Each length as often as the law says, the first and the last too: 5 standard deviations."""
    lengths = draw_lengths(20_000, 4, 8, 3)
    assert lengths == draw_lengths(20_000, 4, 8, 3) != draw_lengths(20_000, 4, 8, 4)
    for column in zip(*lengths, strict=True):
        for n in range(4, 9):
            share = math.log((n + 0.5) / (n - 0.5)) / math.log(8.5 / 3.5)
            deviation = math.sqrt(20_000 * share * (1 - share))
            assert abs(column.count(n) - 20_000 * share) < 5 * deviation


def test_records_are_arithmetic():
    """20 tokens: refilled in 2 s, in batches in 5 s."""
    rows, counts = [[1] * 12, [1] * 8], Counter(slot_steps=40, useful_slot_steps=18)
    record = record_of("refilled", [Usage(2.0, counts, rows)], [Usage(5.0, counts, rows)])
    assert record["useful"] == pytest.approx(18 / 40)
    assert record["tokens_per_second"]["median"] == pytest.approx(10)
    assert record["speed_over_batches"]["median"] == pytest.approx(2.5)


def test_useful_at_best():
    # Two slots: 4 and 1 steps, then 2 more behind the 1; 7 of 2 x 4.
    assert useful_at_best([5, 2, 3], 2) == pytest.approx(7 / 8)
    assert useful_at_best([5], 2) == 0.5
    assert math.isnan(useful_at_best([1, 1], 2))


def test_counts_of_a_refilled_load_and_of_batches(trio):
    """Prompts of three tokens, outputs of 7, 3, 2 and 2; two slots: 6 steps, 2 + 1 + 1 beside."""
    load = [
        ([5 + i] * 3, SamplingParams(seed=i, max_tokens=n, ignore_eos=True))
        for i, n in enumerate((7, 3, 2, 2))
    ]
    decoder = Decoder(trio, 2, 32)
    usage = run(decoder, load, 4)
    # A prompt runs between two steps, so a slot is never left out of one.
    assert (usage.counts["base_forwards"], usage.counts["slot_steps"]) == (6, 12)
    assert usage.useful == pytest.approx(10 / 12)
    assert [len(row) for row in usage.token_ids] == [7, 3, 2, 2]
    # Another run is counted by itself. Batches take 6 steps for two requests, 1 for the others.
    batches = run(decoder, load, 2)
    assert batches.counts["slot_steps"] == 14
    assert batches.token_ids == usage.token_ids


def test_command(run_command, records_of, trio_directory):
    (own, batches), _ = records_of(
        refill.main, "--trio", trio_directory, "--requests", 9, "--slots", 3, "--shortest", 2,
        "--longest", 16, "--repeats", 2,
    )  # fmt: skip
    assert [r["provider"] for r in (own, batches)] == ["refilled", "batches"]
    outputs = [output for _, output in draw_lengths(9, 2, 16, 0)]
    for record in (own, batches):
        assert record["tokens"] == sum(outputs)
        assert record["useful_slot_steps"] == sum(outputs) - 9
        assert record["slot_steps"] == 3 * record["base_forwards"]
        assert (record["repeats"], record["differing"]) == (2, 0)
    assert batches["useful"] < own["useful"] <= own["useful_at_best"]
    assert own["useful_at_best"] == pytest.approx(useful_at_best(outputs, 3))
    result = run_command(refill.main, "--shortest", 5, "--longest", 4)
    assert "--longest must be at least --shortest 5, got 4" in " ".join(result.output.split())
