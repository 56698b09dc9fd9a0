"""Scored prompts that go on from others: what a slot still holds of them is not run again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from proxytune_kernels.decoder import RequestOutput
from proxytune_kernels.decoder.speculation import Speculation
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder import tape
from tests.decoder.conftest import nan_token, near_trio
from tests.decoder.test_runner import random_ids

LAST = 5


@pytest.fixture(scope="module")
def near() -> Trio:
    return near_trio()


def scored(last: int = LAST, **settings: Any) -> SamplingParams:
    wanted = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 3, "ignore_eos": True}
    return SamplingParams(**{**wanted, "prompt_logprobs_last": last, **settings})


@torch.no_grad()
def assert_right(near: Trio, output: RequestOutput, params: SamplingParams) -> None:
    """The logprobs, and a greedy first token, are those of whole forwards; in fp64."""
    ids = output.prompt_token_ids["base"]
    x = {role: near.models[role](torch.tensor([ids])).logits[0] for role in near.roles}
    logprobs = (x["base"] + params.alpha * (x["expert"] - x["anti"])).log_softmax(-1)
    assert output.token_ids[0] == int(logprobs[-1].argmax())
    found = output.prompt_logprobs
    assert found is not None and len(found) == len(ids)
    last = min(params.prompt_logprobs_last, len(ids) - 1)
    assert found[: len(ids) - last] == [None] * (len(ids) - last)
    for i in range(len(ids) - last, len(ids)):
        told = found[i]
        assert told is not None and ids[i] in told
        for token_id, logprob in told.items():
            assert logprob == pytest.approx(float(logprobs[i - 1, token_id]), abs=1e-5)


def test_a_round_of_drafts_is_one_forward_of_the_tokens_that_it_scores(near, make_decoder):
    decoder = make_decoder(near, 8)
    texts = [random_ids(20 + seed, seed) for seed in range(8)]
    before = None
    for call in range(4):
        drafted = [[*text, *random_ids(LAST, call)] for text in texts]
        decoder.generate(drafted, scored())
        after = decoder.statistics()
        if before is not None:
            assert after["prefill_forwards"] - before["prefill_forwards"] == 1
            reused = after["reused_tokens"] - before["reused_tokens"]
            assert sum(map(len, drafted)) - reused == 8 * (LAST + 1)
        before = after
        # All drafts are kept, or the first of them and another token.
        texts = [
            x if i % 2 else [*t, x[len(t)]]
            for i, (t, x) in enumerate(zip(texts, drafted, strict=True))
        ]


def test_each_client_finds_its_own_text(near, make_decoder):
    """Calls of one request each: none is moved to a slot where another's text is."""
    decoder = make_decoder(near, 4)
    texts = [random_ids(40, seed) for seed in range(3)]
    for length in (20, 21, 22):
        for text in texts:
            before = decoder.statistics()["reused_tokens"]
            [output] = decoder.generate([text[:length]], scored())
            assert_right(near, output, scored())
            reused = decoder.statistics()["reused_tokens"] - before
            assert reused == (length - LAST - 1 if length > 20 else 0)


def test_a_text_that_begins_like_another_does_not_take_its_place(near, make_decoder):
    decoder = make_decoder(near, 2)
    shared = random_ids(4, 0)
    one, other = [*shared, *random_ids(20, 1)], [*shared, *random_ids(20, 2)]
    for text in (one, other, one, other):
        decoder.generate([text], scored())
    assert decoder.statistics()["reused_tokens"] == 2 * (24 - LAST - 1)


def test_a_short_beginning_is_not_worth_a_forward(near, make_decoder):
    decoder = make_decoder(near, 2)
    texts = [[*random_ids(4, 0), *random_ids(20, seed)] for seed in range(1, 5)]
    decoder.generate(texts[:2], scored())
    before = decoder.statistics()["prefill_forwards"]
    decoder.generate(texts[2:], scored())
    assert decoder.statistics()["prefill_forwards"] == before + 1
    assert decoder.statistics()["reused_tokens"] == 0


def test_a_caller_may_change_what_it_was_given(near, make_decoder):
    decoder = make_decoder(near, 1)
    [output] = decoder.generate([random_ids(20, 0)], scored())
    ids = output.prompt_token_ids["base"]
    ids[3] += 1
    [output] = decoder.generate([ids], scored())
    assert_right(near, output, scored())


def test_a_request_that_ended_holds_no_logits(near, make_decoder):
    """Neither of its prompt's end, nor of the part of it that was run before that."""
    decoder = make_decoder(near, 1)
    decoder.generate([random_ids(20, 0)], scored())
    stream = decoder.stream([[*random_ids(20, 0), *random_ids(12, 1)]], scored())
    assert [event.output is not None for event in stream] == [True]
    assert decoder.statistics()["reused_tokens"] == 20
    [request] = stream._requests
    assert request.prompt_logits == {}


