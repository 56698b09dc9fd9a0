"""Prompts beside running requests: in chunks, several at once, and never in their way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from proxytune_kernels.decoder import Decoder, StreamEvent
from proxytune_kernels.params import SamplingParams


class Log:
    """What a decoder runs, in order: widths of prompts [rows, longest], or None for a step."""

    def __init__(self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: list[list[int] | None] = []
        runner, stepper = decoder._runner, decoder._loop._stepper
        prefill, extend, run = runner.prefill, runner.extend, stepper.run

        def logged_prefill(slots: Sequence[int], prompts: Any, last: int) -> Any:
            self.entries.append(
                [max(len(p[i]) for p in prompts.values()) for i in range(len(slots))]
            )
            return prefill(slots, prompts, last)

        def logged_extend(slots: range, prompts: Any, **options: Any) -> Any:
            self.entries.append(
                [max(len(p[i]) for p in prompts.values()) for i in range(len(slots))]
            )
            return extend(slots, prompts, **options)

        def logged_run(*arguments: Any) -> Any:
            self.entries.append(None)
            return run(*arguments)

        monkeypatch.setattr(runner, "prefill", logged_prefill)
        monkeypatch.setattr(runner, "extend", logged_extend)
        monkeypatch.setattr(stepper, "run", logged_run)

    @property
    def prompts(self) -> list[list[int]]:
        """Tokens of each row of each forward of prompts."""
        return [entry for entry in self.entries if entry is not None]


def params(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, "ignore_eos": True, **settings})


def prompt(length: int, seed: int = 0) -> list[int]:
    return [3 + (7 * i * i + 31 * seed) % 250 for i in range(length)]


@pytest.mark.parametrize("chunk", [1, 4, 9, 10, 512])
def test_tokens_do_not_depend_on_the_chunks(trio, make_decoder, greedy, chunk):
    """Prompts shorter than a chunk, as long, of several, with a rest of one token; per role."""
    prompts: list[Any] = [prompt(n, n) for n in (1, 4, 5, 9, 10, 18, 19)]
    prompts += [
        {"base": prompt(19), "expert": prompt(3), "anti": prompt(9)},
        {"base": prompt(2), "expert": prompt(10), "anti": prompt(10)},
        {"base": prompt(8), "expert": prompt(20, 1), "anti": [*prompt(4, 2), *prompt(20, 1)[4:]]},
    ]
    decoder = make_decoder(trio, 4, prefill_chunk=chunk)
    for output in decoder.generate(prompts, params()):
        assert output.token_ids == greedy(trio.models, output.prompt_token_ids, 1.0, 6)


def test_others_get_tokens_while_a_long_prompt_runs(trio, make_decoder, greedy, monkeypatch):
    decoder = make_decoder(trio, 3, prefill_chunk=8)
    log = Log(decoder, monkeypatch)
    long = {"base": prompt(50), "expert": prompt(20), "anti": prompt(3)}
    events = list(decoder.stream([prompt(5), long], [params(max_tokens=30), params()]))
    # A step behind each of seven chunks but the last, whose token is given out at once.
    assert log.entries[:16] == [[5], None, *[[8], None] * 6, [2], None]
    # The prompt's token, that of the step behind it, and six beside the chunks.
    assert [event.index for event in events[:10]] == [*[0] * 8, 1, 0]
    outputs = {event.index: event.output for event in events}
    assert outputs[0] is not None and outputs[1] is not None
    assert outputs[0].token_ids == greedy(trio.models, trio.tokenize(prompt(5)), 1.0, 30)
    assert outputs[1].token_ids == greedy(trio.models, long, 1.0, 6)


def test_many_prompts_are_one_chunk_apart(trio, make_decoder, monkeypatch):
    """Prompts that start at once wait for the others' steps as the parts of a long one do."""
    decoder = make_decoder(trio, 6, prefill_chunk=10)
    log = Log(decoder, monkeypatch)
    events = list(decoder.stream([prompt(7, n) for n in range(5)], params(max_tokens=10)))
    assert log.entries[:10] == [[7], None] * 5
    # Each prompt that starts gives its first token, and then all that run give one.
    began = [events.index(next(e for e in events if e.index == i)) for i in range(5)]
    assert began == [0, 2, 5, 9, 14]


