"""The whole decoder under random traffic: every request gets what it gets alone, and one end."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxytune_kernels.decoder import Decoder, RequestOutput, Speculation, StreamEvent
from proxytune_kernels.params import SamplingParams
from tests.decoder.conftest import BACKEND, ended, near_trio
from tests.decoder.tape import make_decoder

pytestmark = pytest.mark.slow

Prompt = tuple[tuple[int, ...], ...]
"""Base's, expert's and anti's."""

MAX_SEQ_LEN = 40


tiny_trio = functools.cache(near_trio)


@functools.cache
def alone(prompt: Prompt, params: SamplingParams) -> RequestOutput:
    """What a request gives when nothing else runs, plainly decoded."""
    decoder = Decoder(tiny_trio(), 1, MAX_SEQ_LEN, backend=BACKEND)
    return decoder.generate([by_role(prompt)], params)[0]


def by_role(prompt: Prompt) -> dict[str, list[int]]:
    return dict(zip(("base", "expert", "anti"), map(list, prompt), strict=True))


# Few kinds of each, so that what a request gives alone is often known already.
TOKENS = st.tuples(st.sampled_from([1, 2, 5, 9, 20]), st.integers(0, 3)).map(
    lambda drawn: tuple(3 + (7 * i * i + 31 * drawn[1]) % 250 for i in range(drawn[0]))
)
PROMPTS = st.one_of(TOKENS.map(lambda tokens: (tokens,) * 3), st.tuples(TOKENS, TOKENS, TOKENS))
PARAMS = st.builds(
    SamplingParams,
    alpha=st.sampled_from([1.0, 1.0, -0.5, 0.0]),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2),
    max_tokens=st.sampled_from([1, 2, 7, 20]),
    min_tokens=st.sampled_from([0, 1]),
    stop_token_ids=st.sampled_from([(), tuple(range(0, 262, 3))]),
    stop=st.sampled_from([(), ("a", "ff")]),
    ignore_eos=st.just(True),
)
SPECULATIONS = st.none() | st.builds(
    Speculation,
    drafter=st.sampled_from(["expert", "prompt_lookup"]),
    mode=st.sampled_from(["coupled", "coupled", "coupled", "rejection"]),
    max_drafts=st.sampled_from([2, 3]),
    adaptive=st.booleans(),
)


class _Sent:
    """A request, and what has been seen of it."""

    def __init__(self, request_id: int, prompt: Prompt, params: SamplingParams) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.events: list[StreamEvent] = []
        self.cancelled = False

    def check(self) -> None:
        """It has ended, once, with all that was given out."""
        output = ended(self.events)
        assert output.prompt_token_ids == by_role(self.prompt)
        wanted = alone(self.prompt, self.params)
        if self.cancelled:
            assert output.finish_reason == "cancelled"
            assert output.token_ids == wanted.token_ids[: len(output.token_ids)]
            return
        assert output.token_ids == wanted.token_ids
        assert output.text == wanted.text
        assert (output.finish_reason, output.stop_reason) == (
            wanted.finish_reason,
            wanted.stop_reason,
        )


