"""Decoding: what providers decode, the check of their tokens, and how figures come from times."""

import ast
import copy
import json
import re
import sys
from collections.abc import Callable
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from transformers import AutoTokenizer

from benchmarks import throughput
from benchmarks.harness import agreement, llama, trios
from benchmarks.harness.agreement import Mismatch, greedy_mismatches, lead
from benchmarks.harness.decoding import (
    GREEDY,
    Case,
    DecoderProvider,
    Generation,
    NaiveLoop,
    Sampling,
    parse_cases,
)
from benchmarks.harness.trios import TrioForms, TrioMissing, make_prompts
from benchmarks.throughput import Times, Work, make_provider, record_of, result_stem
from proxytune_kernels import Trio, reference
from proxytune_kernels.params import RowParams
from scripts.qwen import gguf_files

# PEFT asks a model for a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

MAX_TOKENS = 6
PLAIN = ("naive", "base-only", "ours", "ours-batched-pair", "ours-speculative", "ours-lookup")
SHARED = ("ours-shared-pair", "ours-shared-speculative")


def make(name, forms, sampling=None):
    return make_provider(name, forms, sampling or Sampling(), 4, 32)


@pytest.fixture(scope="module")
def forms(trio, tmp_path_factory):
    """The trio with an expert that is a random LoRA adapter over the anti-expert, merged."""
    peft = pytest.importorskip("peft")
    directory = tmp_path_factory.mktemp("trio") / "expert-lora"
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(copy.deepcopy(trio.anti), config).save_pretrained(directory)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(trio.anti), directory).merge_and_unload()
    return TrioForms(
        Trio.from_models(trio.base, merged, trio.anti, trio.tokenizer), directory.parent
    )


@pytest.fixture
def prompts(trio):
    return make_prompts(trio, 3, 10)


def combined_logits(trio, ids):
    with torch.inference_mode():
        base, expert, anti = (m(torch.tensor([ids])).logits[0, -1] for m in trio.models.values())
    return base + expert - anti


def test_greedy_tokens_agree_and_have_times_and_counts(forms, prompts):
    for names, trio in ((PLAIN, forms.trio), (SHARED, forms.unmerged)):
        providers = [make(name, forms) for name in names]
        assert all(provider.trio is trio for provider in providers)
        assert greedy_mismatches(providers, trio, prompts, MAX_TOKENS) == []
        for provider in providers:
            generation = provider.generate(prompts[:2], MAX_TOKENS)
            assert [len(row) for row in generation.token_ids] == [MAX_TOKENS] * 2
            assert all(row == sorted(row) and row[0] > 0 for row in generation.seconds)
            assert generation.counts["emitted"] == 2 * (MAX_TOKENS - 1)
            if provider.name in PLAIN[:4]:
                assert generation.counts["base_forwards"] == MAX_TOKENS - 1
                assert generation.counts["useful_slot_steps"] == 2 * (MAX_TOKENS - 1)
                # Counts are of the run.
                assert provider.generate(prompts[:2], MAX_TOKENS).counts == generation.counts


def test_naive_is_whole_forwards_and_sampling_is_as_told(trio, prompts):
    """Three forwards of the whole text say the same; next to no temperature is greedy."""
    greedy = NaiveLoop(trio).generate(prompts, MAX_TOKENS, greedy=True).token_ids
    ids = list(prompts[0])
    for token in greedy[0]:
        assert token == int(combined_logits(trio, ids).argmax())
        ids.append(token)
    for make_one in (
        lambda sampling: NaiveLoop(trio, sampling=sampling),
        lambda sampling: DecoderProvider("ours", trio, sampling, max_batch_size=3),
    ):
        assert make_one(GREEDY).generate(prompts, MAX_TOKENS).token_ids == greedy
        assert make_one(Sampling(1e-4, 1.0)).generate(prompts, MAX_TOKENS).token_ids == greedy
        assert make_one(Sampling(100.0, 1e-6)).generate(prompts, MAX_TOKENS).token_ids == greedy
        assert make_one(Sampling(100.0, 1.0)).generate(prompts, MAX_TOKENS).token_ids != greedy


