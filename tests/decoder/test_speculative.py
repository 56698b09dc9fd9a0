"""Coupled speculation gives plain decoding's tokens; what is drafted changes only how fast.

The models are fp64, and their logits reach the sampler rounded to fp32: forwards of other shapes
differ by some 1e-15, which the rounding hides but for about one logit in 10^8.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from proxytune_kernels.decoder import Decoder, RequestOutput, Speculation
from proxytune_kernels.params import FILTER_ORDERS, SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import noisy_copy, tiny_llama

Make = Callable[..., Decoder]
Requests = tuple[list[Any], list[SamplingParams]]

# A logit that the rounding does not hide is one fp32 ulp off: 2^-18 for those below 64, as here.
# In a logprob it counts twice, for the token and for the sum, and over temperatures of 0.3 or more.
LOGPROB_TOLERANCE = 2 * 2**-18 / 0.3


@pytest.fixture(scope="module")
def trios(tokenizer: Any) -> dict[str, Trio]:
    """By how much of what the expert drafts is accepted: little, some, all."""

    def model(seed: int) -> Any:
        heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
        return tiny_llama(seed, 16, 1, max_position_embeddings=512, **heads)

    base = model(0)
    pair = noisy_copy(base, 0.05, 1), noisy_copy(base, 0.05, 2)
    return {
        "unrelated": Trio.from_models(base, model(1), model(2), tokenizer),
        "near": Trio.from_models(base, *pair, tokenizer),
        "same": Trio.from_models(base, base, base, tokenizer),
    }


def random_prompt(rng: random.Random) -> Any:
    """Of up to 40 tokens, the same or another for each role."""

    def tokens(most: int) -> list[int]:
        return [rng.randrange(3, 262) for _ in range(rng.randint(1, most))]

    if rng.random() < 0.6:
        return tokens(40)
    return {role: tokens(20) for role in ("base", "expert", "anti")}


def random_params(rng: random.Random, longest: int) -> SamplingParams:
    """Every filter, on or off, and every way to end a request."""
    max_tokens = rng.choice([1, 2, 5, longest // 2, longest, longest])
    temperature = rng.choice([0.0, 0.3, 0.7, 1.0, 1.0, 1.4, 2.0])
    return SamplingParams(
        alpha=rng.choice([1.0, 1.0, 0.5, 2.0, -0.5, 0.0]),
        temperature=temperature,
        top_k=rng.choice([0, 0, -1, 3, 40]),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.7]),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.1]),
        filter_order=rng.choice(FILTER_ORDERS),
        seed=rng.getrandbits(64),
        max_tokens=max_tokens,
        min_tokens=min(max_tokens, rng.choice([0, 0, 3, 30])),
        stop_token_ids=rng.choice([(), (), rng.sample(range(262), 4)]),
        stop=rng.choice([(), (), ("st", "\u0120"), ("e", "op")]),
        ignore_eos=rng.random() < 0.5,
    )


def random_requests(seed: int, count: int, longest: int) -> Requests:
    rng = random.Random(seed)
    prompts = [random_prompt(rng) for _ in range(count)]
    return prompts, [random_params(rng, longest) for _ in range(count)]


def assert_same(output: RequestOutput, plain: RequestOutput) -> None:
    """One request, decoded in two ways."""
    assert output.token_ids == plain.token_ids
    assert output.text == plain.text
    assert (output.finish_reason, output.stop_reason) == (plain.finish_reason, plain.stop_reason)
    assert output.status == plain.status == 0
    assert output.logprobs == pytest.approx(plain.logprobs, rel=0, abs=LOGPROB_TOLERANCE)
    assert output.raw_logprobs == pytest.approx(plain.raw_logprobs, rel=0, abs=LOGPROB_TOLERANCE)


def total_tokens(outputs: list[RequestOutput]) -> int:
    return sum(len(output.token_ids) for output in outputs)


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
def test_coupled_tokens_are_plain_decodings(
    trios: dict[str, Trio], make_decoder: Make, case: int
) -> None:
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


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize("drafts", [1, 2, 5, 8])
def test_a_drafter_that_is_the_target_is_always_right(
    trios: dict[str, Trio], make_decoder: Make, mode: str, drafts: int
) -> None:
    """Acceptance 1: every round gives its drafts and one token more; the last what was left."""
    speculation = Speculation(mode=mode, max_drafts=drafts, adaptive=False)
    decoder = make_decoder(trios["same"], 3, speculation=speculation)
    lengths = [1 + 3 * (drafts + 1), 1, 2, 3 + 2 * (drafts + 1), drafts + 1]
    params = [
        SamplingParams(max_tokens=n, seed=n, temperature=0.9, top_p=0.9, ignore_eos=True)
        for n in lengths
    ]
    for output, n in zip(decoder.generate(["hello"] * 5, params), lengths, strict=True):
        whole, rest = divmod(n - 1, drafts + 1)
        stats = output.speculation
        assert stats is not None
        # A last round of one token drafts nothing: it is a plain step, or a round beside others.
        assert stats.emitted_per_round in (
            [drafts + 1] * whole + [rest] * (rest > 0),
            [drafts + 1] * whole + [rest] * (rest > 1),
        )
        assert stats.drafted == stats.accepted == whole * drafts + max(0, rest - 1)
        assert len(output.token_ids) == n


def test_the_last_token_needs_no_drafts(trios: dict[str, Trio], make_decoder: Make) -> None:
    """1 token of the prompt, two whole rounds, and 1 that is left: a plain step."""
    speculation = Speculation(max_drafts=4, adaptive=False)
    decoder = make_decoder(trios["same"], 1, speculation=speculation)
    decoder.generate("hello", SamplingParams(max_tokens=12, seed=1, ignore_eos=True))
    counts = decoder.statistics()
    assert (counts["speculative_rounds"], counts["plain_steps"]) == (2, 1)
    assert (counts["drafted"], counts["accepted"], counts["emitted"]) == (8, 8, 11)
    assert counts["base_forwards"] == counts["slot_steps"] == counts["useful_slot_steps"] == 3


def test_drafts_leave_out_what_may_not_end_the_text_yet(
    trios: dict[str, Trio], make_decoder: Make
) -> None:
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
    trios: dict[str, Trio], make_decoder: Make, monkeypatch: pytest.MonkeyPatch,
    cost: float, pays: bool,
) -> None:  # fmt: skip
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
        assert 1 <= counts["speculative_rounds"] <= 4 and counts["plain_steps"] >= 140


def test_unrelated_models_accept_little_and_near_ones_more(
    trios: dict[str, Trio], make_decoder: Make
) -> None:
    rates = {}
    for kind, trio in trios.items():
        speculation = Speculation(max_drafts=3, adaptive=False)
        decoder = make_decoder(trio, 16, speculation=speculation)
        params = [SamplingParams(seed=i, max_tokens=50, ignore_eos=True) for i in range(16)]
        decoder.generate(["hello"] * 16, params)
        counts = decoder.statistics()
        rates[kind] = counts["accepted"] / counts["drafted"]
    assert rates["unrelated"] < 0.3 < rates["near"] < 0.9 < rates["same"] == 1


DRAFTERS = ("expert", "prompt_lookup")


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_tokens_do_not_depend_on_what_shares_the_batch(
    trios: dict[str, Trio], make_decoder: Make, mode: str, drafter: str
) -> None:
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
def test_a_request_that_just_fits(trios: dict[str, Trio], make_decoder: Make, mode: str) -> None:
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


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_statistics_add_up(
    trios: dict[str, Trio], make_decoder: Make, mode: str, drafter: str, adaptive: bool
) -> None:
    speculation = Speculation(drafter=drafter, mode=mode, max_drafts=3, adaptive=adaptive)
    decoder = make_decoder(trios["near"], 4, speculation=speculation)
    prompts, params = random_requests(5, 20, 60)
    outputs = decoder.generate(prompts, params)
    rounds = [output.speculation for output in outputs]
    assert all(stats is not None for stats in rounds)
    for output, p, stats in zip(outputs, params, rounds, strict=True):
        assert stats is not None
        assert 0 <= stats.accepted <= stats.drafted <= 3 * len(stats.emitted_per_round)
        assert all(1 <= n <= 4 for n in stats.emitted_per_round)
        # Each round emits what it accepted and one token more.
        assert stats.accepted == sum(stats.emitted_per_round) - len(stats.emitted_per_round)
        in_rounds = sum(stats.emitted_per_round)
        if output.finish_reason == "length":
            # The first token comes with the prompt, others from plain steps.
            assert in_rounds <= len(output.token_ids) - 1
            if not adaptive and drafter == "expert" and p.alpha:
                # A step is plain only where no row that can draft has two tokens left.
                assert in_rounds >= len(output.token_ids) - 2
        else:
            assert in_rounds <= len(output.token_ids) - 1 + 3  # a stop cuts a round
    counts = decoder.statistics()
    assert counts["drafted"] == sum(s.drafted for s in rounds if s is not None)
    assert counts["accepted"] == sum(s.accepted for s in rounds if s is not None)
    assert counts["base_forwards"] == counts["plain_steps"] + counts["speculative_rounds"]
    assert counts["slot_steps"] == 4 * counts["base_forwards"]
    # A row's step emits one token, and those that it accepted.
    assert counts["emitted"] == counts["useful_slot_steps"] + counts["accepted"]
    assert counts["useful_slot_steps"] <= counts["slot_steps"]
    assert total_tokens(outputs) <= counts["emitted"] + len(outputs)


def test_streamed_events_hold_whole_rounds(trios: dict[str, Trio], make_decoder: Make) -> None:
    speculation = Speculation(max_drafts=3, adaptive=False)
    decoder = make_decoder(trios["same"], 1, speculation=speculation)
    params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True)
    events = list(decoder.stream("hello", params))
    assert [len(event.token_ids) for event in events] == [1, 4, 4]
    output = events[-1].output
    assert output is not None
    assert [i for event in events for i in event.token_ids] == output.token_ids
    assert [p for event in events for p in event.logprobs] == output.logprobs


def test_unsteered_requests_rest_the_pair(
    trios: dict[str, Trio], make_decoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alpha 0 has no expert to draft; the text's own drafts go on."""
    params = SamplingParams(alpha=0.0, temperature=0.0, max_tokens=40, ignore_eos=True)
    for drafter in DRAFTERS:
        speculation = Speculation(drafter=drafter, max_drafts=3, adaptive=False)
        decoder = make_decoder(trios["near"], 2, speculation=speculation)

        def never(*_: Any) -> None:
            raise AssertionError("the pair runs")

        for role in ("expert", "anti"):
            monkeypatch.setattr(decoder._runner.members[role,], "forward", never)
        [output] = decoder.generate([[9, 8, 9, 8, 9, 8]], params)
        assert len(output.token_ids) == 40
        stats = output.speculation
        assert stats is not None
        assert (stats.drafted > 0) == (drafter == "prompt_lookup")


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_a_row_with_nothing_to_draw_fails_alone(
    trios: dict[str, Trio], make_decoder: Make, mode: str
) -> None:
    """In a round, at the latest where plain decoding would: NaN of a draft reaches the queries
    before it, too (its weight is 0, and 0 * NaN is NaN)."""
    trio = trios["near"]
    params = SamplingParams(alpha=0.3, temperature=0, max_tokens=30, ignore_eos=True)
    first, second = make_decoder(trio).generate(["hello", "a"], params)
    at = next(
        i for i, token_id in enumerate(first.token_ids)
        if i > 2 and token_id not in [*first.token_ids[:i], *second.token_ids]
    )  # fmt: skip
    speculation = Speculation(mode=mode, max_drafts=5, adaptive=False)
    decoder = make_decoder(trio, 2, speculation=speculation)
    weight = trio.base.model.embed_tokens.weight
    kept = weight[first.token_ids[at]].clone()
    good, bad = decoder.stream("a", params), decoder.stream("hello", params)
    next(good)
    emitted: list[int] = []
    with torch.no_grad():
        weight[first.token_ids[at]] = torch.nan
    try:
        with pytest.raises(RuntimeError, match=r"prompts\[0\]: no token can be drawn at pos"):
            for event in bad:
                emitted += event.token_ids
        rest = list(good)
    finally:
        with torch.no_grad():
            weight[first.token_ids[at]] = kept
    assert 0 < len(emitted) <= at + 1
    assert emitted == first.token_ids[: len(emitted)]
    assert rest[-1].output is not None
    assert rest[-1].output.token_ids == second.token_ids


def test_no_speculation_no_statistics(trios: dict[str, Trio], make_decoder: Make) -> None:
    decoder = make_decoder(trios["near"], 1)
    [output] = decoder.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))
    assert output.speculation is None
    assert decoder.info()["speculation"] is None
    assert decoder.statistics()["drafted"] == 0
