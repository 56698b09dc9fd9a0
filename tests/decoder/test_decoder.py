"""The decoder against the naive loop, on fp64 models where rounding can't change a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from proxytune_kernels import reference
from proxytune_kernels.params import RowParams, SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import nan_token

PROMPTS: list[Any] = [
    "hello",
    "a",
    "stop it now, or else",
    [7, 8, 9],
    {"base": "b", "expert": "a longer expert prompt", "anti": [40, 41]},
    "hello",
    "x y z",
]
ALPHAS = [1.0, 0.5, -1.0, 0.0, 2.0, 1.5, 1.0]


def greedy_params(alpha: float = 1.0, **settings: Any) -> SamplingParams:
    return SamplingParams(
        **{"alpha": alpha, "temperature": 0, "ignore_eos": True, "max_tokens": 12, **settings}
    )


@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("pair", ["separate", "batched"])
def test_greedy_equals_the_naive_loop(trio, make_decoder, greedy, pair, max_batch_size):
    """Ragged, refilled (more prompts than slots, of different lengths), prompts per role."""
    params = [greedy_params(a, max_tokens=4 + 5 * (i % 3)) for i, a in enumerate(ALPHAS)]
    decoder = make_decoder(trio, max_batch_size, pair=pair)
    outputs = decoder.generate(PROMPTS, params)
    assert [output.index for output in outputs] == list(range(len(PROMPTS)))
    for output, p in zip(outputs, params, strict=True):
        wanted = greedy(trio.models, output.prompt_token_ids, p.alpha, p.max_tokens)
        assert output.token_ids == wanted
        assert output.finish_reason == "length"
        assert output.status == 0
    assert not any(any(decoder._runner.lengths(role)) for role in decoder.roles)


def test_sampled_tokens_equal_the_naive_loop(trio, make_decoder, naive):
    """The reference draws from the naive loop's logits, at the positions of the contract."""
    params = SamplingParams(
        alpha=0.7, temperature=1.3, top_p=0.95, top_k=50, seed=2**64 - 5, ignore_eos=True
    )

    def pick(logits: dict[str, torch.Tensor], position: int) -> int:
        base, expert, anti = (logits[role].float()[None] for role in ("base", "expert", "anti"))
        row = RowParams.from_sampling_params([params], [position])
        x = reference.combine(base, expert, anti, row.alpha)
        return int(reference.sample(x, row).token_ids)

    [output] = make_decoder(trio).generate("hello", params)
    assert output.token_ids == naive(trio.models, output.prompt_token_ids, 16, pick)


def test_alpha_0_is_the_base(trio, make_decoder):
    params = SamplingParams(alpha=0, seed=3, max_tokens=24, top_p=0.9)
    steered = make_decoder(trio).generate(PROMPTS[:4], params)
    base = make_decoder(trio, roles=("base",)).generate(PROMPTS[:4], params)
    alone = Trio.from_models(trio.base, tokenizer=trio.tokenizer)
    alone_outputs = make_decoder(alone).generate(PROMPTS[:4], params)
    for output, *others in zip(steered, base, alone_outputs, strict=True):
        for other in others:
            assert output.token_ids == other.token_ids
            assert output.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            assert list(other.prompt_token_ids) == ["base"]


def test_seeded_tokens_do_not_depend_on_what_shares_the_batch(trio, make_decoder):
    params = SamplingParams(seed=11, max_tokens=20, top_p=0.95, ignore_eos=True)
    [alone] = make_decoder(trio, 1).generate(["hello"], params)
    assert alone.seed == 11
    for max_batch_size in (2, 3, 8):
        outputs = make_decoder(trio, max_batch_size).generate(
            ["x", "some longer prompt", "hello", "y", "hello"],
            [
                SamplingParams(max_tokens=3),
                SamplingParams(max_tokens=9, alpha=-2.0),
                params,
                SamplingParams(max_tokens=30),
                params,
            ],
        )
        assert outputs[2].token_ids == outputs[4].token_ids == alone.token_ids


def test_a_drawn_seed_is_reported_and_repeats_the_output(trio, make_decoder):
    decoder = make_decoder(trio)
    first, second = decoder.generate(["hello", "hello"], SamplingParams(max_tokens=20))
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    [again] = decoder.generate("hello", SamplingParams(max_tokens=20, seed=first.seed))
    assert again.token_ids == first.token_ids


def test_logprobs(trio, make_decoder):
    params = SamplingParams(seed=5, temperature=0.8, top_k=3, max_tokens=6, ignore_eos=True)
    [output] = make_decoder(trio).generate("hello", params)
    sequences = {role: list(ids) for role, ids in output.prompt_token_ids.items()}
    for i, token_id in enumerate(output.token_ids):
        with torch.no_grad():
            base, expert, anti = (
                model(torch.tensor([sequences[role]])).logits[0, -1]
                for role, model in trio.models.items()
            )
        x = base + expert - anti
        kept = x.topk(3)
        drawn = torch.log_softmax(kept.values / 0.8, -1)[kept.indices == token_id]
        # Some fp32 roundings of logits up to about 30.
        assert output.logprobs[i] == pytest.approx(float(drawn), abs=1e-4)
        raw = torch.log_softmax(x, -1)[token_id]
        assert output.raw_logprobs[i] == pytest.approx(float(raw), abs=1e-4)
        for sequence in sequences.values():
            sequence.append(token_id)


def test_metrics_are_in_order(trio, make_decoder):
    first, second = make_decoder(trio, 1).generate(["a", "b"], greedy_params())
    for output in (first, second):
        assert 0 <= output.metrics.queued <= output.metrics.first_token <= output.metrics.total
    assert second.metrics.queued > first.metrics.queued


def test_a_row_with_nothing_to_draw_fails_alone(trio, make_decoder):
    broken = Trio.from_models(trio.base, tokenizer=trio.tokenizer)
    decoder = make_decoder(broken)
    good = decoder.stream("hello", greedy_params())
    next(good)
    with nan_token(trio, 50):
        bad = decoder.stream([[50]], greedy_params())
        with pytest.raises(
            RuntimeError, match=r"prompts\[0\]: no token can be drawn at position 0"
        ):
            list(bad)
        rest = list(good)
    assert rest[-1].finish_reason == "length"
    [wanted] = decoder.generate("hello", greedy_params())
    assert rest[-1].output is not None
    assert rest[-1].output.token_ids == wanted.token_ids
