"""Penalties, biases, masks, bad words, alphas: what each asks, and the same tokens with drafts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from torch import Tensor

from proxytune_kernels import reference
from proxytune_kernels.decoder import Decoder, Speculation
from proxytune_kernels.params import RowParams, SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder import tape
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


def every_pair(longest: int) -> tuple[list[list[int]], list[SamplingParams], list[tuple[str, ...]]]:
    """Requests that ask nothing, each thing, each pair of them, and all."""
    names = [(), *((name,) for name in ASKED), *combinations(ASKED, 2), tuple(ASKED)]
    rng = random.Random(1)
    asked = [
        params_of(
            *each,
            seed=i,
            count=rng.choice([16, longest]),
            temperature=rng.choice([0.0, 0.3, 0.8]),
        )
        for i, each in enumerate(names)
    ]
    prompts = [[3 + rng.randrange(259) for _ in range(rng.randint(1, 30))] for _ in asked]
    return prompts, asked, names


@pytest.mark.parametrize("taped", [False, True])
@pytest.mark.parametrize(("drafter", "accepted"), [("expert", 200), ("lookup", 1)])
def test_drafts_change_no_token(
    near: Trio, monkeypatch: pytest.MonkeyPatch, drafter: str, accepted: int, taped: bool
) -> None:
    """Side by side in a few slots; in steps that are captured, and run ahead of the host, too."""
    prompts, asked, names = every_pair(24)
    plain = tape.make_decoder(monkeypatch, near, 8).generate(prompts, asked)
    settings: dict[str, Any] = {"taped": taped, "ahead": int(taped)}
    settings["speculation"] = SPECULATIONS[drafter]
    decoder = tape.make_decoder(monkeypatch, near, 5, **settings)
    drafted = decoder.generate(prompts, asked)
    for one, other, each in zip(plain, drafted, names, strict=True):
        assert one.token_ids == other.token_ids, each
    assert decoder.statistics()["accepted"] >= accepted
    assert "captured" in decoder.info()["graphs"] or not taped


@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("speculation", [None, *SPECULATIONS.values()])
def test_n_outputs_are_those_of_their_seeds(
    near: Trio, make_decoder: Callable[..., Decoder], speculation: Speculation | None, slots: int
) -> None:
    """Beside other requests, in more and in fewer slots than outputs; one prompt a role."""
    prompt = {"base": PROMPT, "expert": PROMPT[2:], "anti": [4]}
    params = params_of("repetition", seed=2**64 - 2, n=5, temperature=1.0)
    alone = [
        make_decoder(near, 1).generate([prompt], replace(params, n=1, seed=seed))
        for seed in (2**64 - 2, 2**64 - 1, 0, 1, 2)
    ]
    decoder = make_decoder(near, slots, speculation=speculation)
    asked = [params_of(), params, params_of()]
    before, *outputs, after = decoder.generate([[9], prompt, [7, 7]], asked)
    assert [output.sample for output in (before, *outputs, after)] == [0, 0, 1, 2, 3, 4, 0]
    assert [output.token_ids for output in outputs] == [one.token_ids for [one] in alone]
    assert len({tuple(output.token_ids) for output in outputs}) == 5


@pytest.mark.parametrize("chunk", [512, 3])
def test_a_prompt_of_n_outputs_runs_once(
    near: Trio, make_decoder: Callable[..., Decoder], chunk: int
) -> None:
    parts = -(-len(PROMPT) // chunk)
    decoder = make_decoder(near, 3, prefill_chunk=chunk)
    # All end at the same step but for the first, which is the shortest.
    decoder.generate([PROMPT], params_of(n=3))
    assert decoder.statistics()["prefill_forwards"] == parts
    first = decoder.submit(PROMPT, params_of(n=4))
    decoder.cancel(first + 1)
    done = set[int]()
    while decoder.unfinished:
        done |= {event.sample for event in decoder.step() if event.output is not None}
    assert done == {0, 1, 2, 3}
    assert decoder.statistics()["prefill_forwards"] <= 3 * parts
