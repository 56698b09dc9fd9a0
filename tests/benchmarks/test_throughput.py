import ast
import copy
import json
import re
from importlib.resources import files

import pytest
import torch
import typer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from benchmarks import throughput
from benchmarks.agreement import ComputedTwice, Mismatch, greedy_mismatches
from benchmarks.decode_timing import Case, CaseTimes, ProviderTimes, Work, time_case
from benchmarks.options import check_lengths, parse_cases, parse_providers, result_stem
from benchmarks.prompts import Prompt, make_prompts, task_batches, task_prompts, task_tokens
from benchmarks.provider_memory import provider_peaks
from benchmarks.providers import (
    GREEDY,
    PROVIDERS,
    DecoderProvider,
    Generation,
    NaiveLoop,
    Sampling,
    bare_forwards,
)
from benchmarks.throughput_table import print_verdicts
from benchmarks.trios import AdapterMissing, TrioForms, TrioMissing, find_trio
from proxytune_kernels import Trio, reference
from proxytune_kernels.params import RowParams

# PEFT asks a model for a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

MAX_TOKENS = 6
PLAIN = ("naive", "base-only", "ours", "ours-batched-pair")
SPECULATIVE = ("ours-speculative", "ours-lookup")
SHARED = ("ours-shared-pair", "ours-shared-speculative")


def make(name: str, forms: TrioForms, sampling=None):
    return PROVIDERS[name](forms, 2, 32, sampling or Sampling())


@pytest.fixture(scope="module")
def adapter(trio, tmp_path_factory):
    """Directory of a random LoRA adapter for the anti-expert."""
    peft = pytest.importorskip("peft")
    directory = tmp_path_factory.mktemp("expert-lora")
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(copy.deepcopy(trio.anti), config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def forms(trio, adapter):
    """The trio with that adapter's expert, merged."""
    peft = pytest.importorskip("peft")
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(trio.anti), adapter).merge_and_unload()
    return TrioForms(Trio.from_models(trio.base, merged, trio.anti, trio.tokenizer), adapter)


@pytest.fixture
def prompts(trio):
    return make_prompts(trio, 3, 10)


def test_prompts_have_the_length_asked_for(trio):
    prompts = make_prompts(trio, 3, 2000)
    assert [len(prompt) for prompt in prompts] == [2000] * 3
    assert prompts[0] != prompts[1]
    assert trio.tokenizer.decode(prompts[0][:12]) == "When on boar"


def test_greedy_tokens_agree(forms, prompts):
    for names, trio in ((PLAIN + SPECULATIVE, forms.trio), (SHARED, forms.unmerged)):
        providers = [make(name, forms) for name in names]
        assert all(provider.trio is trio for provider in providers)
        assert greedy_mismatches(providers, trio, prompts, MAX_TOKENS) == []


def test_greedy_providers_need_not_be_told(forms, prompts):
    for name in PLAIN + SPECULATIVE:
        told = make(name, forms).generate(prompts, MAX_TOKENS, greedy=True).token_ids
        assert make(name, forms, GREEDY).generate(prompts, MAX_TOKENS).token_ids == told


def test_unmerged_expert_is_the_merged_one_over_the_anti(forms):
    ids = torch.tensor([[5, 9, 200, 31]])
    with torch.inference_mode():
        merged, unmerged, anti = (
            m(ids).logits for m in (forms.trio.expert, forms.unmerged.expert, forms.trio.anti)
        )
    # Two fp32 computations of logits of order 10, some hundred roundings each.
    assert torch.allclose(merged, unmerged, atol=1e-4)
    assert not torch.allclose(anti, unmerged, atol=1e-1)
    weight = forms.unmerged.expert.model.embed_tokens.weight
    assert weight.data_ptr() == forms.trio.anti.model.embed_tokens.weight.data_ptr()


