"""A decoder that is kept while it has room, and made anew where it has not."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from proxytune_kernels import SamplingParams
from proxytune_kernels.decoder import Decoder, MemberError, attention, runner
from proxytune_kernels.decoder.pool import DecoderPool
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import VOCAB_SIZE, tiny_llama


@pytest.fixture
def own_trio(tokenizer):
    """One whose weights may be changed."""
    base, expert, anti = (
        tiny_llama(seed, 16, 1, max_position_embeddings=1024) for seed in range(3)
    )
    return Trio.from_models(base, expert, anti, tokenizer)


def test_it_is_kept_while_it_has_room(own_trio):
    pool = DecoderPool(max_batch_size=4)
    assert pool.decoder is None
    calls = ((1, 9), (1, 256), (3, 9), (9, 9), (1, 257), (2, 300), (1, 600))
    made = [pool.decoder_for(own_trio, *call) for call in calls]
    assert pool.decoder is made[-1]
    shapes = [(d.max_batch_size, d.max_seq_len) for d in made]
    assert shapes == [(1, 256), (1, 256), (4, 256), (4, 256), (4, 512), (4, 512), (4, 1024)]
    kept = [a is b for a, b in itertools.pairwise(made)]
    assert kept == [a == b for a, b in itertools.pairwise(shapes)]


def test_its_bounds(own_trio):
    with pytest.raises(ValueError, match="texts of 1025 tokens must fit in max_seq_len 1024"):
        DecoderPool().decoder_for(own_trio, 1, 1025)
    pool = DecoderPool(max_seq_len=100)
    assert pool.decoder_for(own_trio, 1, 100).max_seq_len == 100
    with pytest.raises(ValueError, match="texts of 101 tokens must fit in max_seq_len 100"):
        pool.decoder_for(own_trio, 1, 101)
    with pytest.raises(ValueError, match="max_seq_len must be at most 1024, the context of base"):
        DecoderPool(max_seq_len=2000).decoder_for(own_trio, 1, 8)


def test_changed_weights_and_another_trio_make_it_anew(own_trio, trio):
    pool, params = DecoderPool(), SamplingParams(temperature=0.0, max_tokens=8)
    first = pool.decoder_for(own_trio, 1, 12)
    [before] = first.generate([[5, 9, 13]], params)
    with torch.no_grad():
        own_trio.expert.lm_head.weight.mul_(-3.0)  # the stacked pair holds a copy
    second = pool.decoder_for(own_trio, 1, 12)
    [after] = second.generate([[5, 9, 13]], params)
    assert first is not second and before.token_ids != after.token_ids
    assert pool.decoder_for(own_trio, 1, 12) is second
    assert pool.decoder_for(trio, 1, 12).trio is trio


def test_a_copy_makes_its_own(own_trio):
    pool = DecoderPool()
    pool.decoder_for(own_trio, 1, 12)
    assert copy.deepcopy(pool).decoder is None


def test_attention_that_can_not_run_is_found_out_once(own_trio, monkeypatch):
    calls: list[int] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        raise NotImplementedError("no such attention")

    monkeypatch.setattr(attention, "slot_attention", refuse)
    pool = DecoderPool()
    for _ in range(2):
        with pytest.raises(MemberError, match="base must be .* NotImplementedError: no such att"):
            pool.decoder_for(own_trio, 1, 12)
    assert len(calls) == 1 and pool.decoder is None


def test_a_context_of_unknown_length_is_named(tokenizer):
    base = BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="base must say its context's length .*BloomForCausalLM"):
        DecoderPool().decoder_for(Trio.from_models(base, tokenizer=tokenizer), 1, 8)


def test_a_decoder_that_lays_weights_out_is_kept(own_trio, monkeypatch):
    """Forwards that are compiled for static rows merge products: the same values elsewhere."""
    monkeypatch.setattr(runner, "choose_kernel", lambda device, dtype: ("triton", None))
    pool = DecoderPool(compile=True, check=False)
    place = own_trio.base.model.layers[0].self_attn.k_proj.weight.data_ptr()
    first = pool.decoder_for(own_trio, 1, 12)
    assert own_trio.base.model.layers[0].self_attn.k_proj.weight.data_ptr() != place
    assert pool.decoder_for(own_trio, 1, 12) is first


def test_memory_that_a_captured_step_reads_is_kept(own_trio, monkeypatch):
    """Another decoder of the same models may lay weights out anew."""
    made = Decoder(own_trio, compile=False)
    made._runner.capture()
    weight = own_trio.base.model.layers[0].self_attn.k_proj.weight
    place = weight.data_ptr()
    monkeypatch.setattr(runner, "choose_kernel", lambda device, dtype: ("triton", None))
    Decoder(own_trio, compile=True, check=False)
    assert weight.data_ptr() != place
    assert place in {kept.data_ptr() for kept in made._runner._captured_weights}
