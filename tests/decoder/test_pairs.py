"""Several pairs in one trio: what they add up to, with drafts and without, and who pays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from proxytune_kernels import reference
from proxytune_kernels.decoder import Decoder, Speculation
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.decoder.scoring import Scorer
from proxytune_kernels.integrations.hf import EngineGenerate, ProxyTunedForCausalLM
from proxytune_kernels.params import RowParams, SamplingParams
from proxytune_kernels.trio import Trio
from proxytune_kernels.trio.vocabulary import VocabularyError
from tests.cli import assert_one_sentence, invoke
from tests.decoder import tape
from tests.decoder.conftest import (
    byte_tokenizer,
    naive_loop,
    noisy_copy,
    tiny_llama,
    word_tokenizer,
)
from tests.documents import examples

PROMPT = [5, 9, 9, 40, 41, 42, 60]
DRAWN: dict[str, Any] = {"temperature": 0.7, "ignore_eos": True, "max_tokens": 16}
# Side by side: the first pair alone, a further one alone, both, all three, nothing; by position and
# by rule.
ASKED = [
    SamplingParams(**DRAWN, seed=1),
    SamplingParams(**DRAWN, seed=2, alpha=0.0, pair_alphas=(1.2, 0.0)),
    SamplingParams(**DRAWN, seed=3, alpha=0.8, pair_alphas=(0.0, -0.7)),
    SamplingParams(**DRAWN, seed=4, pair_alphas=(0.6, 1.5), top_p=0.9, presence_penalty=1.0),
    SamplingParams(**DRAWN, seed=5, alpha=0.0),
    SamplingParams(**DRAWN, seed=6, alpha=[1.0, -0.5, 2.0], pair_alphas=[0.9, 0.4]),
    SamplingParams(**DRAWN, seed=7, alpha_schedule="entropy:4.8", pair_alphas=(1.5, 1.5)),
    SamplingParams(**DRAWN, seed=8, alpha_schedule="decay:0.8", pair_alphas=(1.5, 0.0)),
]
SPECULATIONS = {
    "expert": Speculation(max_drafts=3, adaptive=False),
    "lookup": Speculation(drafter="prompt_lookup", max_drafts=3, adaptive=False),
}


@pytest.fixture(scope="module")
def several(near: Trio) -> Trio:
    """Two further pairs, of which the second has the first pair's anti."""
    others = [noisy_copy(near.anti, 0.08, seed) for seed in (11, 12, 13)]
    return Trio.from_models(
        near.base, near.expert, near.anti, near.tokenizer,
        pairs=[(others[0], others[1]), (others[2], near.anti)],
    )  # fmt: skip


def combined(
    trio: Trio, logits: dict[str, Tensor], params: SamplingParams, position: int = 0
) -> Tensor:
    """x [..., V] in fp64, by its definition."""
    alpha = params.alphas[min(position, len(params.alphas) - 1)]
    alphas = [alpha, *(params.pair_alphas or (0.0,) * len(trio.pairs))]
    decay, least = params.schedule
    steered = Categorical(logits=logits["base"]).entropy() > least
    x = logits["base"]
    for (expert, anti), a in zip([("expert", "anti"), *trio.pairs], alphas, strict=True):
        x = x + steered[..., None] * a * decay**position * (logits[expert] - logits[anti])
    return x


def naive_tokens(trio: Trio, params: SamplingParams) -> list[int]:
    output: list[int] = []

    def pick(logits: dict[str, Tensor], position: int) -> int:
        x = combined(trio, logits, params, position).float()
        x[list(set(output))] -= params.presence_penalty
        row = RowParams.from_sampling_params([params], [position])
        output.append(int(reference.sample(x[None], row).token_ids))
        return output[-1]

    return naive_loop(trio.members, dict.fromkeys(trio.members, PROMPT), params.max_tokens, pick)


@pytest.fixture(scope="module")
def wanted(several: Trio) -> list[list[int]]:
    return [naive_tokens(several, params) for params in ASKED]


def tokens(decoder: Decoder, asked: Sequence[SamplingParams]) -> list[list[int]]:
    outputs = decoder.generate([PROMPT] * len(asked), asked)
    return [output.token_ids for output in outputs]


def test_tokens_are_those_of_the_sum(
    several: Trio, wanted: list[list[int]], make_decoder: Callable[..., Decoder]
) -> None:
    assert several.pairs == (("expert_2", "anti_2"), ("expert_3", "anti"))
    assert [*several.further] == ["expert_2", "anti_2", "expert_3"]
    # In fewer slots than requests: a slot gets others' alphas, and requests move.
    assert tokens(make_decoder(several, 3), ASKED) == wanted
    first = [SamplingParams(**DRAWN, seed=i, alpha=a) for i, a in enumerate((0.8, 1.0), 3)]
    assert tokens(make_decoder(several), first) != [wanted[2], wanted[3]]  # they matter here


