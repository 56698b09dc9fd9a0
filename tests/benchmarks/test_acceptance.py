"""benchmarks.acceptance: which drafts were tried, and what they should come to."""

import json
import math

import pytest
import torch

from benchmarks import acceptance
from benchmarks.acceptance import (
    Row,
    Tried,
    decode,
    expected,
    looked_up,
    overlap,
    probabilities,
    tokens_per_round,
    tried_drafts,
)
from benchmarks.harness.trios import make_prompts
from proxytune_kernels import Speculation, Trio


def test_rounds_and_what_was_tried():
    """Two drafts a round: all kept, one kept, none kept, and a round that had room for one."""
    row = Row([7, 8], list(range(10)), [1, 3, 2, 1, 2, 1])
    assert row.rounds() == [(1, 3), (4, 2), (6, 1), (7, 2), (9, 1)]
    tried = tried_drafts(row, "expert", 2)
    assert [(t.position, t.accepted) for t in tried] == [
        (1, True), (2, True), (4, True), (5, False), (6, False), (7, True), (8, False),
    ]  # fmt: skip
    assert tokens_per_round([row], 2) == ((3 + 2 + 1 + 2) / 4, 4)
    assert math.isnan(tokens_per_round([Row([7], [1, 2], [1, 1])], 4)[0])


def test_looked_up_drafts_are_those_that_followed():
    """1 2 3 comes again: 4 5 followed; behind a 9 that never stood there nothing is drafted."""
    assert looked_up([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert looked_up([1, 2, 3, 4, 9], 2) == []
    row = Row([1, 2, 3, 4, 5, 1, 2], [3, 4, 6, 9, 0], [1, 2, 1, 1])
    tried = tried_drafts(row, "prompt_lookup", 3)
    assert tried == [Tried(1, True, 4), Tried(2, False, 5)]


def test_expected_is_arithmetic():
    found = expected([1.0, 0.5, 0.8, 0.2], 3)
    assert found["overlap"] == pytest.approx(2.5 / 4)
    # (1 - d) / (1 + d): 1, 1/3, 2/3 and 1/9.
    assert found["bound"] == pytest.approx((1 + 1 / 3 + 2 / 3 + 1 / 9) / 4)
    assert found["deviations"] == pytest.approx((3 - 2.5) / math.sqrt(0.25 + 0.16 + 0.16))
    assert expected([1.0], 1)["deviations"] is None
    rows = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.3, 0.6]])
    assert overlap(Tried(0, True, None), *rows) == pytest.approx(0.6)
    assert overlap(Tried(0, True, 2), *rows) == pytest.approx(0.2)


def test_rejection_keeps_what_the_overlaps_say(trio):
    """400 drafts of the expert: kept within 4 standard deviations of the sum of overlaps."""
    speculation = Speculation(mode="rejection", max_drafts=3, adaptive=False)
    overlaps, accepted = [], 0
    for row in decode(trio, make_prompts(trio, 16, 10), 24, 1.0, speculation):
        assert len(row.token_ids) == 24
        texts = probabilities(trio, row, 1.0)
        for tried in tried_drafts(row, "expert", 3):
            overlaps.append(overlap(tried, *texts))
            accepted += tried.accepted
    assert len(overlaps) > 200
    found = expected(overlaps, accepted)
    assert abs(found["deviations"]) < 4
    assert 0.05 < found["overlap"] < 0.95


@pytest.fixture
def arguments(trio_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(acceptance, "_PROMPT_LENGTH", 10)
    return (
        acceptance.main, "--trio", trio_directory, "--kinds", "text", "--drafts", "1,3",
        "--prompts", 3, "--tokens", 12, "--output", tmp_path / "out.jsonl",
    )  # fmt: skip


def test_command(run_command, arguments):
    result = run_command(*arguments)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in arguments[-1].read_text().splitlines()]
    assert [(r["drafter"], r["mode"], r["drafts"]) for r in records] == [
        (drafter, mode, drafts)
        for drafter in ("expert", "prompt_lookup")
        for mode in ("coupled", "rejection")
        for drafts in (1, 3)
    ]
    for record in records:
        assert (record["sequences"], record["tokens"]) == (3, 36)
        assert 0 <= record["accepted"] <= record["tried"]
        assert record["equal"] == (3 if record["mode"] == "coupled" else None)
        assert (record["expected"] is not None) == (record["drafts"] == 3 and record["tried"] > 0)
    assert "6/6" in result.output


def test_command_fails_where_coupled_tokens_are_others(run_command, arguments, monkeypatch):
    """Coupled runs of a trio whose small models are swapped have other tokens, and it is no tie."""

    def wrong(trio, prompts, max_tokens, temperature, speculation=None):
        if speculation is not None and speculation.mode == "coupled":
            trio = Trio.from_models(trio.base, trio.anti, trio.expert, trio.tokenizer)
        return decode(trio, prompts, max_tokens, temperature, speculation)

    monkeypatch.setattr(acceptance, "decode", wrong)
    result = run_command(*arguments)
    assert result.exit_code == 1
    assert "more than rounding" in result.output
    assert "not plain decoding's" in result.output