def test_each_provider_is_held_to_its_own_models(forms, capsys):
    """A shared pair that decodes other models is found beside a trio's providers that are right."""
    right = [make(name, forms) for name in ("naive", "ours", "ours-shared-pair")]
    assert throughput.check_greedy(right) == []
    trio = forms.unmerged
    swapped = Trio.from_models(trio.base, trio.anti, forms.trio.expert, trio.tokenizer)
    wrong = DecoderProvider("wrong", swapped, max_batch_size=2)
    wrong.trio = trio
    with pytest.raises(typer.Exit):
        throughput.check_greedy([*right, wrong])
    assert "wrong: prompt 0" in capsys.readouterr().out


def test_providers_that_learn_are_made_anew(forms):
    wanted = settings(providers=("naive", "ours", "ours-speculative"))
    works = throughput.make_work(forms.trio, wanted)
    made = throughput.make_providers(forms, wanted, works)
    again = throughput.unlearned(made, forms, wanted, works)
    assert [p.name for p in again] == list(wanted.providers)
    assert [p is q for p, q in zip(made, again, strict=True)] == [True, True, False]


def test_sampling_is_as_told(trio, prompts):
    """At a temperature next to none both are greedy, at a high one neither is."""
    greedy = NaiveLoop(trio).generate(prompts, MAX_TOKENS, greedy=True).token_ids
    for make_one in (
        lambda sampling: NaiveLoop(trio, sampling=sampling),
        lambda sampling: DecoderProvider("ours", trio, sampling, max_batch_size=3),
    ):
        assert make_one(Sampling(1e-4, 1.0)).generate(prompts, MAX_TOKENS).token_ids == greedy
        assert make_one(Sampling(100.0, 1e-6)).generate(prompts, MAX_TOKENS).token_ids == greedy
        assert make_one(Sampling(100.0, 1.0)).generate(prompts, MAX_TOKENS).token_ids != greedy


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
        self.naive, self.roles, self.trio = NaiveLoop(trio, roles), roles, trio
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
    assert 0 < mismatch.rounding < 1e-3


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


def test_ties_of_both_signs_and_noise(trio, prompts):
    """A sampled token's lead is its logit over the temperature and its noise, less the other's."""
    text = NaiveLoop(trio).generate(prompts[:1], 4, greedy=True).token_ids[0]
    computed = ComputedTwice(NaiveLoop(trio), prompts[0], text)
    other = (text[2] + 1) % trio.vocab_size
    temperature, seed = 0.5, 11
    gap, rounding = computed.gap(2, other, temperature, seed)
    with torch.inference_mode():
        ids = torch.tensor([[*prompts[0], *text[:2]]])
        base, expert, anti = (model(ids).logits[0, -1] for model in trio.models.values())
    params = RowParams.make(1, temperature=temperature, seed=seed, position=2)
    scores = reference.scores(
        reference.distribution((base + expert - anti)[None], params), params, 0
    )[0]
    # As above, divided by the temperature.
    assert gap == pytest.approx(float(scores[text[2]] - scores[other]), abs=2e-4)
    assert rounding == pytest.approx(computed.gap(2, other)[1] / temperature)
    assert all(computed.gap(position, other)[1] < 1e-3 for position in range(4))
    assert Mismatch("", 0, 0, 1, 2, -0.5, 0.6).within_rounding
    assert not Mismatch("", 0, 0, 1, 2, -0.7, 0.6).within_rounding


def test_bare_forwards(trio, prompts):
    seconds = bare_forwards(trio.models, prompts, 5)
    assert {role: len(s) for role, s in seconds.items()} == dict.fromkeys(trio.roles, 5)


