"""After an interrupt, a failed allocation or a hopeless prompt the decoder is as new."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from proxytune_kernels.decoder import DecodeError, Decoder, RequestOutput, Speculation
from proxytune_kernels.params import SamplingParams
from tests.decoder.conftest import BACKEND, near_trio

PROMPTS = ["a secret", "another secret", "b", "a fourth that is a little longer"]
PARAMS = [SamplingParams(temperature=0.9, seed=i, max_tokens=5, ignore_eos=True) for i in range(4)]


def make(**settings: Any) -> Decoder:
    return Decoder(near_trio(), 2, backend=BACKEND, prefill_chunk=8, **settings)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@contextmanager
def raising(error: BaseException, call: int) -> Iterator[Callable[[], int]]:
    """Raise at the ``call``-th call of a Python function of the decoder in this thread, once."""
    calls = 0

    def trace(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        code = frame.f_code
        # What a generator's end raises, nobody gets.
        if code.co_name.startswith("<") or "proxytune_kernels/decoder" not in code.co_filename:
            return
        if event == "call":
            calls += 1
            if calls == call:
                sys.setprofile(None)
                raise error

    sys.setprofile(trace)
    try:
        yield lambda: calls
    finally:
        sys.setprofile(None)


INJECTIONS = 80  # the two faults in turn
FAULTS = [KeyboardInterrupt(), torch.OutOfMemoryError("no memory")]


@pytest.mark.slow
@pytest.mark.parametrize("speculation", [None, Speculation(max_drafts=3)], ids=["plain", "drafts"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_fault_at_any_call_leaves_nothing(fault, speculation):
    decoder = make(speculation=speculation)
    expected = tokens(decoder.generate(PROMPTS, PARAMS))
    with raising(fault, -1) as calls:
        decoder.generate(PROMPTS, PARAMS)
    total = calls()
    assert total > INJECTIONS
    for i in range(FAULTS.index(fault), INJECTIONS, len(FAULTS)):
        caught: list[BaseException] = []
        with raising(fault, 1 + i * total // INJECTIONS):
            try:
                decoder.generate(PROMPTS, PARAMS)
            except BaseException as error:
                caught.append(error)
        # Where the fault hits what mends the first one, that is the one that comes out.
        assert all(type(error) is type(fault) for error in caught)
        assert not any("secret" in str(error) for error in caught)
        assert tokens(decoder.generate(PROMPTS, PARAMS)) == expected
        assert not decoder._requests and not decoder._queues and not decoder._loop.unfinished
        assert not any(lengths.any() for lengths in decoder._runner.state())
        assert decoder._turns.free


def test_threads_take_turns():
    decoder = make()
    expected = tokens(make().generate(PROMPTS, PARAMS))
    found: dict[int, list[list[int]]] = {}
    events: dict[int, int] = defaultdict(int)

    def stream(name: int) -> None:
        got: list[list[int]] = [[] for _ in PROMPTS]
        for event in decoder.stream(PROMPTS, PARAMS):
            got[event.index] += event.token_ids
            events[name] += 1
        found[name] = got

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: expected for i in range(4)}
    assert not decoder._requests and decoder._turns.free


def test_submitted_requests_come_from_steps():
    decoder = make()
    expected = tokens(make().generate(PROMPTS, PARAMS))
    assert not decoder.unfinished and decoder.step() == []
    got: dict[int, list[int]] = {}
    submit = threading.Thread(
        target=lambda: got.update(
            {decoder.submit(p, s): [] for p, s in zip(PROMPTS, PARAMS, strict=True)}
        )
    )
    submit.start()
    submit.join()
    assert decoder.unfinished
    cancelled = decoder.submit("c", SamplingParams(max_tokens=50))
    others = tokens(decoder.generate(PROMPTS[:1], PARAMS[:1]))  # beside what was submitted
    decoder.cancel(cancelled)
    reasons = {}
    while decoder.unfinished:
        for event in decoder.step():
            if event.request_id in got:
                got[event.request_id] += event.token_ids
            if event.output is not None:
                reasons[event.request_id] = event.output.finish_reason
    assert others == expected[:1] and list(got.values()) == expected
    assert reasons == {**dict.fromkeys(got, "length"), cancelled: "cancelled"}


def spoiled() -> Decoder:
    """A decoder whose base gives NaN behind a prompt that begins with an "x"."""
    decoder = make()
    forward = decoder._runner.prefill

    @torch.inference_mode()
    def prefill(slots, prompts):
        logits = forward(slots, prompts)
        x = decoder.trio.tokenizer.encode("x")[0]
        logits["base"] = logits["base"].clone()
        for row, prompt in enumerate(prompts["base"]):
            if prompt[0] == x:
                logits["base"][row] = torch.nan
        return logits

    decoder._runner.prefill = prefill  # type: ignore[method-assign]
    return decoder


def test_a_prompt_without_a_token_to_draw_costs_the_others_nothing():
    expected = tokens(make().generate(["a", "b"], PARAMS[:2]))
    decoder = spoiled()
    outputs = decoder.generate(["a", "x", "b"], [PARAMS[0], PARAMS[3], PARAMS[1]])
    assert [tokens(outputs)[0], tokens(outputs)[2]] == expected
    assert [o.finish_reason for o in outputs] == ["length", "error", "length"]
    assert "prompts[1]: no token can be drawn at position 0" in str(outputs[1].error)
    assert outputs[0].error is None and outputs[1].token_ids == []


def test_a_drafter_without_a_token_to_draw_costs_the_others_nothing():
    """The expert gives NaN behind one token: its drafts end there, and so does that request."""
    prompts = PROMPTS[:2]
    params = [SamplingParams(seed=i, max_tokens=12, ignore_eos=True) for i in range(2)]
    expected = tokens(make().generate(prompts, params))
    trio = near_trio()
    others = {*expected[1], *(t for prompt in prompts for t in trio.tokenizer.encode(prompt))}
    bad = next(t for t in expected[0][2:] if t not in others)
    with torch.no_grad():
        trio.expert.model.embed_tokens.weight[bad] = torch.nan
    speculation = Speculation(max_drafts=3, adaptive=False)
    decoder = Decoder(trio, 2, backend=BACKEND, speculation=speculation)
    outputs = decoder.generate(prompts, params)
    ended = expected[0][: expected[0].index(bad) + 1]
    assert tokens(outputs) == [ended, expected[1]]
    assert [o.finish_reason for o in outputs] == ["error", "length"]


def test_a_step_that_raises_cancels_all_requests(monkeypatch):
    """Each hears of it in its own way; none waits for ever, and the decoder goes on."""
    decoder = make()
    expected = tokens(decoder.generate(PROMPTS, PARAMS))
    stream = decoder.stream(PROMPTS[3:], PARAMS[3:])
    events = [next(stream)]
    submitted = [decoder.submit(p, s) for p, s in zip(PROMPTS[:3], PARAMS[:3], strict=True)]

    def forward(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a forward that fails")

    monkeypatch.setattr(decoder._runner, "forward", forward)
    with pytest.raises(RuntimeError, match="a forward that fails"):
        for _ in range(5):
            decoder.step()
    monkeypatch.undo()
    lost = [event for event in decoder.step() if event.output is not None]
    assert [event.request_id for event in lost] == submitted
    assert {event.finish_reason for event in lost} == {"cancelled"}
    events += stream
    assert events[-1].finish_reason == "cancelled" and not decoder.unfinished
    assert tokens(decoder.generate(PROMPTS, PARAMS)) == expected


def test_a_stream_raises_for_that_request_alone():
    expected = tokens(make().generate(["a", "b"], PARAMS[:2]))
    events = spoiled().stream(["a", "x", "b"], [PARAMS[0], PARAMS[3], PARAMS[1]])
    got: list[list[int]] = [[], [], []]
    failed = []
    while True:
        try:
            event = next(events)
        except DecodeError as error:
            failed.append(error.event.index)
        except StopIteration:
            break
        else:
            got[event.index] += event.token_ids
    assert failed == [1] and got == [expected[0], [], expected[1]]


def test_a_chat_as_the_only_prompt_is_one():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    decoder = make()
    assert tokens(decoder.generate(messages, PARAMS[0])) == tokens(
        decoder.generate([messages], PARAMS[0])
    )
