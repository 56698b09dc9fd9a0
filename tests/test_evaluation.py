"""scripts/evaluation.py: what the trios' scripts measure, against whole forwards of each text."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("transformers", reason="the trios' scripts need transformers (extra: hf)")

from scripts import evaluation
from tests.trio.checkpoints import tiny_qwen2

END = 0
ROLES = ("base", "expert", "anti")
rng = random.Random(3)


def ids(length: int) -> list[int]:
    return [rng.randrange(1, 260) for _ in range(length)]


PAIRS = [(ids(n), [*ids(m), END]) for n, m in ((5, 3), (1, 9), (12, 1), (3, 3), (8, 6))]


@pytest.fixture(scope="module")
def models() -> evaluation.Models:
    found = {}
    for seed, role in enumerate(ROLES):
        found[role] = tiny_qwen2(seed)
        with torch.no_grad():  # far from uniform, so that greedy texts vary with the prompt
            for parameter in found[role].parameters():
                parameter.mul_(4.0)
    return found


@torch.no_grad()
def mixed(models: evaluation.Models, text: list[int], alpha: float) -> torch.Tensor:
    """Logits [T, V] of the three, each by one forward over a whole text."""
    base, expert, anti = (models[role](torch.tensor([text])).logits[0].double() for role in ROLES)
    return base + alpha * (expert - anti)


def test_mixtures():
    names = evaluation.mixtures(("base", "direct"), (0.5,))
    assert list(names) == ["base", "direct", "proxy, alpha 0.5"]
    logits = {"base": [1.0, 2.0], "expert": [8.0, 16.0], "anti": [4.0, 64.0], "direct": [3.0, 5.0]}
    given = {name: torch.tensor([row]) for name, row in logits.items()}
    found = [evaluation.mix(given, weights).tolist() for weights in names.values()]
    assert found == [[[1.0, 2.0]], [[3.0, 5.0]], [[3.0, -22.0]]]


def test_labels_are_the_answers_and_nothing_else():
    input_ids, labels = evaluation.padded_batch(PAIRS, END)
    assert input_ids.shape == labels.shape
    for row, (prompt, answer) in enumerate(PAIRS):
        counted = (labels[row] != evaluation.IGNORED).nonzero()[:, 0].tolist()
        assert labels[row, counted].tolist() == answer
        # The first counted position has read the whole prompt, and no token of the answer.
        assert input_ids[row, : counted[0] + 1].tolist() == prompt
        assert input_ids[row, counted[1:]].tolist() == answer[:-1]


def test_nll_is_the_mean_over_answer_tokens(models):
    names = evaluation.mixtures(("base",), (0.5,))
    got = evaluation.answer_nll(models, names, PAIRS, END, rows=3)
    for alpha, name in ((0.0, "base"), (0.5, "proxy, alpha 0.5")):
        logprobs = []
        for prompt, answer in PAIRS:
            rows = mixed(models, prompt + answer, alpha).log_softmax(-1)
            logprobs += [rows[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
        # fp32 sums of at most 64 terms below 30, in another order, through two layers.
        assert got[name] == pytest.approx(-sum(logprobs) / len(logprobs), abs=1e-3)


def test_completions_are_those_of_a_loop_without_cache_or_padding(models):
    prompts = [prompt for prompt, _ in PAIRS]
    wanted = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(12):
            text.append(int(mixed(models, text, 1.5)[-1].argmax()))
        wanted.append(text[len(prompt) :])
    # Let the token that ends a text be one that the second row makes on its way: it must end there,
    # whatever the others still do.
    end = wanted[1][4]
    assert any(end not in row for row in wanted)
    cut = [row[: row.index(end)] if end in row else row for row in wanted]
    weights = evaluation.mixtures((), [1.5])["proxy, alpha 1.5"]
    assert evaluation.complete(models, weights, prompts, end, 12) == cut


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 3 + 4 = 7\n#### 7", 7),
        ("#### 17\n#### 4", 17),
        (" ####12", 12),
        ("#### -4 #### 5", -4),
        (" 7", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_stated_answer(text, answer):
    assert evaluation.stated_answer(text) == answer