@pytest.mark.parametrize("name", PLAIN + SPECULATIVE)
def test_generation_has_a_time_and_a_count_for_each_token(forms, prompts, name):
    generation = make(name, forms).generate(prompts[:2], MAX_TOKENS)
    assert [len(row) for row in generation.token_ids] == [MAX_TOKENS] * 2
    for row in generation.seconds:
        assert len(row) == MAX_TOKENS
        assert 0 < row[0] <= row[-1]
        assert row == sorted(row)
    assert generation.counts["emitted"] == 2 * (MAX_TOKENS - 1)
    if name in PLAIN:
        assert generation.counts["base_forwards"] == MAX_TOKENS - 1
        assert generation.counts["useful_slot_steps"] == 2 * (MAX_TOKENS - 1)
        assert generation.counts["drafted"] == 0


def test_counts_are_of_the_run(forms, prompts):
    provider = make("ours", forms)
    first = provider.generate(prompts[:2], MAX_TOKENS).counts
    assert provider.generate(prompts[:2], MAX_TOKENS).counts == first


def generation_of(seconds, **counts):
    return Generation([[1] * len(row) for row in seconds], seconds, counts)


def test_record_arithmetic():
    """Two rows of three tokens; ours takes half of naive's time, repeat 2 twice that of 1."""
    times = {"naive": ProviderTimes(), "ours": ProviderTimes()}
    for name, scale in (("naive", 2.0), ("ours", 1.0)):
        for slowdown in (1.0, 2.0):
            seconds = [[scale * slowdown * s for s in (0.5, 0.6, 0.8)]] * 2
            times[name].add(generation_of(seconds, emitted=4, useful_slot_steps=4))
    forwards = [
        {"base": [0.04 * s, 0.05 * s, 0.09 * s], "expert": [0.03 * s], "anti": [0.02 * s]}
        for s in (1, 2)
    ]
    record = CaseTimes(Case(2, 10, 3), times, forwards).record("ours")
    # 6 tokens in 0.8 s and in 1.6 s; the steps of a repeat are 0.1 and 0.2 s, median 0.15.
    assert record["tokens_per_second"]["median"] == pytest.approx((7.5 + 3.75) / 2)
    assert record["first_token_ms"]["median"] == pytest.approx(750)
    assert record["arrival_ms"]["count"] == 8
    assert record["arrival_ms"]["p50"] == pytest.approx(200)
    assert record["token_ms"]["median"] == pytest.approx((150 + 300) / 2)
    assert record["bare_forwards_ms"]["sum"] == pytest.approx(150)
    assert record["step_over_forwards"]["median"] == pytest.approx(1.5)
    # A repeat's forwards: medians 50 + 30 + 20, means 60 + 30 + 20, times 1 and 2.
    assert record["bare_forwards_ms"]["base"] == pytest.approx(75)
    assert record["token_over_forwards"]["median"] == pytest.approx(150 / 110)
    assert list(record["speed_over"]) == ["naive"]
    assert record["speed_over"]["naive"]["median"] == pytest.approx(2.0)
    assert record["token_speed_over"]["naive"]["median"] == pytest.approx(2.0)
    assert record["acceptance"] is None
    assert record["tokens_per_base_forward"] == 1.0


def test_tokens_that_come_together_are_one_arrival():
    """Five tokens: the first, three 0.3 s later, one 0.1 s after those; two rounds of drafts."""
    times = ProviderTimes()
    seconds = [[1.0, 1.3, 1.3, 1.3, 1.4]]
    for _ in range(2):
        times.add(generation_of(seconds, emitted=4, useful_slot_steps=2, drafted=5, accepted=2))
    record = CaseTimes(Case(1, None, 5), {"spec": times}, [{"base": [0.1]}] * 2).record("spec")
    assert times.arrivals == [[pytest.approx(0.3), pytest.approx(0.1)]] * 2
    assert record["token_ms"]["median"] == pytest.approx(100)
    assert record["token_over_forwards"]["median"] == pytest.approx(1.0)
    assert record["step_over_forwards"]["median"] == pytest.approx(2.0)
    assert record["acceptance"] == pytest.approx(0.4)
    assert record["tokens_per_base_forward"] == pytest.approx(2.0)
    assert record["speed_over"] == {}


