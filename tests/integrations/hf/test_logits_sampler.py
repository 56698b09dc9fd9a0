"""A sampler for loops that hold the three roles' logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    set_seed,
)

from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM
from proxytune_kernels.integrations.hf.sampling import LogitsSampler, NotInOp, draw_seeds
from proxytune_kernels.ops import combine
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import VOCAB_SIZE, byte_tokenizer, tiny_llama

LONG = 8


@pytest.fixture(scope="module")
def model():
    base, expert, anti = tiny_llama(0, 48, 3), tiny_llama(1), tiny_llama(2)
    return ProxyTunedForCausalLM.from_trio(
        Trio.from_models(base, expert, anti, byte_tokenizer()), alpha=0.5
    )


def rows_of_logits(batch_size=2, vocab_size=100):
    return torch.randn(3, batch_size, vocab_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def own_loop(model, sampler, inputs):
    """A decoding loop as one writes it: whole forwards, no cache."""
    token_ids = inputs["input_ids"]
    for _ in range(LONG):
        roles = [
            role(input_ids=token_ids, use_cache=False).logits[:, -1].float()
            for role in (model.base, model.expert, model.anti)
        ]
        token_ids = torch.cat([token_ids, sampler.draw(*roles).token_ids[:, None]], dim=1)
    return token_ids.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "min_p": 0.05, "min_new_tokens": 4, "eos_token_id": [5, 6]},
        {"suppress_tokens": list(range(200)), "sequence_bias": [[[230], 4.0]]},
    ],
    ids=str,
)
def test_a_loop_of_ones_own_draws_what_generate_draws(model, options):
    inputs = model.tokenize(["The sum", "two and"])
    wanted = {"eos_token_id": None, **options}
    set_seed(4)
    generated = model.generate(**inputs, max_new_tokens=LONG, **wanted)
    set_seed(4)
    sampler = LogitsSampler.from_config(
        **wanted,
        vocab_size=VOCAB_SIZE,
        batch_size=2,
        alpha=0.5,
        prompt_length=inputs["input_ids"].shape[1],
    )
    # Rows that end go on here.
    assert own_loop(model, sampler, inputs)[0][: generated.shape[1]] == generated[0].tolist()


def test_a_config_is_read_as_generate_reads_it():
    config = GenerationConfig(do_sample=True, temperature=0.7)
    sampler = LogitsSampler.from_config(config, top_p=0.8, vocab_size=100)
    assert sampler.sampling.temperature == 0.7
    assert sampler.sampling.top_p == 0.8
    assert sampler.sampling.top_k == 50
    assert config.top_p is None
    assert LogitsSampler.from_config(vocab_size=100).sampling.temperature == 0


def test_combined_logits_draw_the_same():
    base, expert, anti = rows_of_logits()
    options: dict[str, Any] = {
        "do_sample": True,
        "top_k": 0,
        "vocab_size": 100,
        "batch_size": 2,
        "seed": 7,
    }
    three = LogitsSampler.from_config(**options, alpha=0.5)
    one = LogitsSampler.from_config(**options)
    x = combine(base, expert, anti, 0.5)
    for _ in range(20):
        got, wanted = one.draw(x), three.draw(base, expert, anti)
        assert got.token_ids.tolist() == wanted.token_ids.tolist()


def test_a_position_can_be_drawn_again():
    base, expert, anti = rows_of_logits()
    sampler = LogitsSampler.from_config(
        do_sample=True, vocab_size=100, batch_size=2, seed=-1, min_new_tokens=3,
        eos_token_id=list(range(50)),
    )  # fmt: skip
    first = [sampler.draw(base, expert, anti).token_ids.tolist() for _ in range(6)]
    assert all(token >= 50 for step in first[:3] for token in step)
    assert any(token < 50 for step in first[3:] for token in step)
    sampler.position = 1
    again = [sampler.draw(base, expert, anti).token_ids.tolist() for _ in range(5)]
    assert again == first[1:]
    assert sampler.position == 6


def test_seeds_come_from_the_global_generator():
    torch.manual_seed(3)
    few = draw_seeds(2)
    torch.manual_seed(3)
    assert draw_seeds(5)[:2].tolist() == few.tolist()
    assert draw_seeds(2).tolist() != few.tolist()
    assert (draw_seeds(2000) < 0).float().mean() == pytest.approx(0.5, abs=0.06)  # 5 deviations


def test_rows_have_seeds_of_their_own_unless_told():
    base, expert, anti = (x.expand(8, -1) for x in rows_of_logits(1))
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "vocab_size": 100, "batch_size": 8}
    drawn = LogitsSampler.from_config(**options).draw(base, expert, anti).token_ids
    assert drawn.unique().numel() > 1
    drawn = LogitsSampler.from_config(**options, seed=7).draw(base, expert, anti).token_ids
    assert drawn.unique().numel() == 1


class SmallModels(LogitsProcessor):
    """Proxy-tuning as it is often written: the small models' caches in a logits processor."""

    def __init__(self, model):
        self.model = model
        self.caches = [DynamicCache(config=m.config) for m in (model.expert, model.anti)]

    def __call__(self, input_ids, scores):
        new = input_ids[:, -1:] if self.caches[0].get_seq_length() else input_ids
        expert, anti = (
            small(input_ids=new, past_key_values=cache).logits[:, -1]
            for small, cache in zip((self.model.expert, self.model.anti), self.caches, strict=True)
        )
        return scores + self.model.alpha * (expert - anti)


def test_a_processor_with_caches_of_its_own_is_wrong_where_drafts_are_refused(model):
    inputs = model.tokenize("stop the stop the sum of the sum of the")
    options = {"max_new_tokens": 24, "eos_token_id": None}
    drafts = {"prompt_lookup_num_tokens": 4}
    wanted = model.generate(**inputs, **options).tolist()

    def processed(**given):
        processors = LogitsProcessorList([SmallModels(model)])
        return model.base.generate(
            **inputs, **options, **given, logits_processor=processors
        ).tolist()

    assert processed() == wanted
    assert model.generate(**inputs, **options, **drafts).tolist() == wanted
    assert processed(**drafts) != wanted


def test_what_can_not_be_drawn_is_named():
    with pytest.raises(NotInOp, match="num_beams 3 is not in the op"):
        LogitsSampler.from_config(vocab_size=100, num_beams=3)
    with pytest.raises(ValueError, match="fields of GenerationConfig, got temprature"):
        LogitsSampler.from_config(vocab_size=100, temprature=0.5)
    with pytest.raises(ValueError, match="below the vocabulary's size 100, got 100"):
        LogitsSampler.from_config(vocab_size=100, sequence_bias=[[[100], 1.0]])
    with pytest.raises(ValueError, match=r"alpha must have shape \[2\]"):
        LogitsSampler.from_config(vocab_size=100, batch_size=2, alpha=torch.ones(3))
