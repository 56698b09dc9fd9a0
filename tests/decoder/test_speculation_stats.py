"""What came of the drafts: counts of every request and of the decoder add up with the tokens."""

from __future__ import annotations

import pytest

from proxytune_kernels.decoder import Speculation
from proxytune_kernels.params import SamplingParams
from tests.decoder.random_requests import random_requests, total_tokens


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize("drafts", [1, 2, 5, 8])
def test_a_drafter_that_is_the_target_is_always_right(trios, make_decoder, mode, drafts):
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


def test_the_last_token_needs_no_drafts(trios, make_decoder):
    """1 token of the prompt, two whole rounds, and 1 that is left: a plain step."""
    speculation = Speculation(max_drafts=4, adaptive=False)
    decoder = make_decoder(trios["same"], 1, speculation=speculation)
    decoder.generate("hello", SamplingParams(max_tokens=12, seed=1, ignore_eos=True))
    counts = decoder.statistics()
    assert (counts["speculative_rounds"], counts["plain_steps"]) == (2, 1)
    assert (counts["drafted"], counts["accepted"], counts["emitted"]) == (8, 8, 11)
    assert counts["base_forwards"] == counts["slot_steps"] == counts["useful_slot_steps"] == 3


def test_unrelated_models_accept_little_and_near_ones_more(trios, make_decoder):
    rates = {}
    for kind, trio in trios.items():
        speculation = Speculation(max_drafts=3, adaptive=False)
        decoder = make_decoder(trio, 16, speculation=speculation)
        params = [SamplingParams(seed=i, max_tokens=50, ignore_eos=True) for i in range(16)]
        decoder.generate(["hello"] * 16, params)
        counts = decoder.statistics()
        rates[kind] = counts["accepted"] / counts["drafted"]
    assert rates["unrelated"] < 0.3 < rates["near"] < 0.9 < rates["same"] == 1


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize("drafter", ["expert", "prompt_lookup"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_statistics_add_up(trios, make_decoder, mode, drafter, adaptive):
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


def test_streamed_events_hold_whole_rounds(trios, make_decoder):
    speculation = Speculation(max_drafts=3, adaptive=False)
    decoder = make_decoder(trios["same"], 1, speculation=speculation)
    params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True)
    events = list(decoder.stream("hello", params))
    assert [len(event.token_ids) for event in events] == [1, 4, 4]
    output = events[-1].output
    assert output is not None
    assert [i for event in events for i in event.token_ids] == output.token_ids
    assert [p for event in events for p in event.logprobs] == output.logprobs


def test_no_speculation_no_statistics(trios, make_decoder):
    decoder = make_decoder(trios["near"], 1)
    [output] = decoder.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))
    assert output.speculation is None
    assert decoder.info()["speculation"] is None
    assert decoder.statistics()["drafted"] == 0