class Traffic(RuleBasedStateMachine):
    """Streams of requests that come, are read, cancelled and closed in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[tuple[Iterator[StreamEvent], list[_Sent]]] = []
        self.chunks = 0

    @initialize(
        slots=st.integers(1, 4),
        speculation=SPECULATIONS,
        prefill_chunk=st.sampled_from([1, 4, 16, 64]),
        ahead=st.integers(0, 1),
        taped=st.sampled_from([False] * 3 + [BACKEND != "reference"]),
    )
    def start(self, slots: int, speculation: Speculation | None, **options: Any) -> None:
        self.greedy_only = speculation is not None and speculation.mode == "rejection"
        options |= {"max_seq_len": MAX_SEQ_LEN, "speculation": speculation}
        with pytest.MonkeyPatch.context() as patch:
            self.decoder = make_decoder(patch, tiny_trio(), slots, **options)
        self.watch()

    def watch(self) -> None:
        """Count prompts between steps, and see that a step has no gaps."""
        loop = self.decoder._loop
        runner, stepper = loop._runner, loop._stepper

        def watched(forward: Any) -> Any:
            def run(*arguments: Any, **named: Any) -> Any:
                self.chunks += any(request.ready for request in loop._scheduler.running)
                # Whoever runs waits for one chunk between two tokens.
                assert self.chunks <= 1
                return forward(*arguments, **named)

            return run

        step = stepper.run

        def run(slots: int, *arguments: Any) -> Any:
            running = loop._scheduler.running
            assert [request.slot for request in running] == list(range(len(running)))
            assert slots <= len(running)
            self.chunks = 0
            return step(slots, *arguments)

        runner.prefill = watched(runner.prefill)  # type: ignore[method-assign]
        runner.extend = watched(runner.extend)  # type: ignore[method-assign]
        stepper.run = run  # type: ignore[assignment, method-assign]

    @rule(requests=st.lists(st.tuples(PROMPTS, PARAMS), min_size=1, max_size=4))
    def send(self, requests: list[tuple[Prompt, SamplingParams]]) -> None:
        if self.greedy_only:
            # Rejection's tokens are another draw from the same law; the likeliest is the same.
            requests = [(p, s) for p, s in requests if s.temperature == 0]
        stream = self.decoder.stream([by_role(p) for p, _ in requests], [s for _, s in requests])
        sent = [
            _Sent(made.request_id, *request)
            for made, request in zip(stream._requests, requests, strict=True)
        ]
        self.streams.append((stream, sent))

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, 99), count=st.sampled_from([1, 3, 10]))
    def read(self, which: int, count: int) -> None:
        stream, sent = self.streams[which % len(self.streams)]
        for event in (event for _ in range(count) for event in [next(stream, None)] if event):
            request = sent[event.index]
            assert event.request_id == request.request_id
            request.events.append(event)

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, 99), request=st.integers(0, 99))
    def cancel(self, which: int, request: int) -> None:
        _, sent = self.streams[which % len(self.streams)]
        if sent:
            chosen = sent[request % len(sent)]
            # One that has ended, or that nobody has asked for yet, stays as it is.
            chosen.cancelled |= chosen.request_id in self.decoder._requests
            self.decoder.cancel(chosen.request_id)

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, 99))
    def close(self, which: int) -> None:
        stream: Any
        stream, sent = self.streams.pop(which % len(self.streams))
        stream.close()
        assert not {s.request_id for s in sent} & set(self.decoder._requests)

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "decoder"):
            return
        scheduler = self.decoder._loop._scheduler
        held = Counter(r.request_id for r in (*scheduler.running, *scheduler.waiting))
        assert held == Counter(self.decoder._requests.keys())
        for role in self.decoder.roles:
            lengths = self.decoder._runner.lengths(role)
            slots = {request.slot for request in scheduler.running}
            assert all(not length or slot in slots for slot, length in enumerate(lengths))

    def teardown(self) -> None:
        if not hasattr(self, "decoder"):
            return
        for i, (_, sent) in enumerate(self.streams):
            while not all(s.events and s.events[-1].output for s in sent):
                before = sum(len(s.events) for s in sent)
                self.read(i, 10)
                assert sum(len(s.events) for s in sent) > before  # none is forgotten
        for stream, sent in self.streams:
            assert next(stream, None) is None
            for request in sent:
                request.check()
        loop = self.decoder._loop
        assert not loop.unfinished
        assert not self.decoder._requests and not self.decoder._queues
        assert not any(lengths.any() for lengths in loop._runner.state())
        assert not any(active.any() for active in loop._runner.active.values())


TestTraffic = pytest.mark.slow(Traffic.TestCase)
TestTraffic.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    # A decoder takes a while for each of the many tries that shrinking makes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
