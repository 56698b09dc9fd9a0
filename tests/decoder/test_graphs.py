"""Captured steps, on a CPU: a tape in a graph's place (see tape.py) gives the eager tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from proxytune_kernels.decoder import Decoder, RequestOutput, Speculation
from proxytune_kernels.decoder.graphs import StepGraphs
from proxytune_kernels.decoder.sampler import StepResult
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import BACKEND, VOCAB_SIZE, noisy_copy, tiny_llama
from tests.decoder.tape import Tape, make_decoder
from tests.decoder.test_runner import ARCHITECTURES, make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BACKEND == "reference", reason="the reference can't be captured"),
]

SPECULATIONS: dict[str, Speculation | None] = {
    "plain": None,
    "coupled": Speculation(max_drafts=3, adaptive=False),
    "rejection": Speculation(max_drafts=3, adaptive=False, mode="rejection"),
    "lookup": Speculation(drafter="prompt_lookup", max_drafts=4, adaptive=False),
    "lookup-rejection": Speculation(
        drafter="prompt_lookup", max_drafts=4, adaptive=False, mode="rejection"
    ),
}


def requests(seed: int, count: int) -> tuple[list[Any], list[SamplingParams]]:
    """Ragged prompts, some other for each role and some that repeat; every kind of parameter."""
    rng = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, most))]

    prompts: list[Any] = [tokens(20) for _ in range(count)]
    prompts[::3] = [{role: tokens(14) for role in ("base", "expert", "anti")} for _ in prompts[::3]]
    prompts[1::3] = [tokens(4) * 4 for _ in prompts[1::3]]
    params = [
        SamplingParams(
            alpha=rng.choice([0.0, 1.0, 1.0, 0.5, -1.0]),
            temperature=rng.choice([0.0, 0.0, 0.3, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            seed=i,
            max_tokens=rng.choice([1, 4, 13, 30, 30]),
            min_tokens=rng.choice([0, 0, 1]),
            # Half of all tokens end a request, once they may.
            stop_token_ids=range(0, VOCAB_SIZE, 2) if rng.random() < 0.2 else (),
            ignore_eos=True,
        )
        for i in range(count)
    ]
    params[2] = SamplingParams(seed=2, max_tokens=24, min_tokens=9, stop_token_ids=range(100))
    # A greedy text comes back to what it has said, and prompt lookup finds it.
    params[3] = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    return prompts, params


def check(outputs: list[RequestOutput], wanted: list[RequestOutput]) -> None:
    for output, other in zip(outputs, wanted, strict=True):
        assert output.token_ids == other.token_ids
        assert (output.finish_reason, output.stop_reason) == (
            other.finish_reason,
            other.stop_reason,
        )
        # Both from the same logits, but for roundings of fp64 that fp32 shows once in 10^8.
        assert output.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def graphs(decoder: Decoder) -> Any:
    assert decoder._graphs is not None
    return decoder._graphs


def check_taped(
    monkeypatch: pytest.MonkeyPatch, trio: Trio, slots: int, prompts: Any, params: Any,
    **options: Any,
) -> Decoder:  # fmt: skip
    """The decoder that captures, which gave what the eager one of the same options gives."""
    wanted = make_decoder(monkeypatch, trio, slots, **options).generate(prompts, params)
    decoder = make_decoder(monkeypatch, trio, slots, taped=True, **options)
    check(decoder.generate(prompts, params), wanted)
    return decoder


def replays(decoder: Decoder) -> int:
    tape = graphs(decoder)._capture
    assert isinstance(tape, Tape)
    return tape.replays


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("speculation", SPECULATIONS)
def test_tokens_equal_eager_ones(near, monkeypatch, speculation, ahead):
    """Ragged, refilled, prompts per role and in chunks, alpha 0 among others, min_tokens."""
    options: dict[str, Any] = {"speculation": SPECULATIONS[speculation], "prefill_chunk": 12}
    decoder = check_taped(monkeypatch, near, 5, *requests(0, 10), ahead=ahead, **options)
    counts = decoder.statistics()
    # A last step that nobody waits for may still be on its way.
    steps = counts["plain_steps"] + counts["speculative_rounds"]
    assert steps <= replays(decoder) <= steps + ahead
    if speculation != "plain":
        assert counts["accepted"] > 0
    assert decoder.info()["graphs"] == f"{graphs(decoder).count} captured"
    assert {rows for rows, _ in graphs(decoder)._replays} <= {1, 2, 4, 5}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_captured(tokenizer, monkeypatch, architecture):
    base = make(architecture, vocab_size=VOCAB_SIZE)
    mixed = Trio.from_models(base, noisy_copy(base, 0.05, 1), tiny_llama(1, 16, 1), tokenizer)
    # The expert runs token by token, the base several at once.
    options: dict[str, Any] = {"speculation": Speculation(max_drafts=2, adaptive=False)}
    assert replays(check_taped(monkeypatch, mixed, 3, *requests(1, 4), **options)) > 0


def test_one_graph_for_all_lengths(trio, monkeypatch):
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    decoder = check_taped(monkeypatch, trio, 4, [[5, 6, 7]], params)
    assert graphs(decoder).count == 1
    # Of 3 rows as of 4.
    decoder.generate([[8, 9]] * 3, params)
    decoder.generate([[8, 9]] * 4, params)
    assert graphs(decoder).count == 2


@pytest.mark.parametrize("speculation", ["plain", "coupled", "lookup"])
def test_each_kind_of_step_has_its_graph(near, monkeypatch, speculation):
    """The same shape first without the small models, then with them, then with a mask."""
    stops = tuple(range(0, VOCAB_SIZE, 2))
    kinds = [
        SamplingParams(alpha=0.0, seed=1, max_tokens=12, ignore_eos=True),
        SamplingParams(alpha=2.0, seed=1, max_tokens=12, ignore_eos=True),
        SamplingParams(alpha=2.0, seed=1, max_tokens=12, stop_token_ids=stops, min_tokens=11),
        SamplingParams(alpha=0.0, seed=1, max_tokens=12, stop_token_ids=stops, min_tokens=11),
    ]
    options: dict[str, Any] = {"speculation": SPECULATIONS[speculation]}
    eager = make_decoder(monkeypatch, near, 1, **options)
    decoder = make_decoder(monkeypatch, near, 1, taped=True, **options)
    for params in kinds:
        [wanted] = eager.generate([[5, 6, 7]], params)
        check(decoder.generate([[5, 6, 7]], params), [wanted])


@pytest.mark.parametrize("speculation", SPECULATIONS)
def test_a_full_row_when_a_graph_is_made(trio, monkeypatch, speculation):
    """The step behind a request's last one is the first without a mask, and needs a graph.

    Its row has no place for the tokens of two warm-ups one behind the other.
    """
    options: dict[str, Any] = {"speculation": SPECULATIONS[speculation], "max_seq_len": 16}
    params = [
        SamplingParams(temperature=0, max_tokens=14, min_tokens=8, stop_token_ids=[0]),
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    ]
    check_taped(monkeypatch, trio, 2, [[6] * 3, [5] * 9], params, ahead=1, **options)


# PEFT asks a model for a property that transformers renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("speculation", ["plain", "coupled"])
@pytest.mark.parametrize("pair", ["shared", "batched"])
def test_pairs(lora_trio, near, monkeypatch, pair, speculation):
    trio = lora_trio if pair == "shared" else near
    options: dict[str, Any] = {"pair": pair, "speculation": SPECULATIONS[speculation]}
    decoder = check_taped(monkeypatch, trio, 3, *requests(2, 5), ahead=1, **options)
    assert decoder.info()["pair"] == pair
    assert replays(decoder) > 0


def test_a_model_that_waits_for_the_device_runs_eagerly(trio, monkeypatch):
    """Rope that grows with the longest position must know it on the host."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    base = tiny_llama(0, rope_parameters=rope)
    waiting = Trio.from_models(base, trio.expert, trio.anti, trio.tokenizer)
    decoder = check_taped(monkeypatch, waiting, 3, *requests(3, 4))
    assert decoder.info()["graphs"] == (
        "none: a step can't be captured: called a synchronizing CUDA operation: is_nonzero"
    )
    # That was found out before a capture that would have failed.
    assert graphs(decoder)._capture.records == 0