def test_each_provider_is_held_to_its_own_models(forms, capsys):
    """A shared pair that decodes other models is found beside a trio's providers that are right."""
    right = [make(name, forms) for name in ("naive", "ours", "ours-shared-pair")]
    assert agreement.check_greedy(right) == []
    trio = forms.unmerged
    swapped = Trio.from_models(trio.base, trio.anti, forms.trio.expert, trio.tokenizer)
    wrong = DecoderProvider("wrong", swapped, max_batch_size=2)
    wrong.trio = trio
    with pytest.raises(typer.Exit):
        agreement.check_greedy([*right, wrong])
    said = capsys.readouterr().out
    assert "wrong: prompt 0" in said and "more than rounding" in said


def test_a_decoder_is_made_anew(forms):
    provider = make("ours-speculative", forms)
    before = provider.decoder
    provider.set_up()
    assert provider.decoder is not before
    assert provider.decoder.speculation == before.speculation


class OneTokenOff:
    """The naive loop, but for one token of one prompt."""

    name, set_up_seconds = "off", 0.0

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
    off = OneTokenOff(trio, trio.roles, 1, 4, other)
    [mismatch] = greedy_mismatches([off], trio, prompts, MAX_TOKENS)
    assert (mismatch.prompt, mismatch.position) == (1, 4)
    assert (mismatch.expected, mismatch.got) == (expected[1][4], other)
    x = combined_logits(trio, [*prompts[1], *expected[1][:4]])
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
    assert Mismatch("", 0, 0, 1, 2, -0.5, 0.6).within_rounding
    assert not Mismatch("", 0, 0, 1, 2, -0.7, 0.6).within_rounding


def test_a_sampled_tokens_lead(trio, prompts):
    """It is its logit over the temperature and its noise, less the other's."""
    text = NaiveLoop(trio).generate(prompts[:1], 4, greedy=True).token_ids[0]
    other, temperature, seed = (text[2] + 1) % trio.vocab_size, 0.5, 11
    place = NaiveLoop(trio), prompts[0], text, 2, other
    gap, rounding = lead(*place, temperature, seed)
    x = combined_logits(trio, [*prompts[0], *text[:2]])[None]
    params = RowParams.make(1, temperature=temperature, seed=seed, position=2)
    scores = reference.scores(reference.distribution(x, params), params, 0)[0]
    # As above, divided by the temperature.
    assert gap == pytest.approx(float(scores[text[2]] - scores[other]), abs=2e-4)
    assert rounding == pytest.approx(lead(*place)[1] / temperature)


def generation_of(seconds, **counts):
    return Generation([[1] * len(row) for row in seconds], seconds, counts)


def test_record_arithmetic():
    """Two rows of three tokens; ours takes half of naive's time, repeat 2 twice that of 1."""
    times = {
        name: Times(
            [
                generation_of([[scale * s for s in (0.5, 0.6, 0.8)]] * 2, useful_slot_steps=4,
                              emitted=4)
                for scale in (first, 2 * first)
            ]
        )
        for name, first in (("naive", 2.0), ("ours", 1.0))
    }  # fmt: skip
    forwards = [
        {"base": [0.04 * s, 0.05 * s, 0.09 * s], "expert": [0.03 * s], "anti": [0.02 * s]}
        for s in (1, 2)
    ]
    record = record_of(Case(2, 10, 3), "ours", times, forwards)
    # 6 tokens in 0.8 s and in 1.6 s; the steps of a repeat are 0.1 and 0.2 s, median 0.15.
    assert record["tokens_per_second"]["median"] == pytest.approx((7.5 + 3.75) / 2)
    assert record["first_token_ms"]["median"] == pytest.approx(750)
    assert record["arrival_ms"]["p50"] == pytest.approx(200)
    assert record["token_ms"]["median"] == pytest.approx((150 + 300) / 2)
    assert record["bare_forwards_ms"] == pytest.approx(
        {"base": 75, "expert": 45, "anti": 30, "sum": 150}
    )
    assert record["step_over_forwards"]["median"] == pytest.approx(1.5)
    # A repeat's forwards: medians 50 + 30 + 20, means 60 + 30 + 20, times 1 and 2.
    assert record["token_over_forwards"]["median"] == pytest.approx(150 / 110)
    assert list(record["speed_over"]) == ["naive"]
    assert record["speed_over"]["naive"]["median"] == pytest.approx(2.0)
    assert record["token_speed_over"]["naive"]["median"] == pytest.approx(2.0)
    assert record["first_token_speed_over"]["naive"]["median"] == pytest.approx(2.0)
    assert record["acceptance"] is None
    assert record["tokens_per_base_forward"] == 1.0