def test_time_case_interleaves(forms, trio, prompts):
    ran: list[str] = []
    seen = []

    class Noted:
        name, set_up_seconds = "noted", 0.0

        def generate(self, given, max_tokens):
            seen.append(given)
            return generation_of([[0.1, 0.2, 0.3]])

    providers = [make("naive", forms), Noted()]
    work = Work(Case(1, 10, 3), [prompts[:1], prompts[1:2]])
    times = time_case(trio, providers, work, 3, ran.append)
    assert ran == ["naive", "noted", "bare forwards"] * 4
    assert {name: len(t.totals) for name, t in times.providers.items()} == {"naive": 3, "noted": 3}
    assert len(times.forwards) == 3
    # The warm-up's is the first repeat's; then they take turns.
    assert seen == [prompts[:1], prompts[:1], prompts[1:2], prompts[:1]]


def test_parse_cases():
    assert parse_cases("1,4", "8:16,own:8") == (
        Case(1, 8, 16), Case(4, 8, 16), Case(1, None, 8), Case(4, None, 8),
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


@pytest.mark.parametrize(
    ("kind", "lengths", "message"),
    [("text", "own:8", "prompt:output with text"), ("code", "8:8", "own:output with code")],
)
def test_lengths_that_prompts_do_not_have(kind, lengths, message):
    with pytest.raises(typer.BadParameter, match=message):
        check_lengths(kind, parse_cases("1", lengths))
    check_lengths("text" if kind == "code" else "code", parse_cases("1", lengths))


def settings(**changes):
    values = {
        "trio": "tiny", "dtype": None, "providers": ("naive",), "prompts": "text",
        "cases": (Case(1, 8, 4),), "sampling": Sampling(), "repeats": 2, "memory": False,
    }  # fmt: skip
    return throughput.Settings(**{**values, **changes})


def test_case_longer_than_the_context(trio):
    with pytest.raises(typer.BadParameter, match="context of 64.*got 60:5"):
        throughput.make_work(trio, settings(cases=(Case(1, 60, 5),)))


def test_work_of_own_lengths(trio, monkeypatch):
    """Byte tokens: prompts of 2, 3, 2, 2 and 3 tokens, the third's solution too short."""
    listed = [("ab", "wxyz"), ("abc", None), ("xx", "w"), ("cd", "wxyz"), ("def", "wxyz")]
    prompts = [Prompt(*pair) for pair in listed]
    monkeypatch.setattr("benchmarks.prompts.task_prompts", lambda kind, name: prompts)
    cases = (Case(1, None, 4), Case(2, None, 4))
    one, two = throughput.make_work(trio, settings(prompts="code", cases=cases, repeats=3))
    encode = trio.tokenizer.encode
    assert one.batches == [[encode("ab")], [encode("abc")], [encode("cd")]]
    assert two.batches == [[encode("ab"), encode("cd")], [encode("abc"), encode("def")]]
    assert (one.longest, two.longest) == (7, 7)
    with pytest.raises(ValueError, match="3 of one length"):
        task_batches(trio, "tiny", "code", 3, 4, 1)


def test_task_prompts():
    for name, solution in (("shipped", r" \d [+-] \d = \d+\n#### \d+"), ("qwen", r" .*\n#### \d+")):
        drawn = task_prompts("arithmetic", name)
        assert len({prompt.text for prompt in drawn}) > 100
        assert all(re.fullmatch(solution, prompt.solution or "") for prompt in drawn)
    for prompt in task_prompts("code", "qwen"):
        body = prompt.text + "    raise NotImplementedError\n"
        [function] = ast.parse(body).body
        assert isinstance(function, ast.FunctionDef)
        assert ">>> " in (ast.get_docstring(function) or "")
    with pytest.raises(ValueError, match="arithmetic or code, got 'text'"):
        task_prompts("text", "qwen")


def test_providers_that_cannot_run_are_left_out(trio, tmp_path, capsys):
    bare = TrioForms(trio, tmp_path / "expert-lora")
    wanted = settings(providers=("naive", "ours-shared-pair", "ours", "ours-packed"))
    made = throughput.make_providers(bare, wanted, throughput.make_work(trio, wanted))
    assert [provider.name for provider in made] == ["naive", "ours"]
    said = capsys.readouterr().out
    assert "ours-shared-pair is left out: the expert has no adapter" in said
    # Its weights are fp32.
    assert "ours-packed is left out: " in said
    with pytest.raises(AdapterMissing, match="expert-lora"):
        make("ours-shared-pair", bare)


def test_verdicts(capsys):
    """The naive loop takes 0.8 s and its tokens 0.3 s; ours 0.5 s and 0.1 s."""
    times = {name: ProviderTimes() for name in ("naive", "ours", "ours-speculative")}
    for name in ("naive", "ours"):
        times[name].add(generation_of([[0.5, 0.8]]))
    times["ours-speculative"].add(generation_of([[0.4, 0.5]]))
    case_times = CaseTimes(Case(1, None, 2), times, [{"base": [0.1]}])
    records = [case_times.record(name) for name in times]
    print_verdicts(records, "qwen", "arithmetic")
    said = capsys.readouterr().out
    assert said.count("target") == 1
    assert "ours-speculative has 1.60 times naive's tokens/s" in said
    assert "target 2.5: missed; behind the prompt 3.00 times" in said
    print_verdicts(records, "qwen", "text")
    print_verdicts(records, "tiny", "arithmetic")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("prompts", "sampling", "quick", "stem"),
    [
        ("text", Sampling(), False, "throughput-qwen"),
        ("text", GREEDY, True, "throughput-qwen-greedy-quick"),
        ("arithmetic", Sampling(1.0, 1.0), False, "throughput-qwen-arithmetic-t1-p1"),
    ],
)
def test_results_of_different_runs_have_different_names(prompts, sampling, quick, stem):
    assert result_stem("trios/qwen", prompts, sampling, quick) == stem