def test_prompts_share_a_forward_within_the_budget(trio, make_decoder, greedy, monkeypatch):
    """Equal and unequal lengths; a forward is as wide as its longest prompt, padding included."""
    decoder = make_decoder(trio, 9, prefill_chunk=16)
    log = Log(decoder, monkeypatch)
    lengths = [4, 4, 2, 4, 8, 1, 1, 16, 17]
    outputs = decoder.generate([prompt(n, n) for n in lengths], params())
    assert log.prompts == [[4, 4, 2, 4], [8, 1], [1], [16], [16], [1]]
    for output in outputs:
        assert output.token_ids == greedy(trio.models, output.prompt_token_ids, 1.0, 6)


def test_prompts_of_other_roles_run_apart(trio, make_decoder, greedy, monkeypatch):
    """A request that is not steered runs in the base alone; it need not wait behind the rest."""
    decoder = make_decoder(trio, 4, prefill_chunk=64)
    log = Log(decoder, monkeypatch)
    alphas = [1.0, 0.0, 2.0, 0.0]
    outputs = decoder.generate([prompt(5, n) for n in range(4)], [params(alpha=a) for a in alphas])
    assert [len(rows) for rows in log.prompts] == [2, 2]
    for output, alpha in zip(outputs, alphas, strict=True):
        assert output.token_ids == greedy(trio.models, output.prompt_token_ids, alpha, 6)


def test_a_prompt_that_fills_its_slot(trio, make_decoder, greedy):
    """While its last chunk waits for another role's, others' steps must not write behind it."""
    decoder = make_decoder(trio, 3, max_seq_len=16, prefill_chunk=4)
    prompts: list[Any] = [
        prompt(2),
        {"base": prompt(16), "expert": prompt(9), "anti": prompt(16)},
        {"base": prompt(9), "expert": prompt(16), "anti": prompt(1)},
        prompt(3, 3),
    ]
    counts = [15, 1, 1, 14]
    outputs = decoder.generate(prompts, [params(max_tokens=n) for n in counts])
    for output, count in zip(outputs, counts, strict=True):
        assert output.token_ids == greedy(trio.models, output.prompt_token_ids, 1.0, count)


def test_a_prompt_that_never_fits_disturbs_nobody(trio, make_decoder, greedy):
    decoder = make_decoder(trio, 2, max_seq_len=16, prefill_chunk=4)
    running = decoder.stream([prompt(5)], params(max_tokens=12))
    events = [next(running)]
    never = {"base": prompt(3), "expert": prompt(3), "anti": prompt(12)}
    with pytest.raises(
        ValueError, match=r"prompts\[1\]: anti's prompt of 12 tokens with max_tokens 6 must fit"
    ):
        decoder.stream([prompt(3), never], params())
    events += running
    assert [token for event in events for token in event.token_ids] == greedy(
        trio.models, trio.tokenize(prompt(5)), 1.0, 12
    )
    assert not decoder._loop.unfinished


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_prompt_that_is_given_up_between_its_chunks(trio, make_decoder, greedy, how):
    decoder = make_decoder(trio, 2, prefill_chunk=4)
    stream: Any = decoder.stream([prompt(4), prompt(90)], params(max_tokens=12))
    events: list[StreamEvent] = [next(stream) for _ in range(5)]
    assert 0 < decoder._runner.lengths("base")[1] < 90
    if how == "cancel":
        decoder.cancel(events[0].request_id + 1)
        events += stream
        [given_up] = [event.output for event in events if event.index == 1]
        assert given_up is not None
        assert (given_up.finish_reason, given_up.token_ids) == ("cancelled", [])
        assert [t for event in events for t in event.token_ids] == greedy(
            trio.models, trio.tokenize(prompt(4)), 1.0, 12
        )
    else:
        stream.close()
    assert not decoder._loop.unfinished
    assert not any(any(decoder._runner.lengths(role)) for role in decoder.roles)
    for output in decoder.generate([prompt(9, 2), prompt(30, 3)], params()):
        assert output.token_ids == greedy(trio.models, output.prompt_token_ids, 1.0, 6)