def test_tokens_that_come_together_are_one_arrival():
    """Five tokens: the first, three 0.3 s later, one 0.1 s after those; two rounds of drafts."""
    seconds = [[1.0, 1.3, 1.3, 1.3, 1.4]]
    one = generation_of(seconds, emitted=4, useful_slot_steps=2, drafted=5, accepted=2)
    times = Times([one] * 2)
    record = record_of(Case(1, None, 5), "spec", {"spec": times}, [{"base": [0.1]}] * 2)
    assert times.arrivals == [[pytest.approx(0.3), pytest.approx(0.1)]] * 2
    assert record["token_ms"]["median"] == pytest.approx(100)
    assert record["token_over_forwards"]["median"] == pytest.approx(1.0)
    assert record["step_over_forwards"]["median"] == pytest.approx(2.0)
    assert record["acceptance"] == pytest.approx(0.4)
    assert record["tokens_per_base_forward"] == pytest.approx(2.0)


def test_all_have_the_same_prompts_in_a_repeat(trio, prompts):
    seen = []

    class Noted:
        name, set_up_seconds = "noted", 0.0

        def generate(self, given, max_tokens):
            seen.append(given)
            return generation_of([[0.1, 0.2, 0.3]])

    ran: list[str] = []
    work = Work(Case(1, 10, 3), [prompts[:1], prompts[1:2]])
    noted: Any = Noted()
    [record] = throughput.time_case(trio.models, [noted], work, 3, ran.append)
    assert ran == ["B=1 (10, 3): noted", "B=1 (10, 3): bare forwards"] * 4
    # The warm-up's is the first repeat's; then they take turns.
    assert seen == [prompts[:1], prompts[:1], prompts[1:2], prompts[:1]]
    assert record["repeats"] == record["step_over_forwards"]["count"] == 3
    assert set(record["bare_forwards_ms"]) == {"base", "expert", "anti", "sum"}


def test_cases():
    assert parse_cases("1,4", "8:16") == (Case(1, 8, 16), Case(4, 8, 16))
    assert parse_cases("1", "own:8,own:9", "code") == (Case(1, None, 8), Case(1, None, 9))
    for sizes, lengths, prompts, message in (
        ("0", "8:8", "text", "--batch-sizes"),
        ("1", "8", "text", "prompt:output"),
        ("1", "8:1:1", "text", "prompt:output"),
        ("1", "8:1", "text", "--lengths"),
        ("1", "any:8", "text", "--lengths"),
        ("1", "own:8", "text", "prompt:output pairs with text"),
        ("1", "8:8", "code", "own:output pairs with code"),
    ):
        with pytest.raises(typer.BadParameter, match=message):
            parse_cases(sizes, lengths, prompts)


def settings(**changes):
    values = {
        "trio": "tiny", "dtype": None, "providers": ("naive",), "prompts": "text",
        "cases": (Case(1, 8, 4),), "sampling": Sampling(), "repeats": 2, "memory": False,
    }  # fmt: skip
    return throughput.Settings(**{**values, **changes})


def test_work_of_own_lengths_and_past_the_context(trio, monkeypatch):
    """Byte tokens: prompts of 2, 3, 2, 2 and 3 tokens, the third's solution too short."""
    listed = [("ab", "wxyz"), ("abc", None), ("xx", "w"), ("cd", "wxyz"), ("def", "wxyz")]
    monkeypatch.setattr(trios, "task_prompts", lambda kind, name: listed)
    cases = (Case(1, None, 4), Case(2, None, 4))
    one, two = throughput.make_work(trio, settings(prompts="code", cases=cases, repeats=3))
    encode = trio.tokenizer.encode
    assert one.batches == [[encode("ab")], [encode("abc")], [encode("cd")]]
    assert two.batches == [[encode("ab"), encode("cd")], [encode("abc"), encode("def")]]
    assert (one.longest, two.longest) == (7, 7)
    with pytest.raises(ValueError, match="3 of one length"):
        trios.task_batches(trio, "tiny", "code", 3, 4, 1)
    with pytest.raises(typer.BadParameter, match="context of 64.*got 60:5"):
        throughput.make_work(trio, settings(cases=(Case(1, 60, 5),)))


