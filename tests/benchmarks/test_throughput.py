import copy
import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import throughput
from benchmarks.agreement import greedy_mismatches
from benchmarks.decode_timing import Case, CaseTimes, ProviderTimes, time_case
from benchmarks.options import parse_cases, parse_providers
from benchmarks.prompts import make_prompts
from benchmarks.providers import (
    PROVIDERS,
    DecoderProvider,
    Generation,
    NaiveLoop,
    bare_forwards,
)
from benchmarks.trios import TrioMissing, find_trio, provider_peaks
from proxytune_kernels import Trio

MAX_TOKENS = 6


def make(name: str, trio: Trio):
    return PROVIDERS[name](trio, 2, 32)


@pytest.fixture
def prompts(trio):
    return make_prompts(trio, 3, 10)


def test_prompts_have_the_length_asked_for(trio):
    prompts = make_prompts(trio, 3, 2000)
    assert [len(prompt) for prompt in prompts] == [2000] * 3
    assert prompts[0] != prompts[1]
    assert trio.tokenizer.decode(prompts[0][:12]) == "When on boar"


def test_greedy_tokens_agree(trio, prompts):
    providers = [make(name, trio) for name in ("naive", "base-only", "ours")]
    assert greedy_mismatches(providers, trio, prompts, MAX_TOKENS) == []


def test_naive_is_whole_forwards(trio, prompts):
    """The naive loop's cache changes nothing: three forwards of the whole text say the same."""
    got = NaiveLoop(trio).generate(prompts[:1], MAX_TOKENS, greedy=True).token_ids[0]
    ids = list(prompts[0])
    with torch.inference_mode():
        for token in got:
            base, expert, anti = (
                m(torch.tensor([ids])).logits[0, -1] for m in trio.models.values()
            )
            assert token == int((base + expert - anti).argmax())
            ids.append(token)


def test_wrong_provider_is_caught(trio, prompts):
    swapped = Trio.from_models(trio.base, trio.anti, trio.expert, trio.tokenizer)
    wrong = DecoderProvider("swapped", swapped, max_batch_size=2)
    mismatches = greedy_mismatches([wrong], trio, prompts, MAX_TOKENS)
    assert [m.prompt for m in mismatches] == [0, 1, 2]
    assert not any(m.within_rounding for m in mismatches)
    assert "more than rounding" in str(mismatches[0])


class OneTokenOff:
    """The naive loop, but for one token of one prompt."""

    name = "off"
    set_up_seconds = 0.0

    def __init__(self, trio, roles, prompt, position, token):
        self.naive, self.roles = NaiveLoop(trio, roles), roles
        self.change = prompt, position, token

    def generate(self, prompts, max_tokens, *, greedy=False):
        generation = self.naive.generate(prompts, max_tokens, greedy=greedy)
        prompt, position, token = self.change
        generation.token_ids[prompt][position] = token
        return generation


def test_mismatch_says_where(trio, prompts):
    expected = NaiveLoop(trio).generate(prompts, MAX_TOKENS, greedy=True).token_ids
    other = (expected[1][4] + 1) % trio.vocab_size
    [mismatch] = greedy_mismatches(
        [OneTokenOff(trio, trio.roles, 1, 4, other)], trio, prompts, MAX_TOKENS
    )
    assert (mismatch.prompt, mismatch.position) == (1, 4)
    assert (mismatch.expected, mismatch.got) == (expected[1][4], other)
    with torch.inference_mode():
        ids = torch.tensor([[*prompts[1], *expected[1][:4]]])
        base, expert, anti = (model(ids).logits[0, -1] for model in trio.models.values())
    x = base + expert - anti
    # Two fp32 computations of logits of order 10: 1e-4 is a hundred roundings.
    assert mismatch.gap == pytest.approx(float(x[expected[1][4]] - x[other]), abs=1e-4)


def test_a_tie_is_within_rounding(trio, prompts):
    """The base's likeliest token gets a twin with the same output weights: either is right."""
    first = NaiveLoop(trio, ("base",)).generate(prompts[:1], 1, greedy=True).token_ids[0][0]
    base = copy.deepcopy(trio.base)
    twin = 200 if first < 200 else 100
    with torch.no_grad():
        base.lm_head.weight[twin] = base.lm_head.weight[first]
    tied = Trio.from_models(base, trio.expert, trio.anti, trio.tokenizer)
    [got] = NaiveLoop(tied, ("base",)).generate(prompts[:1], 1, greedy=True).token_ids[0]
    off = OneTokenOff(tied, ("base",), 0, 0, twin if got == first else first)
    [mismatch] = greedy_mismatches([off], tied, prompts[:1], 1)
    assert mismatch.within_rounding
    assert "a tie within rounding" in str(mismatch)


def test_bare_forwards(trio, prompts):
    seconds = bare_forwards(trio.models, prompts, 5)
    assert {role: len(s) for role, s in seconds.items()} == dict.fromkeys(trio.roles, 5)


@pytest.mark.parametrize("name", ["naive", "base-only", "ours"])
def test_generation_has_a_time_for_each_token(trio, prompts, name):
    generation = make(name, trio).generate(prompts, MAX_TOKENS)
    assert [len(row) for row in generation.token_ids] == [MAX_TOKENS] * 3
    for row in generation.seconds:
        assert len(row) == MAX_TOKENS
        assert 0 < row[0] <= row[-1]
        assert row == sorted(row)