@pytest.mark.parametrize("drafter", SPECULATIONS)
def test_drafts_change_no_token(
    several: Trio, wanted: list[list[int]], make_decoder: Callable[..., Decoder], drafter: str
) -> None:
    decoder = make_decoder(several, 5, speculation=SPECULATIONS[drafter])
    assert tokens(decoder, ASKED) == wanted
    if drafter == "expert":
        assert decoder.statistics()["accepted"] > 20


def test_captured_steps_see_alphas_in_place(
    several: Trio, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And behind a host that runs ahead."""
    decoder = tape.make_decoder(
        monkeypatch, several, 2, taped=True, ahead=1, speculation=SPECULATIONS["expert"]
    )
    assert tokens(decoder, ASKED[1:4]) == wanted[1:4]
    assert "captured" in decoder.info()["graphs"]


def test_greedy_rejection_is_the_argmax(
    several: Trio, make_decoder: Callable[..., Decoder]
) -> None:
    params = SamplingParams(**{**DRAWN, "temperature": 0}, seed=0, pair_alphas=(1.0, 0.8))
    speculation = Speculation(mode="rejection", max_drafts=3, adaptive=False)
    decoder = make_decoder(several, speculation=speculation)
    assert tokens(decoder, [params]) == [naive_tokens(several, params)]


def close(mine: Sequence[float], other: Sequence[float]) -> bool:
    """Raw logprobs that differ by the rounding of x alone.

    The pair's tokens are one rounding of fma, the sum's three: of alpha_2 * (e - a), of fma, of
    their sum. Logits here are below 16, so each is off by at most 2^-20, and so is x's maximum that
    they are held to; fp32 log-sum-exp adds about as much.
    """
    return all(abs(a - b) <= 8 * 2.0**-20 for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("speculation", [None, *SPECULATIONS.values()])
def test_a_pair_twice_at_half_strength_is_the_pair_and_opposites_cancel(
    near: Trio, make_decoder: Callable[..., Decoder], speculation: Any
) -> None:
    more: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "seed": 9}
    models = (near.base, near.expert, near.anti, near.tokenizer)
    twice = Trio.from_models(*models, pairs=[(near.expert, near.anti)])
    assert twice.pairs == (("expert", "anti"),) and not twice.further
    opposite = Trio.from_models(*models, pairs=[(near.anti, near.expert)])
    assert opposite.pairs == (("expert_2", "anti_2"),)
    cases: list[tuple[Trio, dict[str, Any], dict[str, Any]]] = [
        (twice, {"alpha": 0.5, "pair_alphas": (0.5,)}, {"alpha": 1.0}),
        (twice, {"alpha": 0.75, "pair_alphas": (-0.75,)}, {"alpha": 0.0}),
        (opposite, {"alpha": 1.25, "pair_alphas": (1.25,)}, {"alpha": 0.0}),
    ]
    for trio, mine, other in cases:
        decoder = make_decoder(trio, speculation=speculation)
        asked = [
            SamplingParams(**more, **one, temperature=temperature)
            for temperature in (0.0, 1.0)
            for one in (mine, other)
        ]
        outputs = decoder.generate([PROMPT] * 4, asked)
        for one, two in zip(outputs[::2], outputs[1::2], strict=True):
            assert one.token_ids == two.token_ids
            assert close(one.raw_logprobs, two.raw_logprobs)


def test_rows_without_further_alphas_pay_nothing(
    several: Trio, near: Trio, make_decoder: Callable[..., Decoder], monkeypatch: Any
) -> None:
    seen: list[tuple[str, ...]] = []
    forward = Runner.forward

    def watched(self: Runner, roles: Any, *arguments: Any) -> dict[str, Tensor]:
        seen.append(roles)
        return forward(self, roles, *arguments)

    monkeypatch.setattr(Runner, "forward", watched)
    decoder = make_decoder(several)
    sizes = decoder.info()["cache_bytes"], make_decoder(near).info()["cache_bytes"]
    # Keys and values of three models more, each like one of the three there were.
    assert sizes[0] == 2 * sizes[1]
    for params, roles in (
        (ASKED[0], ("base", "expert", "anti")),
        (ASKED[4], ("base",)),
        (ASKED[1], ("base", "expert", "anti", "expert_2", "anti_2")),
        (ASKED[2], ("base", "expert", "anti", "expert_3")),
    ):
        decoder.generate([PROMPT], params)
        assert set(seen) == {roles}
        seen.clear()
    base = make_decoder(several, roles=("base",))
    [alone] = tokens(base, [ASKED[3]])
    assert [alone] == tokens(base, [replace(ASKED[3], pair_alphas=())])


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 30])
def test_reports_are_of_the_whole_sum(
    several: Trio, make_decoder: Callable[..., Decoder], count: int
) -> None:
    params = SamplingParams(
        seed=3, max_tokens=6, ignore_eos=True, pair_alphas=(0.7, 0.5), steering=True, logprobs=3,
        prompt_logprobs=count,
    )  # fmt: skip
    speculation = SPECULATIONS["expert"] if count == 2 else None
    [output] = make_decoder(several, speculation=speculation).generate([PROMPT], params)
    text = [*PROMPT, *output.token_ids]
    logits = {r: m(torch.tensor([text])).logits[0, :-1] for r, m in several.members.items()}
    own = {role: x.softmax(-1) for role, x in logits.items()}
    x = combined(several, logits, params).log_softmax(-1)
    assert output.prompt_logprobs is not None and output.steering is not None
    for i, found in enumerate(output.prompt_logprobs[1:]):
        assert found is not None and len(found) >= count
        assert list(found.values()) == pytest.approx(x[i, list(found)].tolist(), abs=1e-4)
    start = len(PROMPT) - 1
    for i, (token_id, told) in enumerate(
        zip(output.token_ids, output.steering, strict=True), start
    ):
        assert told.proxy == pytest.approx(float(x[i, token_id].exp()), rel=1e-4)
        for role in ("base", "expert", "anti"):
            assert getattr(told, role) == pytest.approx(float(own[role][i, token_id]), rel=1e-4)
        kl = (x[i].exp() * (x[i] - own["base"][i].log())).sum()
        assert told.kl == pytest.approx(float(kl), rel=1e-3)
        assert told.changed == (x[i].argmax() != logits["base"][i].argmax())


def test_each_role_keeps_its_prompt(several: Trio, make_decoder: Callable[..., Decoder]) -> None:
    """Members of further pairs read those of expert and anti; outputs of one prompt share it."""
    prompts = {"base": PROMPT, "expert": [7, 8], "anti": [30, 31, 32]}
    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, pair_alphas=(1.0, 1.0), n=2
    )

    def pick(logits: dict[str, Tensor], position: int) -> int:
        return int(combined(several, logits, params).argmax())

    whole = {role: prompts[role.partition("_")[0]] for role in several.members}
    wanted = naive_loop(several.members, whole, params.max_tokens, pick)
    for chunk in (512, 2):
        outputs = make_decoder(several, prefill_chunk=chunk).generate([prompts], params)
        assert [output.token_ids for output in outputs] == [wanted, wanted]


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = examples("docs/pairs.md", "python")
    names: dict[str, Any] = {}
    exec(compile(example, "pairs.md", "exec"), names)
    assert "#### 7" in capsys.readouterr().out
    pair = ",".join(str(names["folder"] / role) for role in ("expert", "anti"))
    command = ["generate", "--trio", "shipped", "--temperature", 0, "--max-tokens", 48]
    halves = ["--alpha", 0.5, "--further-pair", pair, "--pair-alpha", 0.5]
    result = invoke(*command, *halves, names["question"])
    assert result.exit_code == 0, result.output
    assert names["whole"].text.strip() in result.stdout
    assert_one_sentence(
        invoke(*command, "--further-pair", "a", "x"), 2, "--further-pair must be EXPERT,ANTI"
    )


def test_pairs_and_strengths_that_cannot_be(several: Trio, near: Trio) -> None:
    decoder = Decoder(several, 1)
    for alphas in ((1.0,), (1.0, 0.5, 0.2)):
        with pytest.raises(ValueError, match=r"prompts\[0\]: pair_alphas .* which has 2, or be"):
            decoder.generate("a", SamplingParams(pair_alphas=alphas))
    with pytest.raises(ValueError, match="pair_alphas .* which has 0"):
        Decoder(near, 1).generate("a", SamplingParams(pair_alphas=(1.0,)))
    models = (near.base, near.expert, near.anti)
    wrongs: list[Any] = [[near.expert], [(near.expert,)], [(near.expert, None)]]
    for pairs in wrongs:
        with pytest.raises(ValueError, match=r"pairs must be \(expert, anti\) for each"):
            Trio.from_models(*models, byte_tokenizer(), pairs=pairs)
    with pytest.raises(ValueError, match="pairs must come behind expert and anti"):
        Trio.from_models(near.base, tokenizer=byte_tokenizer(), pairs=[models[1:]])
    adapted = copy.deepcopy(near.expert)
    adapted.model.lora_A = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="without LoRA layers, got some in expert_2"):
        Trio.from_models(*models, byte_tokenizer(), pairs=[(adapted, near.anti)])
    tokenizer = {**dict.fromkeys(("base", "expert", "anti"), byte_tokenizer())}
    tokenizer["anti_2"] = word_tokenizer(262)
    pair = near.expert, copy.copy(near.anti)
    with pytest.raises(VocabularyError, match="anti_2 must share one vocabulary"):
        Trio.from_models(*models, tokenizer, pairs=[pair])
    short = tiny_llama(1, 16, 1, vocab_size=260)
    trio = Trio.from_models(*models, byte_tokenizer(), pairs=[(short, near.anti)])
    assert trio.vocab_size == 260
    with pytest.raises(ValueError, match=r"prompt of expert must have token ids in \[0, 260\)"):
        trio.tokenize([261])
    users: list[Callable[[Trio], Any]]
    users = [Scorer, ProxyTunedForCausalLM.from_trio, EngineGenerate]
    for user in users:
        with pytest.raises(ValueError, match="needs a trio of one pair, got 2 further ones"):
            user(several)