def test_prompts(trio):
    cut = make_prompts(trio, 3, 2000)
    assert [len(prompt) for prompt in cut] == [2000] * 3
    assert cut[0] != cut[1]
    assert trio.tokenizer.decode(cut[0][:12]) == "When on boar"
    for name, form in (("shipped", r" \d [+-] \d = \d+\n#### \d+"), ("qwen", r" .*\n#### \d+")):
        drawn = trios.task_prompts("arithmetic", name)
        assert len({text for text, _ in drawn}) > 100
        assert all(re.fullmatch(form, solution or "") for _, solution in drawn)
    heads = trios.task_prompts("code", "qwen")
    assert len(heads) == 12
    for text, _ in heads:
        [function] = ast.parse(text + "    raise NotImplementedError\n").body
        assert isinstance(function, ast.FunctionDef)
        assert ">>> " in (ast.get_docstring(function) or "")
    with pytest.raises(ValueError, match="arithmetic or code, got 'text'"):
        trios.task_prompts("text", "qwen")
    tokenizer = AutoTokenizer.from_pretrained(files("proxytune_kernels") / "data" / "trio")
    solved = [solution or "" for _, solution in trios.task_prompts("arithmetic", "shipped")]
    lengths = sorted(len(tokenizer.encode(solution)) for solution in solved)
    assert lengths[len(lengths) // 2] == trios.task_tokens("shipped")


def test_providers_that_cannot_run_are_left_out(trio, tmp_path, capsys):
    bare = TrioForms(trio, tmp_path)
    elsewhere = ("llama.cpp", "ours-llama.cpp", "ours-shared-pair", "ours-packed")
    wanted = settings(providers=("naive", "ours", *elsewhere))
    works = throughput.make_work(trio, wanted)
    made = throughput.make_providers(bare, wanted, works)
    assert [provider.name for provider in made] == ["naive", "ours"]
    said = capsys.readouterr().out
    assert "\nllama.cpp is left out: there is no " in f"\n{said}"
    assert "ours-llama.cpp is left out: there is no " in said
    assert "ours-shared-pair is left out: the expert has no adapter" in said
    assert "ours-packed is left out: " in said  # its weights are fp32


class _LlamaServer:
    """Streams as xllamacpp's does: a token within a character has no text, and no event."""

    def __init__(self, given: Any) -> None:
        assert (given.n_parallel, given.n_ctx, given.cache_prompt) == (2, 2 * 72, False)
        assert given.cpuparams.n_threads == torch.get_num_threads()

    def handle_completions(self, asked: dict[str, Any], take: Callable[[Any], None]) -> None:
        assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.0, 1.0, 0)
        for _ in range(asked["max_tokens"] - 2):
            take({"choices": [{"text": "a"}]})
        took = asked["max_tokens"] - asked["prompt"][0]
        take({"choices": [{"text": ""}], "usage": {"completion_tokens": took}})


def test_llama_cpp_gives_times_of_all_tokens(trio, tmp_path, monkeypatch):
    with pytest.raises(TrioMissing, match="there is no .*q4_k_m.gguf .*scripts/qwen_trio"):
        llama.LlamaProvider(trio, tmp_path, GREEDY, 2, 64)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / llama.FILE).touch()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(TrioMissing, match=r"pip install 'proxytune_kernels\[llama\]'"):
        llama.LlamaProvider(trio, tmp_path, GREEDY, 2, 64)

    def parameters() -> Any:
        return SimpleNamespace(
            model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
        )

    stand_in = SimpleNamespace(CommonParams=parameters, Server=_LlamaServer)
    monkeypatch.setitem(sys.modules, "xllamacpp", stand_in)
    provider = llama.LlamaProvider(trio, tmp_path, GREEDY, 2, 64)
    seconds = provider.generate([[0, 5], [0, 6]], 6).seconds
    assert [len(row) for row in seconds] == [6, 6]
    assert all(row == sorted(row) and row[0] > 0 for row in seconds)
    with pytest.raises(RuntimeError, match=r"llama.cpp gave \[6, 4\] tokens, not 6"):
        provider.generate([[0], [2]], 6)


