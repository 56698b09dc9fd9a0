"""What a request asks to see of its tokens, held to the models' own forwards and the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from proxytune_kernels import reference
from proxytune_kernels.decoder import Decoder, RequestOutput, Speculation
from proxytune_kernels.params import RowParams, SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import BACKEND, by_request, ended

PROMPTS = ["a stop", "to be or not to be, that", "x"]

# The decoder rounds the roles' fp64 logits to fp32: x moves by at most 4 * 2^-24 * 12 (logits here
# are below 12 in size, alpha 1.5), a log-softmax by twice that, 5.8e-6, and at temperature .7 by
# 8.2e-6.
TOLERANCE = 1e-5

SPECULATIONS = {
    "plain": None,
    "coupled": Speculation(max_drafts=3, adaptive=False),
    "rejection": Speculation(max_drafts=3, adaptive=False, mode="rejection"),
    "lookup": Speculation(drafter="prompt_lookup", max_drafts=4, adaptive=False),
}


@pytest.fixture(scope="module", params=SPECULATIONS)
def decoder(request: Any, near: Trio) -> Decoder:
    speculation = SPECULATIONS[request.param]
    return Decoder(near, 3, backend=BACKEND, speculation=speculation, prefill_chunk=4)


@torch.no_grad()
def logits_of(
    trio: Trio, output: RequestOutput, params: SamplingParams
) -> tuple[Tensor, dict[str, Tensor]]:
    """x, and the roles' logits, after each token of prompt and output but the last."""
    text = torch.tensor([[*output.prompt_token_ids["base"], *output.token_ids]])
    roles = {role: trio.models[role](text).logits[0, :-1, : trio.vocab_size] for role in trio.roles}
    return roles["base"] + params.alpha * (roles["expert"] - roles["anti"]), roles


def distributions(trio: Trio, output: RequestOutput, params: SamplingParams) -> Any:
    """The reference's distribution at each of these places."""
    x, _ = logits_of(trio, output, params)
    each = RowParams.from_sampling_params([params.with_seed()] * len(x))
    return reference.distribution(x, each)


def expected(logprobs: Tensor, token_id: int, count: int) -> dict[int, float]:
    """The token's entry, then those of the likeliest, of which there may be fewer."""
    values, ids = logprobs.sort(descending=True, stable=True)
    found = {token_id: float(logprobs[token_id])}
    for i, value in zip(ids[:count].tolist(), values[:count].tolist(), strict=True):
        if value > -torch.inf:
            found.setdefault(i, value)
    return found


def check(found: dict[int, float] | None, wanted: dict[int, float]) -> None:
    assert found is not None and list(found) == list(wanted)
    assert found == pytest.approx(wanted, abs=TOLERANCE)


def test_logprobs_of_outputs(decoder: Decoder, near: Trio) -> None:
    settings: list[dict[str, Any]] = [
        {"logprobs": 3, "temperature": 0.7, "top_p": 0.8},
        {"logprobs": 20, "logprobs_mode": "drawn", "temperature": 0.7, "top_k": 8, "alpha": 1.5},
        {"logprobs": 0, "logprobs_mode": "drawn", "temperature": 0.0, "prompt_logprobs": 2},
    ]
    params = [SamplingParams(max_tokens=12, seed=i, **s) for i, s in enumerate(settings)]
    streams = by_request(decoder.stream(PROMPTS, params))
    for i, own in enumerate(params):
        output = ended(streams[i])
        d = distributions(near, output, own)
        logprobs = d.raw_logprobs() if own.logprobs_mode == "raw" else d.logprobs()
        start = len(output.prompt_token_ids["base"]) - 1
        assert output.top_logprobs is not None
        assert len(output.top_logprobs) == len(output.token_ids)
        for j, token_id in enumerate(output.token_ids):
            wanted = expected(logprobs[start + j], token_id, own.logprobs)
            check(output.top_logprobs[j], wanted)
        told = [entry for event in streams[i] for entry in event.top_logprobs or ()]
        assert told == output.top_logprobs


@pytest.mark.parametrize("alpha", [1.5, 0.0])
def test_steering(decoder: Decoder, near: Trio, alpha: float) -> None:
    """Of a request beside one that asks for nothing, held to the models' own softmaxes."""
    asking = SamplingParams(max_tokens=14, seed=8, alpha=alpha, steering=True, temperature=0.9)
    streams = by_request(
        decoder.stream(["ab", PROMPTS[1]], [SamplingParams(max_tokens=9, seed=1), asking])
    )
    other, output = ended(streams[0]), ended(streams[1])
    assert other.steering is None
    assert output.steering is not None and len(output.steering) == len(output.token_ids)
    assert [s for event in streams[1] for s in event.steering or ()] == output.steering
    x, roles = logits_of(near, output, asking)
    p, q = x.log_softmax(-1), roles["base"].log_softmax(-1)
    start = len(output.prompt_token_ids["base"]) - 1
    for j, (token_id, told) in enumerate(zip(output.token_ids, output.steering, strict=True)):
        row = start + j
        for name in ("expert", "anti"):
            wanted = float(roles[name][row].softmax(-1)[token_id]) if alpha else torch.nan
            assert getattr(told, name) == pytest.approx(wanted, rel=TOLERANCE, nan_ok=True)
        assert told.base == pytest.approx(float(q[row].exp()[token_id]), rel=TOLERANCE)
        assert told.proxy == pytest.approx(float(p[row].exp()[token_id]), rel=TOLERANCE)
        assert told.base_rank == 1 + int((q[row] > q[row, token_id]).sum())
        assert told.changed == (int(p[row].argmax()) != int(q[row].argmax()))
        kl = float((p[row].exp() * (p[row] - q[row])).sum())
        assert told.kl == pytest.approx(kl, abs=5 * TOLERANCE)  # x - base is below 4 here


