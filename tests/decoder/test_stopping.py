"""How requests end, by tokens, strings, lengths or cancellation, and what a stream shows of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from proxytune_kernels.decoder import Decoder, RequestOutput, StreamEvent
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import by_request, ended


def params(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 20, **settings})


@pytest.fixture(scope="module")
def plain(trio: Trio) -> RequestOutput:
    """What the trio says when nothing stops it."""
    decoder = Decoder(trio, 1, backend="reference")
    return decoder.generate("hello", params(ignore_eos=True))[0]


def first_of_its_kind(token_ids: list[int], start: int = 3) -> int:
    """Index of a token that does not come up before."""
    return next(i for i in range(start, len(token_ids)) if token_ids[i] not in token_ids[:i])


def test_eos_ends_a_request(trio, make_decoder, plain):
    at = first_of_its_kind(plain.token_ids)
    eos = plain.token_ids[at]
    ending = dataclasses.replace(trio, eos_token_ids=(eos,))
    [output] = make_decoder(ending).generate("hello", params())
    assert output.token_ids == plain.token_ids[: at + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", eos)
    assert output.text == trio.tokenizer.decode(plain.token_ids[:at])
    [going_on] = make_decoder(ending).generate("hello", params(ignore_eos=True))
    assert going_on.token_ids == plain.token_ids


@pytest.mark.parametrize("include", [False, True])
def test_stop_token(trio, make_decoder, plain, include):
    at = first_of_its_kind(plain.token_ids)
    [output] = make_decoder(trio).generate(
        "hello", params(stop_token_ids=[plain.token_ids[at]], include_stop_str_in_output=include)
    )
    assert output.token_ids == plain.token_ids[: at + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", plain.token_ids[at])
    assert output.text == trio.tokenizer.decode(plain.token_ids[: at + include])


def test_min_tokens_bans_stop_tokens(trio, make_decoder, plain):
    """A token that would end the request is not drawn before min_tokens others are out."""
    eos = plain.token_ids[4]
    ending = dataclasses.replace(trio, eos_token_ids=(eos,))
    short, long = make_decoder(ending).generate(
        ["hello", "hello"], [params(min_tokens=2), params(min_tokens=9)]
    )
    at = plain.token_ids.index(eos, 2)
    assert short.token_ids == plain.token_ids[: at + 1]
    assert len(long.token_ids) >= 10 or long.finish_reason == "length"
    assert eos not in long.token_ids[:9]
    assert long.token_ids[:4] == plain.token_ids[:4]


def test_min_tokens_is_exact(trio, make_decoder, plain):
    """With every token but one a stop token, the first after min_tokens ends the request."""
    only = plain.token_ids[0]
    stops = [i for i in range(trio.vocab_size) if i != only]
    [output] = make_decoder(trio).generate(
        "hello", params(min_tokens=5, stop_token_ids=stops, temperature=100.0, seed=1)
    )
    assert output.token_ids[:5] == [only] * 5
    assert len(output.token_ids) == 6
    assert output.token_ids[5] != only


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(trio, make_decoder, plain, include):
    # Two characters of the middle of the text: at least two tokens, as nearly all are bytes.
    middle = len(plain.text) // 2
    stop = plain.text[middle : middle + 2]
    end = plain.text.index(stop)
    wanted = plain.text[: end + 2 * include]
    events = list(
        make_decoder(trio).stream("hello", params(stop=[stop], include_stop_str_in_output=include))
    )
    output = ended(events)
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == wanted
    assert len(output.token_ids) < len(plain.token_ids)
    assert output.token_ids == plain.token_ids[: len(output.token_ids)]
    if not include:
        assert not any(stop[:1] == event.text[-1:] for event in events[-2:])


def test_stop_string_within_min_tokens_is_let_through(trio, make_decoder, plain):
    stop = plain.text[0]
    [output] = make_decoder(trio).generate("hello", params(stop=stop, min_tokens=20))
    assert output.text == plain.text
    assert output.finish_reason == "length"


def test_streaming_gives_what_generate_gives(trio, make_decoder):
    prompts = ["hello", "a", "x y", "stop", "zz"]
    settings = [
        SamplingParams(seed=i, max_tokens=10 + 3 * i, stop=["e", "st"], min_tokens=i)
        for i in range(len(prompts))
    ]
    outputs = make_decoder(trio, 2).generate(prompts, settings)
    streamed = by_request(make_decoder(trio, 3).stream(prompts, settings))
    for output in outputs:
        events = streamed[output.index]
        final = ended(events)
        assert final.token_ids == output.token_ids
        assert (final.text, final.finish_reason) == (output.text, output.finish_reason)
        assert [p for event in events for p in event.logprobs] == pytest.approx(
            output.logprobs, abs=1e-5
        )


def test_cancel_running_and_waiting(trio, make_decoder, plain):
    decoder = make_decoder(trio, 2)
    events = []
    ids = {}
    for event in decoder.stream(["hello", "a", "b", "c"], params(ignore_eos=True)):
        events.append(event)
        ids[event.index] = event.request_id
        if len(events) == 7:
            decoder.cancel(ids[0])
            decoder.cancel(ids[0] + 3)  # the fourth, which still waits
    streamed = by_request(events)
    cancelled, waiting = ended(streamed[0]), ended(streamed[3])
    assert cancelled.finish_reason == waiting.finish_reason == "cancelled"
    assert cancelled.token_ids == plain.token_ids[: len(cancelled.token_ids)]
    assert waiting.token_ids == []
    for index, prompt in ((1, "a"), (2, "b")):
        [alone] = decoder.generate(prompt, params(ignore_eos=True))
        assert ended(streamed[index]).token_ids == alone.token_ids
    decoder.cancel(ids[0])  # finished: stays as it is


def test_a_closed_stream_frees_its_slots(trio, make_decoder):
    decoder = make_decoder(trio, 2)
    stream = decoder.stream(["a", "b", "c"], params())
    next(stream)
    stream.close()
    assert not decoder._loop.unfinished
    assert len(decoder.generate(["a", "b"], params())) == 2


def test_two_streams_share_the_slots(trio, make_decoder, plain):
    decoder = make_decoder(trio, 2)
    first = decoder.stream("hello", params(ignore_eos=True))
    second = decoder.stream(["a", "hello"], params(ignore_eos=True))
    events: tuple[list[StreamEvent], list[StreamEvent]] = ([], [])
    for _ in range(60):
        for stream, seen in zip((first, second), events, strict=True):
            seen.extend(event for event in (next(stream, None),) if event is not None)
    assert [event.index for event in events[0]] == [0] * 20
    for seen in (events[0], by_request(events[1])[1]):
        assert ended(seen).token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (["a" * 250], params(), r"prompts\[0\]: base's prompt of 250 tokens .* max_seq_len 256"),
        (["a", ""], params(), r"prompts\[1\]: prompt of base must have at least one token"),
        ([[1, 999]], params(), r"prompt of base must have token ids in \[0, 262\), got 999"),
        (["a"], params(stop_token_ids=[300]), r"stop_token_ids must be below .* 262, got 300"),
        (["a"], [params()] * 2, r"params must have one entry per prompt \(1\), got 2"),
        (["a"], "greedy", "params must be SamplingParams or a list of them, got 'greedy'"),
        (3, params(), "prompts must be a string or a list of prompts, got int"),
        ([3], params(), r"prompts\[0\]: prompt of base must be a string, .* got 3"),
        ([{"base": "a"}], params(), "one entry per role .base, expert, anti.*, got base"),
        (
            ["a"],
            params(min_tokens=1, stop_token_ids=list(range(262))),
            "min_tokens must leave a token",
        ),
    ],
)
def test_requests_that_can_never_run_are_refused(trio, make_decoder, prompts, settings, message):
    decoder = make_decoder(trio)
    with pytest.raises((ValueError, TypeError), match=message):
        decoder.stream(prompts, settings)
    assert not decoder._loop.unfinished


def test_a_request_that_just_fits(trio, make_decoder):
    decoder = make_decoder(trio, max_seq_len=16)
    [output] = decoder.generate([[5] * 9], params(max_tokens=8, ignore_eos=True))
    assert len(output.token_ids) == 8
    with pytest.raises(ValueError, match="9 tokens with max_tokens 9 must fit in max_seq_len 16"):
        decoder.generate([[5] * 9], params(max_tokens=9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be an integer of at least 1, got 0"),
        ({"max_seq_len": 257}, "max_seq_len must be at most 256, the context of base, got 257"),
        ({"roles": ("expert",)}, r"roles must be .* or \('base',\), got \('expert',\)"),
        ({"backend": "cuda-next"}, "backend"),
    ],
)
def test_bad_options(trio, options, message):
    with pytest.raises(ValueError, match=message):
        Decoder(trio, **options)


def test_info(trio, make_decoder):
    decoder = make_decoder(trio, 3, max_seq_len=40)
    decoder.generate("a", params(max_tokens=1))
    info = decoder.info()
    assert info["roles"] == ["base", "expert", "anti"]
    # fp64 keys and values, 3 slots of 40 tokens: 3 layers x 2 heads x 12, twice 2 layers x 2 x 8.
    assert info["cache_bytes"] == 2 * 8 * 3 * 40 * (3 * 24 + 2 * 2 * 16)
