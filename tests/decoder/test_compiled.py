"""Compiled decoding steps: the same tokens, and nothing compiled after the warm-up."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import MistralConfig, MistralForCausalLM

from proxytune_kernels.decoder.model import CompiledStep
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio

# Importing torch's own compiler calls what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


def sliding(seed: int) -> Any:
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=262,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        sliding_window=8,
        eos_token_id=2,
    )
    return MistralForCausalLM(config).double().eval()


def test_compiled_tokens_equal_the_naive_loop(trio, make_decoder, greedy, monkeypatch):
    """One row and several, equally long and ragged, from within a window to past it."""
    # Which graphs there are is decided before code is generated, which takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    pair = Trio.from_models(sliding(7), trio.expert, trio.anti, trio.tokenizer)
    decoder = make_decoder(pair, 3, max_seq_len=48, compile=True)
    decoder.warm_up()
    assert not any(any(decoder._runner.lengths(role)) for role in decoder.roles)
    graphs = counters["stats"]["unique_graphs"]
    params = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
    for prompts in (["a"], ["hello", "world"], ["a", "hello you", "abc", "b"], ["hello, you two"]):
        for output in decoder.generate(prompts, params):
            assert output.token_ids == greedy(pair.models, output.prompt_token_ids, 1.0, 14)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.slow
def test_generated_code_gives_the_same_tokens(trio, make_decoder, greedy):
    alone = Trio.from_models(sliding(7), tokenizer=trio.tokenizer)
    decoder = make_decoder(alone, 2, max_seq_len=7, compile=True)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for prompts in (["a"], ["a", "abc"]):
        for output in decoder.generate(prompts, params):
            assert output.token_ids == greedy(alone.models, output.prompt_token_ids, 1.0, 4)


def test_every_length_fits_its_slot():
    step = CompiledStep(lambda token_ids, step: token_ids, [None, 8, 40])
    assert step.warm_up_lengths(4, 64) == [(5,), (9,), (41,), (5, 4)]
    assert step.warm_up_lengths(1, 20) == [(5,), (9,)]
    assert step.warm_up_lengths(2, 3) == [(2,), (2, 1)]
