"""Scores of every kind of model, against the log-softmax of its own whole forwards."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
)

from proxytune_kernels.decoder import scoring
from proxytune_kernels.decoder.model import check_model
from proxytune_kernels.decoder.scoring import Scorer
from proxytune_kernels.integrations.lm_eval_model import ProxyTuneLM
from proxytune_kernels.trio import Trio
from tests.decoder import test_runner
from tests.decoder.conftest import kind, word_tokenizer
from tests.decoder.test_runner import ARCHITECTURES, SIZES, random_ids

ALPHAS = (1.0, 0.0, -0.7)
MAX_LENGTH = 24


class TripleLogits(LlamaForCausalLM):
    """Does to its logits what its configuration does not say."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        output = super().forward(*arguments, **keywords)
        output.logits = 3 * output.logits
        return output


class AllLogits(LlamaForCausalLM):
    """Unknown to Head, and gives the logits of every position."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        output = super().forward(input_ids, use_cache=use_cache)
        output.logits = -output.logits
        return output


GPT2 = {name: SIZES[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
LLAMA = ARCHITECTURES["llama"][1]
KINDS: dict[str, tuple[Any, Any]] = {
    **ARCHITECTURES,
    "cohere-scale": kind("Cohere", SIZES, logit_scale=0.3),
    "granite-divisor": kind("Granite", SIZES, logits_scaling=3.0),
    "gpt2": kind("GPT2", GPT2, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "unknown-head": (TripleLogits, LLAMA),
    "unknown-head-all-logits": (AllLogits, LLAMA),
}
UNKNOWN = {"unknown-head", "unknown-head-all-logits"}


make = functools.partial(test_runner.make, kinds=KINDS)


def make_trio(base: str, pair: str) -> Trio:
    tokenizer = word_tokenizer(SIZES["vocab_size"])
    return Trio.from_models(make(base, 0), make(pair, 1), make(pair, 2), tokenizer)


LONG = random_ids(30, 1)
REQUESTS: list[tuple[list[int], list[int]]] = [
    # One context, longer than the windows: one-token ends, a common beginning, an end in it.
    *((random_ids(9, 0), random_ids(n, n)) for n in (1, 4, 2, 6)),
    (random_ids(9, 0), [4, 5, 6, 7]),
    (random_ids(9, 0), [4, 5, 7]),
    (random_ids(9, 0), [4, 5]),
    # Shorter contexts of several continuations: unequal padding in the same batch.
    *((random_ids(n, 7), random_ids(m, m)) for n in (1, 4, 13) for m in (2, 3, 6)),
    # Alone, and longer than what is run: the left of the context goes, of each by its own length.
    (random_ids(3, 8), random_ids(20, 9)),
    (LONG, [1, 2, 3]),
    (LONG, [1, 2, 4]),
    (LONG, [5]),
    (LONG, random_ids(MAX_LENGTH, 3)),
]  # fmt: skip


@torch.no_grad()
def whole_forwards(trio: Trio, alpha: float) -> list[tuple[float, bool, float]]:
    """(sum of logprobs, whether greedy, bound of the sum's error) by one forward per request.

    The models are fp64. A logit l is rounded to fp32 (u |l|, u = 2^-24), so is the difference of
    the pair, its product and x: E = u (|b| + |alpha| (2 |e| + 2 |a| + |e - a|) + |x|) at most, over
    the row. A log-softmax moves by 2 E then, and ``score`` rounds by 2^-24 (depth + |logprob| + 4 +
    ln V) as in tests/ops/test_score.py; depth and |logprob| are below 2 max |x| + ln V.
    """
    unit = 2.0**-24
    found = []
    for context, continuation in REQUESTS:
        ids = torch.tensor([(context + continuation)[-(MAX_LENGTH + 1) : -1]])
        rows = [
            m(ids, use_cache=False).logits[0, -len(continuation) :] for m in trio.models.values()
        ]
        b, e, a = (row[:, : trio.vocab_size] for row in rows)
        x = b + alpha * (e - a)
        logprobs = x.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
        tops = [row.abs().amax(1) for row in (b, e, a, e - a, x)]
        pair = abs(alpha) * (2 * tops[1] + 2 * tops[2] + tops[3])
        error = 2 * unit * (tops[0] + pair + tops[4]) + unit * (4 * tops[4] + 24)
        greedy = x.argmax(1).tolist() == continuation
        found.append((float(logprobs.sum()), greedy, float(error.sum())))
    return found


def scores(
    trio: Trio, alphas: Sequence[float], batch_size: int
) -> list[tuple[tuple[float, bool], ...]]:
    found: dict[int, tuple[tuple[float, bool], ...]] = {}
    Scorer(trio).score(
        REQUESTS, alphas, batch_size=batch_size, max_length=MAX_LENGTH, scored=found.__setitem__
    )
    assert sorted(found) == list(range(len(REQUESTS)))
    return [found[i] for i in range(len(REQUESTS))]


PAIRS = [
    *((kind, "llama") for kind in KINDS),
    ("llama", "mistral-window"),
    ("llama", "gemma2-softcap"),
    ("gpt2", "unknown-head"),
]
# Gemma 2's own eager attention takes its softmax in fp32, where masked keys round nothing but the
# others are rounded: 2^-24 in every weight of values of a few units, through two layers.
FP32_SOFTMAX = {"gemma2-softcap": 1e-4}


@pytest.mark.parametrize(("base", "pair"), PAIRS, ids=map("-".join, PAIRS))
def test_scores_are_those_of_whole_forwards(base, pair):
    trio = make_trio(base, pair)
    slack = max(FP32_SOFTMAX.get(base, 0.0), FP32_SOFTMAX.get(pair, 0.0))
    assert_right(trio, [scores(trio, ALPHAS, size) for size in (1, 5)], slack)


def assert_right(
    trio: Trio, runs: Sequence[Sequence[tuple[tuple[float, bool], ...]]], slack: float = 0.0
) -> None:
    for place, alpha in enumerate(ALPHAS):
        wanted = whole_forwards(trio, alpha)
        for found in runs:
            for each, (logprob, is_greedy, bound) in zip(found, wanted, strict=True):
                value, greedy = each[place]
                assert abs(value - logprob) <= bound + slack
                assert greedy == is_greedy


@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_how_is_said(kind):
    model = make(kind, 0)
    tokenizer = word_tokenizer(SIZES["vocab_size"])
    info = Scorer(Trio.from_models(model, tokenizer=tokenizer)).info()
    assert ("own forward" in info["logits"]["base"]) == (kind in UNKNOWN)
    assert info["contexts"]["base"].startswith("run with each") == (kind in UNKNOWN)
    if kind not in UNKNOWN:
        check_model("base", model)


def test_parts_of_any_size_give_the_same(monkeypatch):
    """One row of logits at a time, and two sequences."""
    trio = make_trio("llama", "mistral-window")
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 1)
    monkeypatch.setattr(scoring, "SHORT", 1)
    widths: list[int] = []

    def width(_: Any, __: Any, keywords: dict[str, Any]) -> None:
        widths.append(len(keywords["input_ids"]))

    with trio.base.base_model.register_forward_pre_hook(width, with_kwargs=True):
        assert_right(trio, [scores(trio, ALPHAS, 2)])
    assert max(widths) == 2


def test_tokens_that_not_every_role_has_are_never_produced():
    """The base's vocabulary is wider: what lies past the shared part scores -inf."""
    base, expert, anti = (make("llama", seed) for seed in range(3))
    wide = SIZES["vocab_size"] + 2
    base.resize_token_embeddings(wide, mean_resizing=False)
    narrow = word_tokenizer(SIZES["vocab_size"])
    tokenizers = {"base": word_tokenizer(wide), "expert": narrow, "anti": narrow}
    trio = Trio.from_models(base, expert, anti, tokenizers)
    found: dict[int, tuple[tuple[float, bool], ...]] = {}
    listed = [([3, 4], [5]), ([3, 4], [wide - 1]), ([3, 4], [5, wide - 1])]
    Scorer(trio).score(listed, [1.0], batch_size=2, max_length=9, scored=found.__setitem__)
    assert found[0][0][0] > -torch.inf
    assert found[1] == found[2] == ((-torch.inf, False),)
    lm = ProxyTuneLM(trio)
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 96\).* got 97"):
        lm._loglikelihood_tokens([(None, [97], [5])], disable_tqdm=True)


def test_positions_that_begin_elsewhere_are_the_models_own():
    """A shared context counts from 0, as most models do."""
    model = make("gpt2")
    right = model.transformer.forward

    @functools.wraps(right)
    def later(input_ids: Tensor, position_ids: Tensor | None = None, **keywords: Any) -> Any:
        if position_ids is None:
            position_ids = 2 + torch.arange(input_ids.shape[1])[None]
        return right(input_ids=input_ids, position_ids=position_ids, **keywords)

    assert scoring.RoleStates("anti", model, SIZES["vocab_size"]).contexts_apart is None
    model.transformer.forward = later
    states = scoring.RoleStates("anti", model, SIZES["vocab_size"])
    assert re.match("logits behind a cache differ by .* where round", states.contexts_apart or "")


def test_models_that_are_not_causal_are_refused():
    sizes = {**SIZES, "max_position_embeddings": 64}
    del sizes["num_key_value_heads"]
    model = BertLMHeadModel(BertConfig(**sizes)).double().eval()
    trio = Trio.from_models(model, tokenizer=word_tokenizer(SIZES["vocab_size"]))
    with pytest.raises(ValueError, match="base must be a causal model, got BertLMHeadModel"):
        Scorer(trio)