class _Failing(Tape):
    """Captures ``works`` steps; the next fails when it has been run."""

    def __init__(self, works: int, error: BaseException) -> None:
        super().__init__()
        self.works = works
        self.error = error

    def record(self, step: Callable[[], StepResult]) -> Callable[[], StepResult]:
        replay = super().record(step)
        self.works -= 1
        if self.works < 0:
            raise self.error
        return replay


@pytest.mark.parametrize("works", [0, 2])
@pytest.mark.parametrize("speculation", ["plain", "rejection", "lookup"])
def test_a_failed_capture_harms_nothing(near, monkeypatch, speculation, works):
    options: dict[str, Any] = {"speculation": SPECULATIONS[speculation]}
    prompts, params = requests(4, 6)
    wanted = make_decoder(monkeypatch, near, 3, **options).generate(prompts, params)
    decoder = make_decoder(monkeypatch, near, 3, taped=True, **options)
    graphs(decoder)._capture = _Failing(works, RuntimeError("no\n  such thing"))
    check(decoder.generate(prompts, params), wanted)
    assert decoder.info()["graphs"] == "none: a step can't be captured: no such thing"
    # Nor do eager steps go on to attend to whole rows, as captured ones do.
    assert not any(cache.captured for cache in decoder._runner._caches)


