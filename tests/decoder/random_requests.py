"""Requests of every kind by a seed, and what makes two outputs of one request the same."""

from __future__ import annotations

import random
from typing import Any

import pytest

from proxytune_kernels.decoder import RequestOutput
from proxytune_kernels.params import FILTER_ORDERS, SamplingParams

# A role's logit that the rounding does not hide is one fp32 ulp off, 2^-18 for those below 64, as
# here. It is steered by alpha, at most 2, and divided by a temperature of 0.3 or more; in a logprob
# it counts twice, for the token and for the sum.
LOGPROB_TOLERANCE = 2 * 2 * 2**-18 / 0.3


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


def random_requests(seed: int, count: int, longest: int) -> tuple[list[Any], list[SamplingParams]]:
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
