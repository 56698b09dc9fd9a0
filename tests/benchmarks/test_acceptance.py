"""benchmarks.acceptance on a tiny trio: which drafts were tried, and what they should come to."""

import json
import math

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import acceptance
from benchmarks.drafts import (
    Row,
    Text,
    Tried,
    decode,
    expected,
    looked_up,
    text_of,
    tokens_per_round,
    tried_drafts,
)
from benchmarks.prompts import make_prompts
from proxytune_kernels import Decoder, SamplingParams, Speculation, Trio

TOKENS = 24


@pytest.fixture
def prompts(trio):
    return make_prompts(trio, 4, 10)


def test_rounds_and_what_was_tried():
    """Two drafts a round: all kept, one kept, none kept, and a round that had room for one."""
    row = Row([7, 8], list(range(10)), [1, 3, 2, 1, 2, 1])
    assert row.rounds() == [(1, 3), (4, 2), (6, 1), (7, 2), (9, 1)]
    tried = tried_drafts(row, "expert", 2)
    assert [(t.position, t.accepted) for t in tried] == [
        (1, True), (2, True), (4, True), (5, False), (6, False), (7, True), (8, False),
    ]  # fmt: skip
    assert {t.draft for t in tried} == {None}
    assert tokens_per_round([row], 2) == ((3 + 2 + 1 + 2) / 4, 4)
    short = Row([7], [1, 2], [1, 1])
    assert tried_drafts(short, "expert", 4) == []
    mean, rounds = tokens_per_round([short], 4)
    assert math.isnan(mean)
    assert rounds == 0


def test_looked_up_drafts_are_those_that_followed():
    """1 2 3 comes again: 4 5 followed; behind a 9 that never stood there nothing is drafted."""
    assert looked_up([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert looked_up([1, 2, 3, 4, 9], 2) == []
    row = Row([1, 2, 3, 4, 5, 1, 2], [3, 4, 6, 9, 0], [1, 2, 1, 1])
    tried = tried_drafts(row, "prompt_lookup", 3)
    assert tried == [Tried(1, True, 4), Tried(2, False, 5)]


def test_expected_is_arithmetic():
    drafts = [(Tried(i, i < 3, None), overlap) for i, overlap in enumerate((1.0, 0.5, 0.8, 0.2))]
    found = expected(drafts)
    assert found["overlap"] == pytest.approx(2.5 / 4)
    # (1 - d) / (1 + d): 1, 1/3, 2/3 and 1/9.
    assert found["bound"] == pytest.approx((1 + 1 / 3 + 2 / 3 + 1 / 9) / 4)
    assert found["deviations"] == pytest.approx((3 - 2.5) / math.sqrt(0.25 + 0.16 + 0.16))
    assert expected([(Tried(0, True, None), 1.0)])["deviations"] is None


def test_overlap():
    text = Text(torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.3, 0.6]]))
    assert text.overlap(Tried(0, True, None)) == pytest.approx(0.6)
    assert text.overlap(Tried(0, True, 2)) == pytest.approx(0.2)


def test_probabilities_are_those_that_tokens_were_drawn_from(trio, prompts):
    temperature = 0.8
    row = decode(trio, prompts[:1], 5, temperature).rows[0]
    text = text_of(trio, row, temperature)
    ids = [*row.prompt, *row.token_ids[:3]]
    with torch.inference_mode():
        base, expert, anti = (m(torch.tensor([ids])).logits[0, -1] for m in trio.models.values())
    # Two fp32 computations of logits of order 10.
    want = torch.softmax((base + expert - anti) / temperature, -1)
    assert torch.allclose(text.target[3], want, atol=1e-4)
    assert torch.allclose(text.expert[3], torch.softmax(expert / temperature, -1), atol=1e-4)
    assert text.target.shape == (5, trio.vocab_size)


