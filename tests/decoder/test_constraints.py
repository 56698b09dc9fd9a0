"""Penalties, biases, masks, bad words, alphas: what each asks, and the same tokens with drafts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from torch import Tensor
from torch.distributions import Categorical

from proxytune_kernels import reference
from proxytune_kernels.decoder import Decoder, Speculation
from proxytune_kernels.decoder.constraints import Needs
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
    "after_prompt": {"bad_words": [[60, i] for i in range(3, 255)] + [[41, 42, 60, 256]],
        "bad_words_prompt": True},
    "allowed_at": {"allowed_at": {0: range(40, 60), 7: [8, 9], 8: [77], 19: range(250)}},
    "repetition": {"repetition_penalty": 3.0},
    "output_only": {"repetition_penalty": 0.3, "penalty_prompt": False},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.9},
    "alphas": {"alpha": [1.0, -0.5, 2.0, 0.0, 0.7]},
    "schedule": {"alpha_schedule": "entropy:4.8"},
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
        if Categorical(logits=logits["base"]).entropy() <= params.schedule[1]:
            row = row._replace(alpha=row.alpha * 0)
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
    with_prompt = replace(params, penalty_prompt=True) if name == "output_only" else params_of()
    other = make_decoder(near).generate([PROMPT], with_prompt)[0]
    assert output.token_ids != other.token_ids  # what is asked matters here


SPECULATIONS = {
    "expert": Speculation(max_drafts=4, adaptive=False),
    "lookup": Speculation(drafter="prompt_lookup", max_drafts=3, adaptive=False),
}

# Of eight tokens one comes again and again, in a round, too.
FEW: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3, "presence_penalty": -0.2, "frequency_penalty": 0.1,
     "logit_bias": {1: 0.8, 4: -0.7}},
    {"bad_words": [[2, 3], [5, 1, 2], [1, 1, 6], [6, 6, 6, 6], [3, 6], [2, 1, 6]]},
    {"allowed_token_ids": [0, 1, 3, 5, 6], "min_tokens": 12, "stop_token_ids": [3],
     "bad_words": [[0], [1, 5]]},
    {"bad_words": [[6, 1], [2, 6, 3], [5, 2, 6, 0], [3]], "bad_words_prompt": True,
     "min_tokens": 9, "stop_token_ids": [5], "allowed_at": {0: [1, 2, 4, 7], 5: [3, 5], 23: [3]}},
    {"allowed_token_ids": [1, 3, 6], "min_tokens": 12},
    {"frequency_penalty": -0.1, "alpha": [1.0, -0.5, 2.0, 0.0, 0.7], "temperature": 0.0},
    {"alpha": 1.5, "alpha_schedule": "decay:0.75"},
]  # fmt: skip


@pytest.mark.parametrize("asked", FEW)
def test_few_tokens_again_and_again(
    eight: Trio, make_decoder: Callable[..., Decoder], asked: dict[str, Any]
) -> None:
    prompt = [1, 2, 5, 2, 6]
    params = [SamplingParams(**asked, seed=seed, max_tokens=24) for seed in range(4)]
    wanted = [cut(naive_tokens(eight, one, prompt), one) for one in params]
    for speculation in (None, *SPECULATIONS.values()):
        decoder = make_decoder(eight, 3, max_seq_len=64, speculation=speculation)
        outputs = decoder.generate([prompt] * len(params), params)
        assert [output.token_ids for output in outputs] == wanted


def test_a_list_of_alphas_takes_no_more_room_than_there_are_tokens(
    near: Trio, make_decoder: Callable[..., Decoder]
) -> None:
    decoder = make_decoder(near, 1)
    params = [SamplingParams(alpha=[0.5] * 5000, max_tokens=n) for n in (1, 3)]
    for one in params:
        decoder.generate([PROMPT], one)
    assert decoder._sampler.constraints.sized(Needs(alphas=1)).alphas == 4


def requests(longest: int, pairs: bool) -> tuple[list[Any], list[SamplingParams], list[Any]]:
    """Requests that ask nothing, each thing, all, and each pair of them."""
    names = [(), *((name,) for name in ASKED), tuple(ASKED)]
    names += combinations(ASKED, 2) if pairs else ()
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


def check_drafts(
    monkeypatch: pytest.MonkeyPatch, trio: Trio, drafter: str, given: Any, **options: Any
) -> Decoder:
    prompts, asked, names = given
    plain = tape.make_decoder(monkeypatch, trio, 8).generate(prompts, asked)
    speculation = SPECULATIONS[drafter]
    decoder = tape.make_decoder(monkeypatch, trio, 5, speculation=speculation, **options)
    for one, other, each in zip(plain, decoder.generate(prompts, asked), names, strict=True):
        assert one.token_ids == other.token_ids, each
    return decoder


@pytest.mark.parametrize(("drafter", "accepted"), [("expert", 300), ("lookup", 1)])
def test_drafts_change_no_token(
    near: Trio, monkeypatch: pytest.MonkeyPatch, drafter: str, accepted: int
) -> None:
    """Side by side in a few slots."""
    decoder = check_drafts(monkeypatch, near, drafter, requests(24, pairs=True))
    assert decoder.statistics()["accepted"] >= accepted


@pytest.mark.parametrize("drafter", SPECULATIONS)
def test_captured_steps_see_it_in_place(
    near: Trio, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """And behind a host that runs ahead; requests that need more room than there was, too."""
    given = requests(24, pairs=False)
    decoder = check_drafts(monkeypatch, near, drafter, given, taped=True, ahead=1)
    assert "captured" in decoder.info()["graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", SPECULATIONS)
def test_drafts_change_no_token_of_long_texts(
    near: Trio, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    check_drafts(monkeypatch, near, drafter, requests(60, pairs=True))


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
