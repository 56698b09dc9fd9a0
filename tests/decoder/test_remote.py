"""The decoder over a remote base, by protocol: tokens are alike, what one can't do is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("circuitbreaker", reason="a remote base needs the extra remote")
pytest.importorskip("tenacity", reason="a remote base needs the extra remote")
pytest.importorskip("httpx2", reason="a remote base needs the extra remote")

from proxytune_kernels.decoder import Decoder, Speculation
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import RemoteBase, Trio
from proxytune_kernels.trio.token_texts import Vocabulary
from tests.trio.fake_api import FakeApi, serving

PROMPTS = ["a", "some text", "b"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=9),
    SamplingParams(seed=1, max_tokens=12),
    SamplingParams(seed=2, max_tokens=5, alpha=0.0),
]


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> list[str]:
    vocabulary = Vocabulary(tokenizer)
    return [vocabulary.text_of(i) for i in range(len(tokenizer))]


@pytest.fixture(scope="module")
def drafting(texts: list[str], near: Trio) -> Iterator[Decoder]:
    with serving(FakeApi(texts, ["prompt_logprobs"])) as api:
        yield Decoder(over(api, near), 4)


def over(api: FakeApi, near: Trio, **settings: Any) -> Trio:
    base = RemoteBase(api.url, **{"top_n": 12, **settings})
    return Trio.from_models(base, near.expert, near.anti, near.tokenizer)


def test_drafts_are_the_default_and_change_no_token(drafting, texts, near):
    assert drafting.speculation == Speculation(max_drafts=8, adaptive=False)
    wanted = drafting.generate(PROMPTS, PARAMS)
    with serving(FakeApi(texts, ["step"])) as api:
        trio = over(api, near)
        stepping = Decoder(trio, 4)
        assert stepping.speculation is None
        before = trio.base.endpoint.tries
        outputs = stepping.generate(PROMPTS, PARAMS)
        # One call a token of the longest, beside which the others run; and one more for the prompt
        # that is not steered.
        assert trio.base.endpoint.tries - before == 1 + max(len(o.token_ids) for o in outputs)
        for mine, other in zip(outputs, wanted, strict=True):
            assert (mine.token_ids, mine.text) == (other.token_ids, other.text)
            assert mine.coverage and mine.coverage == pytest.approx(other.coverage, abs=1e-5)
        with pytest.raises(ValueError, match=r"speculation must be None .* a call \(step\)"):
            Decoder(trio, 4, speculation=Speculation())
        with pytest.raises(ValueError, match="prompt_logprobs must be -1 where the base does not"):
            stepping.generate("a", SamplingParams(prompt_logprobs=1))


def test_further_pairs_cancel(drafting, near):
    trio = drafting.trio
    several = Trio(
        *(trio.models, trio.tokenizers, trio.prompts, trio.agreement, trio.eos_token_ids),
        (("expert", "anti"),),
    )
    both = SamplingParams(temperature=0, max_tokens=9, pair_alphas=(-1.0,))
    [output] = Decoder(several, 1).generate("a", both)
    [wanted] = drafting.generate("a", SamplingParams(temperature=0, max_tokens=9, alpha=0.0))
    assert output.speculation and output.speculation.drafted  # the pair runs
    assert output.token_ids == wanted.token_ids


def test_a_request_alone_is_drawn_as_beside_others(drafting):
    together = drafting.generate(PROMPTS, PARAMS)
    for prompt, params, wanted in zip(PROMPTS, PARAMS, together, strict=True):
        [output] = drafting.generate(prompt, params)
        assert (output.token_ids, output.coverage) == (wanted.token_ids, wanted.coverage)


def test_text_drafts_too(drafting):
    looking = Decoder(drafting.trio, 4, speculation=Speculation(drafter="prompt_lookup"))
    for mine, other in zip(
        *(d.generate(PROMPTS, PARAMS) for d in (looking, drafting)), strict=True
    ):
        assert mine.token_ids == other.token_ids


def test_a_chat_chooses_one_token_and_refuses_more(texts, near):
    with serving(FakeApi(texts, ["chat"], ids=False)) as api:
        decoder = Decoder(over(api, near, tail="drop"), 2)
        choice = SamplingParams(temperature=0, max_tokens=1)
        [output] = decoder.generate("a choice", choice)
        assert output.coverage and 0 < output.coverage[0] < 1
        with pytest.raises(ValueError, match="max_tokens must be 1 where the base takes chats al"):
            decoder.generate("a choice", SamplingParams(max_tokens=2))


def test_the_context_is_what_the_endpoint_says(drafting, near, texts):
    assert drafting.max_seq_len == 256  # of the pair; of the endpoint 512
    with serving(FakeApi(texts, ["prompt_logprobs"])) as api:
        # Drafts behind the last token are read, too.
        decoder = Decoder(over(api, near, context=60), 1)
        assert decoder.max_seq_len == 26
        decoder.generate("a" * 10, SamplingParams(max_tokens=17, ignore_eos=True))
        assert max(len(t) for _, b, _ in api.requests[4:] for t in b["prompt"]) <= 60 - 1
    with serving(FakeApi(texts, ["step"])) as api:
        assert Decoder(over(api, near, context=20), 1).max_seq_len == 18


def test_the_composite_of_transformers_refuses_it(drafting):
    from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM

    with pytest.raises(ValueError, match="trio must have its base in this process"):
        ProxyTunedForCausalLM.from_trio(drafting.trio)