@pytest.mark.parametrize("drafter", ["expert", "prompt_lookup"])
def test_what_was_tried_is_what_the_decoder_counted(trio, prompts, drafter):
    """Of the same requests the decoder's own statistics say how many drafts were kept."""
    speculation = Speculation(drafter=drafter, max_drafts=3, adaptive=False)
    rows = decode(trio, prompts, TOKENS, 0.5, speculation).rows
    assert [len(row.token_ids) for row in rows] == [TOKENS] * 4
    decoder = Decoder(trio, 4, 10 + TOKENS, speculation=speculation)
    params = [
        SamplingParams(temperature=0.5, seed=i, max_tokens=TOKENS, ignore_eos=True)
        for i in range(4)
    ]
    outputs = decoder.generate([list(p) for p in prompts], params)
    for row, output in zip(rows, outputs, strict=True):
        assert output.speculation is not None
        assert row.token_ids == output.token_ids
        kept = sum(t.accepted for t in tried_drafts(row, drafter, 3))
        assert kept == output.speculation.accepted
        # Behind the first draft that is refused none is tried.
        assert len(tried_drafts(row, drafter, 3)) <= output.speculation.drafted


def test_rejection_keeps_what_the_overlaps_say(trio):
    """400 drafts of the expert: kept within 4 standard deviations of the sum of overlaps."""
    speculation = Speculation(mode="rejection", max_drafts=3, adaptive=False)
    rows = decode(trio, make_prompts(trio, 16, 10), TOKENS, 1.0, speculation).rows
    pairs = []
    for row in rows:
        text = text_of(trio, row, 1.0)
        pairs += [(tried, text.overlap(tried)) for tried in tried_drafts(row, "expert", 3)]
    assert len(pairs) > 200
    found = expected(pairs)
    assert abs(found["deviations"]) < 4
    assert 0.05 < found["overlap"] < 0.95


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(acceptance.main)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def on_text(trio_directory, tmp_path):
    return (
        "--trio", trio_directory, "--kinds", "text", "--drafts", "1,3", "--prompts", 3,
        "--tokens", 12, "--output", tmp_path / "out.jsonl",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    monkeypatch.setattr(acceptance, "_PROMPT_LENGTH", 10)


def test_command(command, on_text):
    result = command(*on_text)
    assert result.exit_code == 0, result.output
    output = on_text[-1]
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["drafter"], r["mode"], r["drafts"]) for r in records] == [
        (drafter, mode, drafts)
        for drafter in ("expert", "prompt_lookup")
        for mode in ("coupled", "rejection")
        for drafts in (1, 3)
    ]
    for record in records:
        assert (record["sequences"], record["tokens"]) == (3, 36)
        assert 0 <= record["accepted"] <= record["tried"]
        if record["mode"] == "coupled":
            assert record["equal"] + len(record["mismatches"]) == 3
            assert record["equal"] == 3
        else:
            assert record["equal"] is None
        if record["drafts"] == 3 and record["tried"]:
            found = record["expected"]
            assert 0 <= found["bound"] <= found["overlap"] <= 1
        else:
            assert record["expected"] is None
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "6/6" in result.output


def test_command_fails_where_coupled_tokens_are_others(command, on_text, monkeypatch):
    """Where coupled runs draw with other seeds, their tokens differ, and it is no tie."""
    right = decode

    def wrong(trio, prompts, max_tokens, temperature, speculation=None):
        shift = speculation is not None and speculation.mode == "coupled"
        swapped = Trio.from_models(trio.base, trio.anti, trio.expert, trio.tokenizer)
        return right(swapped if shift else trio, prompts, max_tokens, temperature, speculation)

    monkeypatch.setattr(acceptance, "decode", wrong)
    result = command(*on_text)
    assert result.exit_code == 1
    assert "more than rounding" in result.output
    assert "not plain decoding's" in result.output


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--kinds", "prose", "--kinds"), ("--drafts", "9", "--drafts")],
)
def test_wrong_options(command, option, value, message):
    result = command(option, value)
    assert result.exit_code == 2
    assert message in result.output
