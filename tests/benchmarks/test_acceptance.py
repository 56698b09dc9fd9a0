"""benchmarks.acceptance: rounds, what should be kept, and whether coupled tokens are plain's."""

import math

import pytest

from benchmarks import acceptance
from benchmarks.acceptance import decode, full_rounds, overlap
from benchmarks.harness.trios import make_prompts
from proxytune_kernels import Speculation, Trio


def test_rounds_that_had_room():
    """Ten tokens, the first the prompt's; rounds of 3, 2, 1, 2, and one with room for a draft."""
    times = [0.0, 1, 1, 1, 2, 2, 3, 4, 4, 5]
    assert full_rounds(times, 2) == [3, 2, 1, 2]
    assert full_rounds(times, 0) == [3, 2, 1, 2, 1]
    assert full_rounds([0.0, 1.0], 4) == []


def test_rejection_keeps_what_the_overlap_says(trio):
    """One draft a round: kept as often as the mean overlap says, to 5 standard deviations."""
    prompts = make_prompts(trio, 16, 10)
    speculation = Speculation(mode="rejection", max_drafts=1, adaptive=False)
    found = decode(trio, prompts, 24, 1.0, speculation)
    texts = zip(prompts, found.token_ids, strict=True)
    mean = sum(overlap(trio, prompt, ids, 1.0) for prompt, ids in texts) / len(prompts)
    drafted, kept = found.counts["drafted"], found.counts["accepted"] / found.counts["drafted"]
    assert drafted > 150 and 0.05 < mean < 0.95
    assert abs(kept - mean) < 5 * math.sqrt(mean * (1 - mean) / drafted)


@pytest.fixture
def arguments(trio_directory, monkeypatch):
    monkeypatch.setattr(acceptance, "_PROMPT_LENGTH", 10)
    return (
        acceptance.main, "--trio", trio_directory, "--kinds", "text", "--drafts", "1,3",
        "--prompts", 3, "--tokens", 12,
    )  # fmt: skip


def test_command(records_of, arguments):
    records, _ = records_of(*arguments)
    assert [(r["drafter"], r["mode"], r["drafts"]) for r in records] == [
        (drafter, mode, drafts)
        for drafter in ("expert", "prompt_lookup")
        for mode in ("coupled", "rejection")
        for drafts in (1, 3)
    ]
    for record in records:
        assert (record["sequences"], record["tokens"]) == (3, 36)
        assert 0 <= record["accepted"] <= record["drafted"]
        assert record["equal"] == (3 if record["mode"] == "coupled" else None)


def test_coupled_tokens_that_are_others(run_command, arguments, tmp_path, monkeypatch):
    """Coupled runs of a trio whose small models are swapped have other tokens, and it is no tie."""

    def wrong(trio, prompts, max_tokens, temperature, speculation=None):
        if speculation is not None and speculation.mode == "coupled":
            trio = Trio.from_models(trio.base, trio.anti, trio.expert, trio.tokenizer)
        return decode(trio, prompts, max_tokens, temperature, speculation)

    monkeypatch.setattr(acceptance, "decode", wrong)
    result = run_command(*arguments, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 1
    assert "more than rounding" in result.output
    assert "not plain decoding's" in result.output
