"""Penalties, biases, masks, bad words, alphas: what each asks, and the same tokens with drafts."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from torch import Tensor

from proxytune_kernels import reference
from proxytune_kernels.decoder import Decoder, Speculation
from proxytune_kernels.params import RowParams, SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import as_asked, naive_loop, near_trio

PROMPT = [5, 9, 9, 40, 41, 42, 60]
# Strong enough that each changes the tokens: test_each_changes_tokens.
ASKED: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": {i: 1.5 - i / 100 for i in range(20, 260, 3)}},
    "allowed": {"allowed_token_ids": range(3, 200)},
    "bad_words": {"bad_words": [[30], [31]] + [[i, i + d] for i in range(3, 250) for d in (1, 2, 5)]
        + [[i, i + 3, i + 4] for i in range(3, 250)]},
    "repetition": {"repetition_penalty": 3.0},
    "output_only": {"repetition_penalty": 3.0, "penalty_prompt": False},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.9},
    "alphas": {"alpha": [1.0, -0.5, 2.0, 0.0, 0.7]},
    "min_tokens": {"stop_token_ids": range(3, 250, 2), "min_tokens": 15},
}  # fmt: skip


@pytest.fixture(scope="module")
def near() -> Trio:
    return near_trio()


def params_of(*names: str, seed: int = 3, count: int = 20, **more: Any) -> SamplingParams:
    asked = {k: v for name in names for k, v in ASKED[name].items()}
    return SamplingParams(
        **{
            "temperature": 0.3,
            "top_p": 0.95,
            "ignore_eos": True,
            **asked,
            "seed": seed,
            "max_tokens": count,
            **more,
        }
    )


def naive_tokens(trio: Trio, params: SamplingParams, prompt: list[int]) -> list[int]:
    output: list[int] = []

    def pick(logits: dict[str, Tensor], position: int) -> int:
        row = RowParams.from_sampling_params([params], [position])
        base, expert, anti = (logits[role].float()[None] for role in ("base", "expert", "anti"))
        x = reference.combine(base, expert, anti, row.alpha)[0]
        x = as_asked(x, params, prompt, output)
        output.append(int(reference.sample(x[None], row).token_ids))
        return output[-1]

    return naive_loop(trio.models, dict.fromkeys(trio.roles, prompt), params.max_tokens, pick)


def cut(token_ids: list[int], params: SamplingParams) -> list[int]:
    """Up to the first stop token."""
    ends = [i for i, t in enumerate(token_ids) if t in params.stop_token_ids]
    return token_ids[: ends[0] + 1] if ends else token_ids


@pytest.mark.parametrize("name", ASKED)
def test_each_is_what_its_definition_says(
    near: Trio, make_decoder: Callable[..., Decoder], name: str
) -> None:
    params = params_of(name)
    [output] = make_decoder(near).generate([PROMPT], params)
    assert output.token_ids == cut(naive_tokens(near, params, PROMPT), params)
    plain = make_decoder(near).generate([PROMPT], params_of())[0]
    assert output.token_ids != plain.token_ids  # what is asked matters here


SPECULATIONS = {
    "expert": Speculation(max_drafts=4, adaptive=False),
    "lookup": Speculation(drafter="prompt_lookup", max_drafts=3, adaptive=False),
}


@pytest.mark.parametrize(("drafter", "accepted"), [("expert", 300), ("lookup", 1)])
def test_drafts_change_no_token(
    near: Trio, make_decoder: Callable[..., Decoder], drafter: str, accepted: int
) -> None:
    """Each thing that can be asked, and each pair, side by side with rows that ask nothing."""
    pairs = [(), *((name,) for name in ASKED), *combinations(ASKED, 2), tuple(ASKED)]
    rng = random.Random(1)
    asked = [
        params_of(
            *names, seed=i, count=rng.choice([16, 28]), temperature=rng.choice([0.0, 0.3, 0.8])
        )
        for i, names in enumerate(pairs)
    ]
    prompts = [[3 + rng.randrange(259) for _ in range(rng.randint(1, 30))] for _ in asked]
    plain = make_decoder(near, 8).generate(prompts, asked)
    decoder = make_decoder(near, 5, speculation=SPECULATIONS[drafter])
    drafted = decoder.generate(prompts, asked)
    for one, other, names in zip(plain, drafted, pairs, strict=True):
        assert one.token_ids == other.token_ids, names
    assert decoder.statistics()["accepted"] >= accepted
