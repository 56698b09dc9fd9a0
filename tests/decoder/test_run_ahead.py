"""A host one step ahead of its device, on a CPU: the same tokens, and no more than those."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from proxytune_kernels.decoder import Decoder, StreamEvent
from proxytune_kernels.decoder.step import Stepper
from proxytune_kernels.params import SamplingParams
from tests.decoder.conftest import BACKEND, by_request, ended, nan_token
from tests.decoder.tape import make_decoder
from tests.decoder.test_graphs import SPECULATIONS, check, requests

NEEDS_TAPE = pytest.mark.skipif(BACKEND == "reference", reason="the reference can't be captured")
TAPED = [False, pytest.param(True, marks=NEEDS_TAPE)]


def empty(decoder: Decoder) -> None:
    """No slot is held, on the host or on the device."""
    assert not decoder._loop.unfinished
    runner = decoder._runner
    for role in decoder.roles:
        assert not any(runner.lengths(role))
        assert not runner.active[role].any()
    assert not any(lengths.any() for lengths in runner.state())


@pytest.mark.parametrize("taped", TAPED)
@pytest.mark.parametrize("speculation", SPECULATIONS)
def test_tokens_equal(near, monkeypatch, speculation, taped):
    """Ends by length, stop token and stop string, with refills while a last step is on its way."""
    prompts, params = requests(5, 12)
    params[4:6] = [dataclasses.replace(p, max_tokens=30, stop=["a", "\u00e9"]) for p in params[4:6]]
    options: dict[str, Any] = {"speculation": SPECULATIONS[speculation], "prefill_chunk": 12}
    if "rejection" in speculation:
        # Its tokens depend on how many drafts share a round, and so on when requests come.
        params = [dataclasses.replace(p, temperature=0.0) for p in params]
    wanted = make_decoder(monkeypatch, near, 3, **options).generate(prompts, params)
    decoder = make_decoder(monkeypatch, near, 3, ahead=1, taped=taped, **options)
    by_index = by_request(decoder.stream(prompts, params))
    # Nothing behind an end, nothing twice.
    check([ended(by_index[i]) for i in range(len(prompts))], wanted)
    assert {output.finish_reason for output in wanted} == {"stop", "length"}
    empty(decoder)


def test_the_host_is_ahead(trio, monkeypatch):
    """A step is launched before the one before it is read, and only one."""
    launched: list[int] = []
    run = Stepper.run

    def counted(self: Stepper, *arguments: Any) -> Any:
        launched.append(1)
        return run(self, *arguments)

    monkeypatch.setattr(Stepper, "run", counted)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    for ahead in (0, 1):
        launched.clear()
        decoder = make_decoder(monkeypatch, trio, 2, ahead=ahead)
        seen = 0
        for event in decoder.stream("hello", params):
            seen += len(event.token_ids)
            # The first token is the prompt's; the last is known to be the last.
            assert len(launched) == min(seen - 1 + ahead, 8)
        assert len(launched) == 8


@pytest.mark.parametrize("taped", TAPED)
@pytest.mark.parametrize("speculation", ["plain", "coupled", "lookup"])
def test_a_slot_is_refilled_under_a_step_in_flight(near, monkeypatch, speculation, taped):
    """The step that its last request still has on the way leaves nothing for the next.

    One request ends early (the host can't know), one slot moves, new requests come at once.
    """
    decoder = make_decoder(
        monkeypatch, near, 3, ahead=1, taped=taped, speculation=SPECULATIONS[speculation]
    )
    long = SamplingParams(seed=1, max_tokens=25, ignore_eos=True)
    [text] = make_decoder(monkeypatch, near, 1).generate([[9, 8, 7]], long)
    stop = next(t for i, t in enumerate(text.token_ids) if i > 3 and t not in text.token_ids[:i])
    short = dataclasses.replace(long, stop_token_ids=[stop])
    new = SamplingParams(seed=2, max_tokens=12, ignore_eos=True)
    prompts: list[Any] = [[9, 8, 7], [4, 5], [9, 8, 7], [10] * 9, [9, 8, 7], [11]]
    # Where the last one moves to, another had fewer tokens to come.
    params = [short, dataclasses.replace(long, max_tokens=19), short, new, long, new]
    outputs = decoder.generate(prompts, params)
    for output, prompt, p in zip(outputs, prompts, params, strict=True):
        options: dict[str, Any] = {"speculation": SPECULATIONS[speculation]}
        [alone] = make_decoder(monkeypatch, near, 1, **options).generate([prompt], p)
        check([output], [alone])
        if output.speculation is not None and alone.speculation is not None:
            # What a slot may draft moves with it.
            assert output.speculation.drafted == alone.speculation.drafted
            assert output.speculation.accepted == alone.speculation.accepted
    assert outputs[0].finish_reason == outputs[2].finish_reason == "stop"
    empty(decoder)


@pytest.mark.parametrize("speculation", ["plain", "coupled"])
def test_cancelled_under_a_step_in_flight(near, monkeypatch, speculation):
    params = SamplingParams(seed=1, max_tokens=25, ignore_eos=True)
    prompts = [[9, 8, 7], [4, 5], [6], [7]]
    wanted = [make_decoder(monkeypatch, near, 1).generate([p], params)[0] for p in prompts]
    decoder = make_decoder(monkeypatch, near, 2, ahead=1, speculation=SPECULATIONS[speculation])
    events: list[StreamEvent] = []
    for event in decoder.stream(prompts, params):
        events.append(event)
        if len(events) == 7:
            assert decoder._loop._pending
            decoder.cancel(next(e.request_id for e in events if e.index == 0))
    for index, seen in by_request(events).items():
        output = ended(seen)
        assert output.token_ids == wanted[index].token_ids[: len(output.token_ids)]
        assert output.finish_reason == ("cancelled" if index == 0 else "length")
        assert index == 0 or len(output.token_ids) == 25
    empty(decoder)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("speculation", SPECULATIONS)
def test_a_row_with_nothing_to_draw_fails_alone(near, monkeypatch, speculation, ahead):
    """The request fails once, though a step more of it is on its way.

    In a round of the expert's drafts at the latest where plain decoding would: NaN of a draft
    reaches the queries before it, too (its weight is 0, and 0 * NaN is NaN).
    """
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts: list[Any] = [[9, 8, 7], [4, 5]]
    options: dict[str, Any] = {"speculation": SPECULATIONS[speculation], "ahead": ahead}
    first, other = make_decoder(monkeypatch, near, 2).generate(prompts, params)
    at = next(
        i for i, t in enumerate(first.token_ids)
        if i > 2 and t > 5 and t not in [*first.token_ids[:i], *other.token_ids]
    )  # fmt: skip
    decoder = make_decoder(monkeypatch, near, 2, **options)
    bad, good = (decoder.stream([prompt], params) for prompt in prompts)
    by_expert = speculation in ("coupled", "rejection")
    position = r"\d+" if by_expert else at + 1
    with nan_token(near, first.token_ids[at]):
        seen: list[int] = list(next(good).token_ids)
        tokens: list[int] = []
        with pytest.raises(RuntimeError, match=f"no token can be drawn at position {position}:"):
            for event in bad:
                tokens += event.token_ids
        seen += [t for event in good for t in event.token_ids]
    assert 0 < len(tokens) <= at + 1 and (by_expert or len(tokens) == at + 1)
    assert tokens == first.token_ids[: len(tokens)]
    assert seen == other.token_ids
    empty(decoder)


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_interrupted_step_leaves_nothing_in_flight_that_counts(trio, monkeypatch, ahead):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = ["hello", "a"]
    wanted = make_decoder(monkeypatch, trio, 2).generate(prompts, params)
    decoder = make_decoder(monkeypatch, trio, 2, ahead=ahead, pair="separate")
    for role in ("base", "anti"):
        stream = decoder.stream(prompts, params)
        for _ in range(5):
            next(stream)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(decoder._runner.models[role,], "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(stream)
        empty(decoder)
        check(decoder.generate(prompts, params), wanted)
    empty(decoder)