@pytest.mark.parametrize("most", [64, 3])
def test_captures_before_the_first_request(near, monkeypatch, most):
    """By rows and kind, the largest first; past the bound steps run eagerly, and that is said."""
    monkeypatch.setattr(StepGraphs.__init__, "__defaults__", (most,))
    shown: list[Any] = []

    def bar(wanted: Any, *texts: Any, **options: Any) -> Any:
        shown.append((list(wanted), *texts, options["disable"]))
        return iter(wanted)

    monkeypatch.setattr("tqdm.tqdm", bar)
    options: dict[str, Any] = {"speculation": Speculation(max_drafts=5)}
    decoder = make_decoder(monkeypatch, near, 3, taped=True, **options)
    decoder.warm_up()
    wanted = [(rows, drafts) for rows in (3, 2, 1) for drafts in (0, 1, 2, 4, 5)]
    assert shown == [(wanted, "Capturing steps", None)]
    assert replays(decoder) == 0 and graphs(decoder)._capture.records == min(most, 15)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    prompts = [[5, 6, 7], [8], [9, 9], [4]]
    check(
        decoder.generate(prompts, params),
        make_decoder(monkeypatch, near, 3, **options).generate(prompts, params),
    )
    # Nothing was captured while a request waited, and what was serves.
    assert replays(decoder) > 0
    assert graphs(decoder)._capture.records == min(most, 15)
    text = decoder.info()["graphs"]
    if most == 64:
        assert text == "15 captured"
    else:
        assert re.fullmatch(
            r"3 captured, the most there may be: 1[2-9] other kinds of step run eagerly", text
        )


@pytest.mark.parametrize("adaptive", [False, True])
def test_captured_rounds_are_of_few_sizes(near, monkeypatch, adaptive):
    drafts = Speculation(max_drafts=6, adaptive=adaptive)
    params = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True)
    decoder = check_taped(monkeypatch, near, 1, [[5, 6, 7]], params, speculation=drafts)
    assert {kind[1] for _, kind in graphs(decoder)._replays} <= (
        {0, 1, 2, 4, 6} if adaptive else {0, 6}
    )


def test_other_errors_are_not_hidden(trio, monkeypatch):
    """An interrupt is no reason to go on."""
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    [wanted] = make_decoder(monkeypatch, trio, 2).generate("hello", params)
    decoder = make_decoder(monkeypatch, trio, 2, taped=True)
    error: type[BaseException]
    for error in (ValueError, KeyboardInterrupt):
        graphs(decoder)._capture = _Failing(0, error("out of it"))
        with pytest.raises(error, match="out of it"):
            decoder.generate("hello", params)
        assert graphs(decoder).failed is None
    graphs(decoder)._capture = Tape()
    check(decoder.generate("hello", params), [wanted])


@pytest.mark.parametrize("works", [0, 2])
def test_without_memory_for_a_graph_steps_run_eagerly(near, monkeypatch, works):
    """Those that are there serve, none is tried again, and it is said."""
    prompts, params = requests(4, 6)
    wanted = make_decoder(monkeypatch, near, 3).generate(prompts, params)
    decoder = make_decoder(monkeypatch, near, 3, taped=True)
    tape = graphs(decoder)._capture = _Failing(works, torch.OutOfMemoryError("out of it"))
    for _ in range(2):
        check(decoder.generate(prompts, params), wanted)
    assert (tape.records, graphs(decoder).count) == (works + 1, works)
    assert (tape.replays > 0) == (works > 0)
    text = decoder.info()["graphs"]
    assert re.fullmatch(rf"{works} captured, no memory for more: \d+ other .* run eagerly", text)


def test_why_there_are_no_graphs(trio):
    with pytest.raises(ValueError, match="graphs can't be True here: CUDA graphs need a CUDA dev"):
        Decoder(trio, 2, graphs=True)
    reasons: dict[bool | None, str] = {
        None: "CUDA graphs need a CUDA device, and the models are on cpu",
        False: "not asked for",
    }
    for graphs, reason in reasons.items():
        assert Decoder(trio, 2, graphs=graphs).info()["graphs"] == f"none: {reason}"