def test_greedy_draws_have_one_token_that_was_likely(decoder: Decoder) -> None:
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=5, logprobs_mode="drawn")
    [output] = decoder.generate(PROMPTS[:1], params)
    assert output.top_logprobs == [{token_id: 0.0} for token_id in output.token_ids]


@pytest.mark.parametrize("alpha", [1.5, 0.0])
def test_prompt_logprobs(decoder: Decoder, near: Trio, alpha: float) -> None:
    """The prompt is longer than a chunk, and its tokens are those of text with a first token."""
    params = SamplingParams(max_tokens=3, seed=1, alpha=alpha, prompt_logprobs=4, top_k=2)
    others = SamplingParams(max_tokens=5, seed=2)
    streams = by_request(decoder.stream(["y", PROMPTS[1]], [others, params]))
    other, output = ended(streams[0]), ended(streams[1])
    prompt = output.prompt_token_ids["base"]
    logprobs = distributions(near, output, params).raw_logprobs()
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    for j, token_id in enumerate(prompt[1:]):
        check(output.prompt_logprobs[j + 1], expected(logprobs[j], token_id, 4))
    assert other.prompt_logprobs is None and other.top_logprobs is None
    first, *rest = streams[1]
    assert first.prompt_logprobs == output.prompt_logprobs
    assert all(event.prompt_logprobs is None for event in rest)
    assert all(event.top_logprobs is None for event in streams[1])
    # Of several outputs each has them, and the prompt runs once.
    one, two = decoder.generate([PROMPTS[1]], replace(params, n=2))
    assert one.prompt_logprobs == two.prompt_logprobs == output.prompt_logprobs


def test_asking_changes_no_token(decoder: Decoder) -> None:
    plain = SamplingParams(max_tokens=10, seed=5, temperature=0.8, top_p=0.9)
    asking = SamplingParams(
        max_tokens=10, seed=5, temperature=0.8, top_p=0.9, logprobs=4, prompt_logprobs=1
    )
    [first], [second] = (decoder.generate(PROMPTS[1], p) for p in (plain, asking))
    assert first.token_ids == second.token_ids and first.logprobs == second.logprobs


def test_a_prompt_of_one_token_and_one_with_min_tokens(decoder: Decoder, near: Trio) -> None:
    """A token that may not come yet is masked: it is none of the likeliest."""
    params = SamplingParams(
        max_tokens=4, seed=3, logprobs=20, prompt_logprobs=0, min_tokens=4, ignore_eos=True,
        stop_token_ids=list(range(0, near.vocab_size, 2)),
    )  # fmt: skip
    [output] = decoder.generate([[7]], params)
    assert output.prompt_logprobs == [None]
    assert output.top_logprobs is not None
    assert all(i % 2 for entries in output.top_logprobs for i in entries)


def test_a_role_with_a_prompt_of_its_own_has_no_prompt_logprobs(decoder: Decoder) -> None:
    prompt = {"base": "ab", "expert": "abc", "anti": "ab"}
    message = "prompt_logprobs must be -1 where a role has a prompt of its own.*expert"
    with pytest.raises(ValueError, match=message):
        decoder.generate([prompt], SamplingParams(prompt_logprobs=0))
    decoder.generate([prompt], SamplingParams(prompt_logprobs=0, alpha=0.0, max_tokens=1))


def test_with_alphas_and_penalties_drafts_change_nothing_that_is_seen(near: Trio) -> None:
    params = SamplingParams(
        alpha=[1.0, 0.5, 2.0], repetition_penalty=1.2, logit_bias={65: 1.5}, logprobs=3,
        steering=True, seed=3, temperature=0.8, max_tokens=12, ignore_eos=True,
    )  # fmt: skip
    plain, drafted = (
        Decoder(near, 1, backend=BACKEND, speculation=SPECULATIONS[name]).generate(PROMPTS, params)
        for name in ("plain", "coupled")
    )
    for a, b in zip(plain, drafted, strict=True):
        assert a.token_ids == b.token_ids
        assert a.steering is not None and b.steering is not None
        for one, other in zip(a.steering, b.steering, strict=True):
            # Each within TOLERANCE of what is right, probabilities being at most 1.
            assert other == pytest.approx(one, abs=2 * TOLERANCE)
        assert a.top_logprobs is not None and b.top_logprobs is not None
        for seen, again in zip(a.top_logprobs, b.top_logprobs, strict=True):
            assert again == pytest.approx(seen, abs=2 * TOLERANCE)