def test_a_slot_that_keeps_has_a_place_for_a_step(near, make_decoder):
    """A captured step writes to the slots behind the last request's, too."""
    decoder = make_decoder(near, 1)
    prompt = random_ids(decoder.max_seq_len, 0)
    for _ in range(2):
        [output] = decoder.generate([prompt], scored())
        assert_right(near, output, scored())
        assert decoder._runner.lengths("base") == [decoder.max_seq_len - 1]


@pytest.mark.parametrize("pair", ["separate", "batched"])
@pytest.mark.parametrize("speculation", [None, Speculation(max_drafts=3)])
@pytest.mark.parametrize(("chunk", "taped"), [(4, False), (512, False), (24, True)])
def test_random_traffic(near, monkeypatch, greedy, pair, speculation, chunk, taped):
    """Scored texts that grow and shrink, steered and not, beside requests that take steps.

    Taped steps are a GPU's: padded, captured, and one is in flight when a request ends.
    """
    decoder = tape.make_decoder(
        monkeypatch, near, 3, taped=taped, ahead=int(taped), pair=pair, speculation=speculation,
        prefill_chunk=chunk,
    )  # fmt: skip
    rng = random.Random(chunk)
    texts: list[Sequence[int]] = [random_ids(12, seed) for seed in range(3)]
    for call in range(25):
        prompts, params = [], []
        for i in rng.sample(range(3), rng.randint(1, 3)):
            kept = texts[i][: rng.randint(8, len(texts[i]))]
            texts[i] = [*kept, *random_ids(rng.randint(0, 6), call)][-60:]
            prompts.append(texts[i])
            alpha = rng.choice([1.0, 0.5, 0.0])
            last, tokens = rng.choice([1, 3, 8, 100]), rng.choice([1, 1, 4])
            params.append(scored(last, alpha=alpha, max_tokens=tokens))
        for _ in range(rng.randint(0, 2)):
            prompts.append(random_ids(rng.randint(1, 20), call + 100))
            params.append(SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
        for output, asked in zip(decoder.generate(prompts, params), params, strict=True):
            if asked.prompt_logprobs >= 0:
                assert_right(near, output, asked)
            expected = greedy(near.models, output.prompt_token_ids, asked.alpha, asked.max_tokens)
            assert output.token_ids == expected
    assert decoder.statistics()["reused_tokens"] > 0


def test_what_was_dropped_is_not_read(near, make_decoder):
    """A draft that gave NaN is behind the shorter of two rows that run together."""
    decoder = make_decoder(near, 2)
    short, long = random_ids(16, 0), random_ids(40, 1)
    bad = 258
    assert bad not in short + long
    with nan_token(near, bad):
        decoder.generate([[*short, 3, 3, 3, 3, 3, 3, bad], long], scored())
        for output in decoder.generate([short, [*long, 3]], scored()):
            assert_right(near, output, scored())
    assert decoder.statistics()["reused_tokens"] == 16 - LAST - 1 + 41 - LAST - 1


def test_prompts_are_forgotten(near, make_decoder):
    """By what needs empty slots, and where only some positions are not asked for."""
    decoder = make_decoder(near, 2)
    prompt = random_ids(20, 0)
    for params in (scored(), scored(0), SamplingParams(max_tokens=1)):
        decoder.generate([prompt, prompt], params)
    decoder.generate([prompt], scored())
    runner = decoder._runner
    assert runner.lengths("base") == [20, 0]
    decoder._loop.forget_prompts()
    assert runner.lengths("base") == runner.lengths("anti") == [0, 0]
    assert not any(x.any() for cache in runner._caches for x in cache.slabs)
    decoder.generate([prompt], scored())
    assert decoder.statistics()["reused_tokens"] == 0


def test_a_request_that_moves_finds_nothing_of_what_was_kept(near, make_decoder, greedy):
    """The last slot's request, the shorter of two, moves to where a prompt gave NaN.

    The NaN is behind what the other's prompt pads, and before its end.
    """
    decoder = make_decoder(near, 3)
    prompts = [[*random_ids(30, 0), 258], random_ids(25, 1), random_ids(5, 2)]
    assert 258 not in prompts[1] + prompts[2]
    steps = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with nan_token(near, 258):
        failed, *outputs = decoder.generate(prompts, [scored(), steps, steps])
        assert failed.finish_reason == "error"
        for output in outputs:
            assert output.token_ids == greedy(near.models, output.prompt_token_ids, 1.0, 12)