def test_task_tokens_are_the_median_solution():
    """With the shipped trio's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(files("proxytune_kernels") / "data" / "trio")
    solutions = [p.solution or "" for p in task_prompts("arithmetic", "shipped")]
    lengths = sorted(len(tokenizer.encode(solution)) for solution in solutions)
    assert lengths[len(lengths) // 2] == task_tokens("shipped")


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
    names = ["naive", "base-only", "ours", "ours-speculative"]
    assert [(r["batch_size"], r["provider"]) for r in records] == [
        (size, name) for size in (1, 2) for name in names
    ]
    assert "ours-shared-pair is left out" in result.output
    for record in records:
        assert record["benchmark"] == "throughput"
        assert record["trio"] == trio_directory.name
        assert record["dtype"] == {"base": "float32", "expert": "float32", "anti": "float32"}
        assert record["repeats"] == record["step_over_forwards"]["count"] == 2
        assert record["greedy_ties"] == []
        assert record["prompts"] == "text"
        assert record["sampling"] == {"alpha": 1.0, "temperature": 0.7, "top_p": 0.9}
        assert record["acceptance"] is None or record["provider"] == "ours-speculative"
        assert record["tokens_per_base_forward"] >= 1.0
        assert (
            record["environment"]["revision"] is None
            or len(record["environment"]["revision"]) == 40
        )
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "fwds" in result.output


def test_command_refuses_to_time_wrong_tokens(command, trio_directory, tmp_path, monkeypatch):
    def wrong(forms, max_batch_size, max_seq_len, sampling):
        trio = forms.trio
        swapped = Trio.from_models(trio.base, trio.anti, trio.expert, trio.tokenizer)
        provider = DecoderProvider("ours", swapped, max_batch_size=max_batch_size)
        provider.trio = trio
        return provider

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
