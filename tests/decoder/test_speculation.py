"""Coupled speculation gives plain decoding's tokens; what is drafted changes only how fast.

The models are fp64, and their logits reach the sampler rounded to fp32: forwards of other shapes
differ by some 1e-15, which the rounding hides but for about one logit in 10^8.
"""

from __future__ import annotations

from typing import Any

import pytest

from proxytune_kernels.decoder import Speculation
from proxytune_kernels.params import SamplingParams
from tests.decoder.random_requests import assert_same, random_requests, total_tokens

# Twelve cases of at least 8,500 tokens each: more than 10^5 in all.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("unrelated", {"max_drafts": 1, "adaptive": False}),
    ("near", {"max_drafts": 2, "adaptive": False}),
    ("near", {"max_drafts": 3, "adaptive": False}),
    ("near", {"max_drafts": 4, "adaptive": False}),
    ("unrelated", {"max_drafts": 5, "adaptive": False}),
    ("same", {"max_drafts": 6, "adaptive": False}),
    ("near", {"max_drafts": 7, "adaptive": False}),
    ("near", {"max_drafts": 8, "adaptive": False}),
    ("near", {}),
    ("same", {"max_drafts": 12}),
    ("near", {"drafter": "prompt_lookup", "max_drafts": 5, "adaptive": False}),
    ("unrelated", {"drafter": "prompt_lookup"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)))
def test_coupled_tokens_are_plain_decodings(trios, make_decoder, case):
    kind, settings = CASES[case]
    prompts, params = random_requests(case, 180, 230)
    plain = make_decoder(trios[kind], 64).generate(prompts, params)
    decoder = make_decoder(trios[kind], 64, speculation=Speculation(**settings))
    outputs = decoder.generate(prompts, params)
    for output, wanted in zip(outputs, plain, strict=True):
        assert_same(output, wanted)
    assert total_tokens(outputs) >= 8_500
    # The test means little unless drafts were kept, refused, and cut by an end.
    counts = decoder.statistics()
    assert counts["accepted"] > 0
    assert kind == "same" or counts["accepted"] < counts["drafted"]


def test_drafts_leave_out_what_may_not_end_the_text_yet(trios, make_decoder):
    """With nearly every token a stop token before min_tokens, too, the same is drafted as drawn."""
    speculation = Speculation(max_drafts=4, adaptive=False)
    decoder = make_decoder(trios["same"], 2, speculation=speculation)
    params = SamplingParams(
        max_tokens=40, min_tokens=33, seed=4, temperature=2.0, stop_token_ids=range(6, 262)
    )
    plain = make_decoder(trios["same"], 2).generate(["hello", "a"], params)
    for output, wanted in zip(decoder.generate(["hello", "a"], params), plain, strict=True):
        assert_same(output, wanted)
        assert max(output.token_ids[:33]) < 6 <= output.token_ids[-1]
        assert output.finish_reason == "stop"
    counts = decoder.statistics()
    assert counts["accepted"] == counts["drafted"] > 0


@pytest.mark.parametrize(("cost", "pays"), [(0.1, True), (3.0, False)])
def test_drafts_follow_the_clock_and_tokens_do_not(
    trios, make_decoder, monkeypatch,
    cost, pays,
):  # fmt: skip
    """On a clock on which a draft takes ``cost`` plain steps."""
    params = [SamplingParams(max_tokens=160, seed=i, ignore_eos=True) for i in range(2)]
    plain = make_decoder(trios["same"], 2).generate(["hello", "a"], params)
    decoder = make_decoder(trios["same"], 2, speculation=Speculation(max_drafts=6))
    controller = decoder._controller
    assert controller is not None
    observe = controller.observe_time

    def on_the_clock(rows: int, drafts: int, seconds: float) -> None:
        assert seconds > 0
        observe(rows, drafts, 1 + cost * drafts)

    monkeypatch.setattr(controller, "observe_time", on_the_clock)
    for output, wanted in zip(decoder.generate(["hello", "a"], params), plain, strict=True):
        assert_same(output, wanted)
    counts = decoder.statistics()
    if pays:
        # A plain step to time it, rounds of up to seven tokens, and a short one at the end.
        assert counts["plain_steps"] <= 3 and counts["speculative_rounds"] <= 40
    else:
        # Of each size the first is not timed.
        assert 1 <= counts["speculative_rounds"] <= 8 and counts["plain_steps"] >= 130


DRAFTERS = ("expert", "prompt_lookup")


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_tokens_do_not_depend_on_what_shares_the_batch(trios, make_decoder, mode, drafter):
    """Nor on alpha 0 and near ends, where a row has fewer drafts than the others, or none."""
    speculation = Speculation(drafter=drafter, mode=mode, max_drafts=4, adaptive=False)
    prompts, params = random_requests(77, 24, 24)
    single = make_decoder(trios["near"], 1, speculation=speculation)
    alone = [
        output for prompt, p in zip(prompts, params, strict=True)
        for output in single.generate([prompt], p)
    ]  # fmt: skip
    assert {p.alpha for p in params} >= {0.0, 1.0} and {p.max_tokens for p in params} >= {1, 2, 5}
    for max_batch_size, step in ((2, 1), (5, -1), (24, 1)):
        decoder = make_decoder(trios["near"], max_batch_size, speculation=speculation)
        together = decoder.generate(prompts[::step], params[::step])
        for output, wanted in zip(together[::step], alone, strict=True):
            assert_same(output, wanted)
    assert decoder.statistics()["accepted"] > 0


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_a_request_that_just_fits(trios, make_decoder, mode):
    """The last drafts are written past max_seq_len; beside it, a slot starts anew."""
    speculation = Speculation(mode=mode, max_drafts=8, adaptive=False)
    decoder = make_decoder(trios["same"], 2, max_seq_len=24, speculation=speculation)
    roomy = make_decoder(trios["same"], 2, speculation=speculation)
    prompts = [[5] * 9, [7] * 24, [8] * 2]
    params = [SamplingParams(max_tokens=n, seed=n, ignore_eos=True) for n in (16, 1, 23)]
    for output, wanted in zip(
        decoder.generate(prompts, params), roomy.generate(prompts, params), strict=True
    ):
        assert_same(output, wanted)
        assert output.finish_reason == "length"


def test_unsteered_requests_rest_the_pair(trios, make_decoder, monkeypatch):
    """Alpha 0 has no expert to draft; the text's own drafts go on."""
    params = SamplingParams(alpha=0.0, temperature=0.0, max_tokens=40, ignore_eos=True)
    for drafter in DRAFTERS:
        speculation = Speculation(drafter=drafter, max_drafts=3, adaptive=False)
        decoder = make_decoder(trios["near"], 2, speculation=speculation)

        def never(*_: Any) -> None:
            raise AssertionError("the pair runs")

        for role in ("expert", "anti"):
            monkeypatch.setattr(decoder._runner.models[role,], "forward", never)
        [output] = decoder.generate([[9, 8, 9, 8, 9, 8]], params)
        assert len(output.token_ids) == 40
        stats = output.speculation
        assert stats is not None
        assert (stats.drafted > 0) == (drafter == "prompt_lookup")