def test_record_arithmetic():
    """Two rows of three tokens; ours takes half of naive's time, repeat 2 twice that of 1."""
    times = {"naive": ProviderTimes(), "ours": ProviderTimes()}
    for name, scale in (("naive", 2.0), ("ours", 1.0)):
        for slowdown in (1.0, 2.0):
            seconds = [[scale * slowdown * s for s in (0.5, 0.6, 0.8)]] * 2
            times[name].add(Generation([[1, 2, 3]] * 2, seconds))
    forwards = [
        {"base": [0.04 * s, 0.05 * s, 0.09 * s], "expert": [0.03 * s], "anti": [0.02 * s]}
        for s in (1, 2)
    ]
    record = CaseTimes(Case(2, 10, 3), times, forwards).record("ours")
    # 6 tokens in 0.8 s and in 1.6 s; the steps of a repeat are 0.1 and 0.2 s, median 0.15.
    assert record["tokens_per_second"]["median"] == pytest.approx((7.5 + 3.75) / 2)
    assert record["first_token_ms"]["median"] == pytest.approx(750)
    assert record["output_token_ms"]["count"] == 8
    assert record["output_token_ms"]["p50"] == pytest.approx(200)
    assert record["bare_forwards_ms"]["sum"] == pytest.approx(150)
    assert record["step_over_forwards"]["median"] == pytest.approx(1.5)
    # A repeat's forwards: medians 50 + 30 + 20, means 60 + 30 + 20, times 1 and 2.
    assert record["bare_forwards_ms"]["base"] == pytest.approx(75)
    assert record["mean_step_over_forwards"]["median"] == pytest.approx(150 / 110)
    assert record["speed_over_naive"]["median"] == pytest.approx(2.0)
    assert record["step_speed_over_naive"]["median"] == pytest.approx(2.0)


def test_time_case_interleaves(trio):
    ran: list[str] = []
    providers = [make(name, trio) for name in ("naive", "ours")]
    times = time_case(trio, providers, Case(2, 8, 3), 2, ran.append)
    assert ran == ["naive", "ours", "bare forwards"] * 3
    assert {name: len(t.totals) for name, t in times.providers.items()} == {"naive": 2, "ours": 2}
    assert len(times.forwards) == 2


def test_parse_cases():
    assert parse_cases("1,4", "8:16,16:8") == (
        Case(1, 8, 16), Case(4, 8, 16), Case(1, 16, 8), Case(4, 16, 8),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "lengths", "message"),
    [
        ("0", "8:8", "--batch-sizes"),
        ("one", "8:8", "--batch-sizes"),
        ("1", "8", "prompt:output"),
        ("1", "8:1", "--lengths"),
    ],
)
def test_wrong_cases(sizes, lengths, message):
    with pytest.raises(typer.BadParameter, match=message):
        parse_cases(sizes, lengths)


def test_parse_providers():
    assert parse_providers("ours,naive", compiled=True) == (
        "naive", "ours", "ours-compiled",
    )  # fmt: skip
    with pytest.raises(typer.BadParameter, match="'mine'"):
        parse_providers("naive,mine", compiled=False)


def test_case_longer_than_the_context(trio):
    with pytest.raises(typer.BadParameter, match="context of 64"):
        throughput.check_context(trio, [Case(1, 60, 5)])


def test_absent_trio_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.trios.REPOSITORY", tmp_path)
    with pytest.raises(TrioMissing, match=r"python scripts/qwen_trio\.py"):
        find_trio("qwen")
    with pytest.raises(TrioMissing, match=r"python scripts/train_trio\.py"):
        find_trio("shipped")
    with pytest.raises(TrioMissing, match=r"directory with a trio\.json"):
        find_trio("nowhere")


def test_provider_peaks(trio_directory):
    [peak] = provider_peaks(str(trio_directory), None, "ours", [(2, 8, 4)], threads=1)
    assert peak["total_bytes"] > peak["extra_bytes"] >= 0


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(throughput.main)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_command(command, trio_directory, tmp_path):
    output = tmp_path / "out.jsonl"
    result = command(
        "--trio", trio_directory, "--lengths", "8:3", "--batch-sizes", "1,2", "--repeats", 2,
        "--no-memory", "--output", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    names = ["naive", "base-only", "ours"]
    assert [(r["batch_size"], r["provider"]) for r in records] == [
        (size, name) for size in (1, 2) for name in names
    ]
    for record in records:
        assert record["benchmark"] == "throughput"
        assert record["trio"] == trio_directory.name
        assert record["dtype"] == {"base": "float32", "expert": "float32", "anti": "float32"}
        assert record["repeats"] == record["step_over_forwards"]["count"] == 2
        assert record["greedy_ties"] == []
        assert (
            record["environment"]["revision"] is None
            or len(record["environment"]["revision"]) == 40
        )
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "step" in result.output


def test_command_refuses_to_time_wrong_tokens(command, trio_directory, tmp_path, monkeypatch):
    def wrong(trio, max_batch_size, max_seq_len):
        swapped = Trio.from_models(trio.base, trio.anti, trio.expert, trio.tokenizer)
        return DecoderProvider("ours", swapped, max_batch_size=max_batch_size)

    monkeypatch.setitem(PROVIDERS, "ours", wrong)
    output = tmp_path / "out.jsonl"
    result = command("--trio", trio_directory, "--lengths", "8:3", "--output", output)
    assert result.exit_code == 1
    assert "nothing is timed" in result.output
    assert not output.exists()


def test_command_without_the_trio(command, tmp_path):
    result = command("--trio", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "trio.json" in result.output
    assert "Traceback" not in result.output
