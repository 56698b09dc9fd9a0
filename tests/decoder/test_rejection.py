"""Rejection: the law of the tokens is the target's, by full enumeration over eight tokens.

The steps are the decoder's own, run over many slots at once; the requests around them would take
most of the time. :func:`test_draws_are_the_decoders` ties the two together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from proxytune_kernels.decoder import Decoder, Speculation
from proxytune_kernels.decoder.constraints import Needs
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import EIGHT, as_asked
from tests.ops import oracle

Make = Callable[..., Decoder]
Array = NDArray[np.float64]

V, K, COUNT = EIGHT, 3, 4
"""Tokens there are, drafts of a round, tokens that are looked at: the prompt's, and a round's."""
SLOTS, BATCHES = 2048, 32
SIGNIFICANCE = 1e-5
# After the base's prompt some tokens repeat two of it, and have drafts.
PROMPTS = {"base": [1, 2, 5, 3, 2, 6, 7, 2, 4, 2], "expert": [3, 2], "anti": [4]}
FILTERS: list[dict[str, Any]] = [
    {"alpha": 0.8},
    {"alpha": 1.2, "temperature": 0.8, "top_k": 6, "top_p": 0.95},
    {"alpha": -0.5, "temperature": 1.4, "min_p": 0.12, "top_p": 0.95, "filter_order": "hf"},
    {
        "alpha": [0.8, 1.2, -0.5], "logit_bias": {1: 0.8, 4: -0.7}, "repetition_penalty": 1.5,
        "presence_penalty": 0.4, "frequency_penalty": 0.6, "bad_words": [[7], [2, 3], [5, 1, 2]],
    },
]  # fmt: skip


def law(x: Tensor, params: SamplingParams) -> Array:
    filters = params.temperature, params.top_k, params.top_p, params.min_p, params.filter_order
    return oracle.law(x, *filters)


class Laws(NamedTuple):
    """Probabilities of the next token by the tokens so far: number j is [V] * (j + 1)."""

    target: list[Array]
    draft: list[Array]


@torch.no_grad()
def laws(trio: Trio, params: SamplingParams) -> Laws:
    """From whole forwards over every text of up to COUNT - 1 tokens."""
    found = Laws([], [])
    for length in range(COUNT):
        texts = list(itertools.product(range(V), repeat=length))
        x: dict[str, Tensor] = {}
        for role, model in trio.models.items():
            inputs = torch.tensor([[*PROMPTS[role], *text] for text in texts])
            logits = model(inputs, use_cache=False).logits[:, -1]
            x[role] = logits.reshape(*[V] * (length + 1))
        alpha = params.alphas[min(length, len(params.alphas) - 1)]
        combined = x["base"] + alpha * (x["expert"] - x["anti"])
        rows = combined.reshape(-1, V)
        for i, text in enumerate(texts):
            rows[i] = as_asked(rows[i], params, PROMPTS["base"], list(text))
        found.target.append(law(combined, params))
        found.draft.append(law(x["expert"], params))
    return found


class Draws(NamedTuple):
    """What came of B requests."""

    token_ids: Tensor
    """int64 [B, COUNT]: their first tokens."""
    drafted: Tensor
    """int64 [B]: drafts of the first round."""
    accepted: Tensor
    """int64 [B]: those of them that were kept."""


class Driver:
    """Runs the same prompts again and again, each time with other seeds.

    Args:
        decoder: with SLOTS slots.
        params: of all requests.
    """

    def __init__(self, decoder: Decoder, params: SamplingParams) -> None:
        self.stepper = decoder._loop._stepper
        self.runner, self.sampler = decoder._runner, decoder._sampler
        self.constraints = decoder._sampler.constraints
        requests = decoder._make_requests([PROMPTS] * SLOTS, params)
        for slot, request in enumerate(requests):
            request.slot = slot
        slots = list(range(SLOTS))
        self.logits = self.runner.prefill(slots, {r: [PROMPTS[r]] * SLOTS for r in PROMPTS})
        self.stepper.prefill(requests, self.logits)
        self.needs, self.numbers = Needs.of(requests), self.constraints.numbers(requests)
        self.lengths = [cache.device_lengths.clone() for cache in self.runner._caches]

    @torch.inference_mode()
    def draw(self, first_seed: int) -> Draws:
        """Requests with the seeds from ``first_seed`` on, in rounds of K drafts."""
        self._start(first_seed)
        tokens = torch.full((SLOTS, COUNT * (K + 1)), -1)
        tokens[:, 0] = self.sampler.token_ids[:, 0]
        counts = torch.ones(SLOTS, dtype=torch.int64)
        first = None
        while int(counts.min()) < COUNT:
            for cache in self.runner._caches:
                cache.lengths[:] = cache.device_lengths.tolist()
            result = self.stepper.run(SLOTS, self.stepper.roles, K, self.needs)
            first = result if first is None else first
            places = counts[:, None] + torch.arange(K + 1)
            tokens.scatter_(1, places, result.token_ids)
            counts += (result.token_ids >= 0).sum(1)
        assert first is not None and first.num_drafted is not None
        assert first.num_accepted is not None
        return Draws(tokens[:, :COUNT], first.num_drafted, first.num_accepted.long())

    def _start(self, first_seed: int) -> None:
        for cache, lengths in zip(self.runner._caches, self.lengths, strict=True):
            cache.device_lengths.copy_(lengths)
        self.sampler.params.seed.copy_(first_seed + torch.arange(SLOTS))
        self.sampler.params.position.zero_()
        everyone = torch.arange(SLOTS)
        self.constraints.start(everyone, self.numbers)
        first = self.sampler.draw(everyone, self.logits, self.needs)
        self.sampler.take_first(everyone, first, self.needs)
        history = self.stepper._history
        if history is not None:
            start = len(PROMPTS["base"])
            history.token_ids[:, start] = first.token_ids[:, 0]
            history.lengths.fill_(start + 1)


def many(driver: Driver, batches: int) -> Draws:
    """Draws with the seeds from 0 on."""
    parts = [driver.draw(SLOTS * i) for i in range(batches)]
    return Draws(*(torch.cat(column) for column in zip(*parts, strict=True)))


def make_driver(
    make_decoder: Make, trio: Trio, filters: dict[str, Any], **settings: Any
) -> tuple[Driver, SamplingParams]:
    params = SamplingParams(**filters, seed=0, max_tokens=20)
    speculation = Speculation(**{"max_drafts": K, "adaptive": False, **settings})
    decoder = make_decoder(trio, SLOTS, max_seq_len=32, speculation=speculation)
    return Driver(decoder, params), params


def assert_joint_law(token_ids: Tensor, target: list[Array]) -> None:
    """Chi-square over all V^COUNT texts; those expected less than ten times count as one."""
    joint = target[0]
    for following in target[1:]:
        joint = joint[..., None] * following
    counts = np.zeros(joint.shape)
    np.add.at(counts, tuple(token_ids.numpy().T), 1)
    assert counts[joint == 0].sum() == 0
    expected = len(token_ids) * joint
    small = expected < 10
    observed = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    used = wanted > 0
    assert used.sum() > 100
    chi = ((observed - wanted)[used] ** 2 / wanted[used]).sum()
    assert stats.chi2.sf(chi, used.sum() - 1) > SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(FILTERS)))
def test_rejection_has_the_targets_joint_law(eight, make_decoder, case):
    """10^6 tokens in all, prompts per role, one case with all that a request can ask.

    And as much is accepted as can be.
    """
    driver, params = make_driver(make_decoder, eight, FILTERS[case], mode="rejection")
    draws = many(driver, BATCHES)
    target, draft = laws(eight, params)
    assert_joint_law(draws.token_ids, target)

    # That at least j drafts are kept: min(p, q) along the texts, the sum of it over them.
    assert draws.drafted.eq(K).all()
    reach = target[0]
    for j in range(1, K + 1):
        reach = reach[..., None] * np.minimum(target[j], draft[j])
        share = int((draws.accepted >= j).sum())
        assert 0.02 < reach.sum() < 0.98
        test = stats.binomtest(share, len(draws.accepted), float(reach.sum()))
        assert test.pvalue > SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafter", "mode"),
    [("prompt_lookup", "rejection"), ("prompt_lookup", "coupled"), ("expert", "coupled")],
)
def test_the_other_modes_have_it_too(eight, make_decoder, drafter, mode):
    driver, params = make_driver(make_decoder, eight, FILTERS[1], drafter=drafter, mode=mode)
    draws = many(driver, 20)
    assert_joint_law(draws.token_ids, laws(eight, params).target)
    assert 0 < int(draws.accepted.sum()) < int(draws.drafted.sum())


def test_draws_are_the_decoders(eight, make_decoder):
    """The same seeds through requests, in a smaller batch with refills."""
    for settings in ({"mode": "rejection"}, {"drafter": "prompt_lookup", "mode": "rejection"}):
        driver, params = make_driver(make_decoder, eight, FILTERS[1], **settings)
        draws = driver.draw(0)
        decoder = make_decoder(eight, 50, max_seq_len=32, speculation=driver.stepper.speculation)
        seeded = [
            SamplingParams(**FILTERS[1], seed=seed, max_tokens=params.max_tokens)
            for seed in range(80)
        ]
        outputs = decoder.generate([PROMPTS] * 80, seeded)
        for row, output in enumerate(outputs):
            assert output.token_ids[:COUNT] == draws.token_ids[row].tolist()
            if "drafter" not in settings:
                assert output.speculation is not None
                assert output.speculation.emitted_per_round[0] == draws.accepted[row] + 1
