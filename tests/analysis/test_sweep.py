"""Sweeps: curves whose best and suggested alpha are known, shared forwards, and the command."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="analyses need the extra analysis: scipy is not there")

import proxytune_kernels as ptk
from proxytune_kernels.analysis.sweep import (
    Curve,
    generate_texts,
    likelihoods,
    prompt_of,
    undominated,
)
from proxytune_kernels.cli.sweep import print_curves
from tests.cli import assert_one_sentence, invoke
from tests.decoder.conftest import near_trio
from tests.documents import examples

NOISE = np.random.default_rng(0).normal(size=50)


def test_the_suggested_alpha_is_the_lowest_that_is_not_told_from_the_best():
    better = np.tile([0.02, -0.01], 25)
    scores = [NOISE - 0.1, NOISE, NOISE + better, NOISE - 1]
    curve = Curve("score", (0.0, 0.5, 1.0, 1.5), [each.tolist() for each in scores])
    assert curve.best == 1
    assert [point.behind.value for point in curve.points] == pytest.approx([0.105, 0.005, 0, 1.005])
    # Paired: alpha 0 is behind at every prompt, if by less than prompts differ among each other.
    first = curve.points[0]
    assert first.behind.low > 0.09 and first.score.high > curve.points[2].score.low
    # Of 0.5 the prompts' differences are 0.02 and -0.01 in turn; their mean's error is 0.0021.
    assert curve.points[1].behind.low == pytest.approx(0.005 - 1.96 * 0.0021, abs=5e-4)
    assert curve.suggested == 1
    few = Curve("score", curve.alphas, [each[:10] for each in curve.scores])
    assert (few.best, few.suggested) == (1, 0.5)


def test_the_best_suggests_itself_where_nothing_is_known_of_the_spread():
    assert Curve("score", (0.0, 1.0), [[0.0], [1.0]]).suggested == 1
    assert Curve("score", (0.0, 1.0), [[1.0, 0.0], [0.0, 1.0]]).suggested == 0


def test_undominated_alphas():
    alphas = (0.0, 0.5, 1.0, 1.5)
    one = Curve("a", alphas, [[1.0], [2.0], [3.0], [3.0]])
    other = Curve("b", alphas, [[4.0], [5.0], [1.0], [2.0]])
    assert undominated(one, other) == [0.5, 1.5]
    assert undominated(one, one) == [1, 1.5]


@torch.no_grad()
def test_likelihoods_at_every_alpha_are_of_one_forward_of_each_text():
    trio = near_trio()
    calls: list[int] = []
    for model in trio.models.values():
        model.register_forward_hook(lambda *_: calls.append(1))
    texts, alphas = ["stop here", "no"], [0.0, 0.7, 2.0]
    found = likelihoods(trio, "a prompt", texts, alphas)
    assert len(calls) == 3 * len(texts)
    before = trio.tokenize("a prompt")["base"]
    for i, text in enumerate(texts):
        ids = trio.tokenizer.encode(text, add_special_tokens=False)
        rows = [m(torch.tensor([[*before, *ids]])).logits[0].double() for m in trio.models.values()]
        for a, alpha in enumerate(alphas):
            x = (rows[0] + alpha * (rows[1] - rows[2])).log_softmax(-1)
            wanted = sum(x[len(before) - 1 + j, token].item() for j, token in enumerate(ids))
            # fp32 of logits below 64, at two alphas' weight: some 1e-5 a token.
            assert found[a][i].logprob == pytest.approx(wanted, abs=1e-5 * len(ids))
            assert found[a][i].tokens == len(ids)


def test_texts_are_the_decoders_at_each_alpha():
    decoder = ptk.Decoder(near_trio(), 4, 64)
    params = ptk.SamplingParams(temperature=0.8, seed=3, max_tokens=6)
    prompts = ["ab", "c", "stop"]
    texts = generate_texts(decoder, prompts, [0.0, 1.5], params)
    for own, alpha in zip(texts, (0.0, 1.5), strict=True):
        each = ptk.SamplingParams(alpha=alpha, temperature=0.8, seed=3, max_tokens=6)
        assert own == [output.text for output in decoder.generate(prompts, each)]


def test_prompts_of_rows():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prompt_of({"prompt": "a", "messages": chat}) == "a"
    assert prompt_of({"messages": chat}) == prompt_of({"messages": chat[:1]}) == chat[:1]
    with pytest.raises(ValueError, match="must have prompt or messages, got 'text'"):
        prompt_of({"text": "a"})


def test_a_further_pair_is_swept_beside_a_fixed_one():
    near = near_trio()
    models = near.base, near.expert, near.anti, near.tokenizer
    trio = ptk.Trio.from_models(*models, pairs=[(near.expert, near.anti), (near.anti, near.expert)])
    # The first pair at 0.5, and its opposite at 0.25: at each strength the pair at that and 0.25.
    found = likelihoods(trio, "a", ["stop here"], [0.0, 0.5, 1.0], (0.5, 9.0, 0.25), pair=1)
    wanted = likelihoods(near, "a", ["stop here"], [0.25, 0.75, 1.25])
    for one, other in zip(found, wanted, strict=True):
        # Each x is a few roundings of numbers below 16 off, as is what it is held to.
        assert one[0].logprob == pytest.approx(other[0].logprob, abs=9 * 16 * 2.0**-20)
    params = ptk.SamplingParams(temperature=0, max_tokens=6, alpha=0.5, pair_alphas=(9.0, 0.25))
    texts = generate_texts(ptk.Decoder(trio, 2), ["a"], [0.0, 1.0], params, pair=1)
    alone = generate_texts(
        ptk.Decoder(near, 2), ["a"], [0.25, 1.25], params=replace(params, pair_alphas=())
    )
    assert texts == alone and texts[0] != texts[1]


def test_the_commands_of_the_documentation(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="plots need the extra analysis")
    monkeypatch.chdir(tmp_path)
    rows, scorer = examples("docs/sweep.md", "python")
    assert rows.count("range(60)") == 1
    exec(compile(rows.replace("range(60)", "range(3)"), "rows.py", "exec"), {})
    (tmp_path / "scorers.py").write_text(scorer)
    one, given, two = (shlex.split(command) for command in examples("docs/sweep.md", "sh"))
    result = invoke(*one[1:], "--alpha", "0:1:1")
    assert result.exit_code == 0, result.output
    assert re.search(r"^│ +1 │", result.stdout, re.M) and "suggested alpha: 1" in result.stdout
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    records = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert [(record["line"], record["alpha"]) for record in records] == [
        (line, alpha) for line in (1, 2, 3) for alpha in (0, 1)
    ]
    right = [record["scores"]["regex:#### (\\d+)"] for record in records]
    assert right == [0, 1] * 3 and all("#### " in r["text"] for r in records[1::2])
    result = invoke(*two[1:], "--alpha", "0:1:1", "--limit", 2)
    assert result.exit_code == 0, result.output
    assert "as good in the other: " in result.stdout and (tmp_path / "both.svg").exists()
    result = invoke(*given[1:], "--alpha", 1)
    assert result.exit_code == 0 and "suggested alpha: 1" in result.stdout, result.output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--score", "choice"], 2, ["--prompts must be given for scorers of ours"]),
        (["--prompts", "x", "--score", "lm-eval:a"], 2, ["not for lm-eval's alone"]),
        (["--score", "what"], 2, ["a scorer must be regex:PATTERN"]),
        (["--score", "choice", "--score", "choice"], 2, ["given once, or twice"]),
        (
            ["--prompts", "rows.jsonl", "--score", "choice"],
            1,
            ["line 2: a row must have 'choices'"],
        ),
        (["--prompts", "rows.jsonl", "--score", "likelihood"], 1, ["line 2", "have 'completion'"]),
        (["--prompts", "none", "--score", "choice"], 1, ["No such file"]),
        (
            ["--prompts", "rows.jsonl", "--score", "likelihood", "--pair-alpha", "0:1:2"],
            1,
            ["pair_alphas must have a number for each", "which has 0"],
        ),
        (
            ["--score", "choice", "--alpha", "0:1:2", "--pair-alpha", "0:1:2"],
            2,
            ["--alpha and --pair-alpha must have one range in all"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('\n{"prompt": "a"}\n')
    assert_one_sentence(invoke("sweep", "--trio", "shipped", *arguments), code, *words)


def test_a_narrow_table_cuts_no_digit(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    scores = [[-1.5241, -1.5077, -1.5424], [-0.017622, -0.025491, -0.021553]]
    print_curves([Curve("likelihood", (0.25, 1.0), scores)])
    printed = capsys.readouterr().out
    assert "-0.02156" in printed and "\u2026" not in printed