def test_ours_runs_over_llama_cpp(gguf_trio, trio, tmp_path):
    directory = tmp_path / gguf_files.DIRECTORY
    directory.mkdir()
    for role, path in gguf_trio.files.items():
        (directory / f"{role}.gguf").hardlink_to(path)
    said = {"gguf_file": {role: f"{role}.gguf" for role in gguf_trio.files}, "runtime": "llama.cpp"}
    text = json.dumps({"format": 1, **dict.fromkeys(gguf_trio.files, "."), **said})
    (directory / "trio.json").write_text(text)
    provider = make("ours-llama.cpp", TrioForms(trio, tmp_path))
    generation = provider.generate([[5, 6, 7]] * 2, MAX_TOKENS)
    assert [len(row) for row in generation.seconds] == [MAX_TOKENS] * 2


def test_results_of_different_runs_have_different_names():
    for prompts, sampling, quick, stem in (
        ("text", Sampling(), False, "throughput-qwen"),
        ("text", GREEDY, True, "throughput-qwen-greedy-quick"),
        ("arithmetic", Sampling(1.0, 1.0), False, "throughput-qwen-arithmetic-t1-p1"),
    ):
        assert result_stem("trios/qwen", prompts, sampling, quick) == stem


def test_absent_trio_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trios, "REPOSITORY", tmp_path)
    monkeypatch.setattr(trios, "SHIPPED", tmp_path)
    for name, message in (
        ("qwen", r"python scripts/qwen_trio\.py"),
        ("shipped", r"python scripts/train_trio\.py"),
        ("nowhere", r"directory with a trio\.json"),
    ):
        with pytest.raises(TrioMissing, match=message):
            trios.find_trio(name)


def test_command(records_of, trio_directory, tmp_path, monkeypatch):
    # Processes of their own take 5 s each; benchmarks.evaluation's test starts one.
    monkeypatch.setattr(throughput, "in_fresh_process", lambda peaks, *given: peaks(*given))
    records, said = records_of(
        throughput.main, "--trio", trio_directory, "--lengths", "8:3", "--batch-sizes", "1,2",
        "--repeats", 2, "--providers", "ours,naive,base-only,ours-shared-pair,ours-speculative",
    )  # fmt: skip
    names = ["naive", "base-only", "ours", "ours-speculative"]
    assert [(r["batch_size"], r["provider"]) for r in records] == [
        (size, name) for size in (1, 2) for name in names
    ]
    assert "ours-shared-pair is left out" in said
    for record in records:
        assert record["trio"] == trio_directory.name
        assert record["dtype"] == {"base": "float32", "expert": "float32", "anti": "float32"}
        assert record["repeats"] == record["step_over_forwards"]["count"] == 2
        assert record["greedy_ties"] == []
        assert record["sampling"] == {"alpha": 1.0, "temperature": 0.7, "top_p": 0.9}
        assert record["peak_memory"]["total_bytes"] > record["peak_memory"]["extra_bytes"] >= 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_command_refuses_to_time_wrong_tokens(run_command, trio_directory, tmp_path, monkeypatch):
    def wrong(name, forms, sampling, rows, length):
        trio = forms.trio
        swapped = Trio.from_models(trio.base, trio.anti, trio.expert, trio.tokenizer)
        provider = DecoderProvider("ours", swapped, max_batch_size=rows)
        provider.trio = trio
        return provider

    monkeypatch.setattr(throughput, "make_provider", wrong)
    output = tmp_path / "out.jsonl"
    arguments = ("--trio", trio_directory, "--lengths", "8:3", "--output", output)
    result = run_command(throughput.main, *arguments)
    assert result.exit_code == 1
    assert "nothing is timed" in result.output
    assert not output.exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--trio", "nowhere", "trio.json"), ("--providers", "mine", "'mine'"),
     ("--prompts", "prose", "--prompts must be one of text")],
)  # fmt: skip
def test_a_mistake_is_one_sentence(run_command, option, value, message):
    result = run_command(throughput.main, option, value)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output
