"""What lm_eval's own transformers model gives over the combined logits, ours gives too."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from proxytune_kernels.integrations.lm_eval_model import ProxyTuneLM
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import argmax, naive_loop
from tests.integrations.lm_eval.conftest import CONTEXT, make_trio, requests, tokenizer_with_bos

pytestmark = pytest.mark.slow

ALPHA = 0.7

CHOICES = (" yes", " no", " yes, both", "!", " neither of them")
QUESTIONS = ["Is it so?", "Does the stop of it stop?", "What", "x" * (CONTEXT - 6), "y" * 150]
PAIRS = [
    *((question, choice) for question in QUESTIONS for choice in CHOICES),
    *(("", choice) for choice in CHOICES),
    ("Is it so?  ", "yes"),  # the context's spaces go to the continuation
    ("Is it so?", " no"),  # twice
    ("<s>Is it so?", " no"),  # begins with BOS already
    ("short", "z" * CONTEXT),
]
TEXTS = ["", "a", "One text of ninety-six.", "x" * CONTEXT, "Many windows of text. " * 20]


@torch.no_grad()
def forward_error(trio: Trio) -> float:
    """How far a forward of this dtype is from that in fp64, combined: max over logits and texts.

    Measured on the models' own forwards. A forward of another shape (batch, padding, cache) makes
    the same roundings in another order.
    """
    error = 0.0
    for text in (QUESTIONS[1], TEXTS[3]):
        ids = torch.tensor([trio.tokenizer.encode(text)[:CONTEXT]])
        for role, model in trio.models.items():
            exact = copy.deepcopy(model).double()(ids, use_cache=False).logits
            own = float((model(ids, use_cache=False).logits - exact).abs().max())
            error += own if role == "base" else ALPHA * own
    return error


def per_token(trio: Trio) -> float:
    """Bound of a logprob's difference between two such forwards.

    Each is allowed 3 times the error that was measured once; a log-softmax moves by twice what its
    logits move by; and fp32 rounds logprobs below 64 by 2^-19 in either.
    """
    return 2 * 2 * 3 * forward_error(trio) + 2.0**-18


def tokens(lm: Any, pair: tuple[str, str]) -> int:
    return len(lm.tokenizer.encode(pair[1])) + 2  # and spaces of the context


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def any_trio(request: pytest.FixtureRequest) -> Trio:
    return make_trio(getattr(torch, request.param))


def same_scores(ours: Any, theirs: Any, pairs: Sequence[tuple[str, str]], bound: float) -> None:
    asked = requests("loglikelihood", *pairs)
    for pair, own, other in zip(
        pairs,
        ours.loglikelihood(asked, disable_tqdm=True),
        theirs.loglikelihood(asked, disable_tqdm=True),
        strict=True,
    ):
        assert own[0] == pytest.approx(other[0], abs=bound * tokens(ours, pair)), pair
        assert own[1] == other[1], pair


def test_loglikelihood(any_trio, make_hflm):
    theirs = make_hflm(any_trio, ALPHA, batch_size=3)
    bound = per_token(any_trio)
    assert bound < (1e-3 if any_trio.base.dtype == torch.float32 else 1.0)
    for batch_size in (1, 4):
        ours = ProxyTuneLM(any_trio, alpha=ALPHA, batch_size=batch_size)
        same_scores(ours, theirs, PAIRS, bound)


def test_greedy_continuations_are_known_as_such(trio, make_hflm):
    """What the models would say, as token ids, and the same with another token in it."""
    ours = ProxyTuneLM(trio, alpha=ALPHA, batch_size=4)
    theirs = make_hflm(trio, ALPHA, batch_size=4)
    asked = []
    for question in QUESTIONS[:3]:
        context = trio.tokenizer.encode(question)
        said = naive_loop(trio.models, dict.fromkeys(trio.roles, context), 5, _argmax)
        for end in (1, 3, 5):
            asked.append((None, context, said[:end]))
        for place in range(5):
            asked.append((None, context, [*said[:place], said[place] ^ 1, *said[place + 1 :]]))
    own = ours._loglikelihood_tokens(asked, disable_tqdm=True)
    other = theirs._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in other]
    assert [greedy for _, greedy in own] == ([True] * 3 + [False] * 5) * 3
    for (value, _), (wanted, _) in zip(own, other, strict=True):
        assert value == pytest.approx(wanted, abs=5 * per_token(trio))


def _argmax(logits: dict[str, torch.Tensor], _: int) -> int:
    return argmax(logits, ALPHA)


def test_rolling_texts_of_several_windows(any_trio, make_hflm):
    ours = ProxyTuneLM(any_trio, alpha=ALPHA, batch_size=4)
    theirs = make_hflm(any_trio, ALPHA, batch_size=4)
    asked = requests("loglikelihood_rolling", *((text,) for text in TEXTS[1:]))
    own = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    other = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    bound = per_token(any_trio)
    for text, value, wanted in zip(TEXTS[1:], own, other, strict=True):
        # HFLM adds fp32 logprobs in fp32: sums below 2^11 are rounded by 2^-13 a window.
        assert value == pytest.approx(wanted, abs=bound * len(text) + 6 * 2.0**-13)
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0]


@pytest.mark.parametrize("add_bos_token", (None, True, False))
def test_special_tokens(add_bos_token, make_hflm):
    trio = make_trio(tokenizer=tokenizer_with_bos())
    ours = ProxyTuneLM(trio, alpha=ALPHA, batch_size=4, add_bos_token=add_bos_token)
    theirs = make_hflm(trio, ALPHA, batch_size=4, add_bos_token=add_bos_token)
    for text in ("Is it so?", "<s>Is it so?", ""):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)
    same_scores(ours, theirs, PAIRS, per_token(trio))
    kwargs = {"max_gen_toks": 6, "until": ["\n"]}
    asked = [requests("generate_until", (text, kwargs)) for text in ("Is it so?", "<s>Is it so?")]
    for one in asked:
        assert ours.generate_until(one, disable_tqdm=True) == theirs.generate_until(one)


def test_another_prefix_and_a_shorter_context(trio, make_hflm):
    arguments: Any = {"prefix_token_id": 2, "max_length": 20, "batch_size": 3}
    ours = ProxyTuneLM(trio, alpha=ALPHA, **arguments)
    theirs = make_hflm(trio, ALPHA, **arguments)
    assert (ours.prefix_token_id, ours.max_length) == (2, 20)
    same_scores(ours, theirs, PAIRS[:-1], per_token(trio))
    asked = requests("loglikelihood_rolling", (TEXTS[-1],))
    own = ours.loglikelihood_rolling(asked, disable_tqdm=True)[0]
    bound = per_token(trio) * len(TEXTS[-1]) + 22 * 2.0**-13
    assert own == pytest.approx(theirs.loglikelihood_rolling(asked)[0], abs=bound)


GENERATION: list[tuple[str, dict[str, Any]]] = [
    ("Is it so?", {"until": ["e", "~"], "max_gen_toks": 30}),
    ("Is it so?", {"until": "stop", "max_new_tokens": 12}),
    ("Does it", {"until": [], "max_gen_toks": 40, "do_sample": False, "temperature": 0.7}),
    ("y" * 150, {"until": ["\n\n"], "max_gen_toks": 20}),
    ("What", {"max_gen_toks": 1}),
    ("What", {"until": ["</s>", "q"], "max_gen_toks": 50, "num_beams": 1}),
]


@pytest.mark.parametrize("batch_size", (1, 4))
def test_generated_texts(trio, make_hflm, batch_size):
    ours = ProxyTuneLM(trio, alpha=ALPHA, batch_size=batch_size)
    theirs = make_hflm(trio, ALPHA, batch_size=1)
    asked = requests("generate_until", *GENERATION)
    own = ours.generate_until(asked, disable_tqdm=True)
    known = {"num_beams"}  # the composite's generate() has none
    plain = [(text, {k: v for k, v in each.items() if k not in known}) for text, each in GENERATION]
    assert own == theirs.generate_until(requests("generate_until", *plain), disable_tqdm=True)
    assert len(set(own)) > 3
