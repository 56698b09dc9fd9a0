"""Modules that are called directly compute what the modules they replace do, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from proxytune_kernels.decoder.model import call_directly

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 16,
}  # fmt: skip
# Frequencies that follow the longest text, and that are fixed.
_ROPES = {
    "llama": {"rope_type": "default", "rope_theta": 10000.0},
    "llama-linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "llama-dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
}


@pytest.fixture(params=[*_ROPES, "gemma2"])
def model(request):
    torch.manual_seed(0)
    # Gemma's norm scales by 1 + weight: it must not be taken for Llama's.
    if request.param == "gemma2":
        made: Any = Gemma2ForCausalLM(Gemma2Config(**_SIZES))
    else:
        config = LlamaConfig(**_SIZES, attention_bias=True, rope_parameters=_ROPES[request.param])
        made = LlamaForCausalLM(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_logits_are_the_same_to_the_bit(model, dtype):
    model = model.to(dtype)
    twin = copy.deepcopy(model)
    call_directly(twin, 24)
    for width in (9, 24, 5):
        token_ids = torch.randint(0, 97, (3, width))
        places = torch.arange(24 - width, 24).expand(3, -1)
        for position_ids in (None, places):
            wanted = model(token_ids, position_ids=position_ids).logits
            assert torch.equal(twin(token_ids, position_ids=position_ids).logits, wanted)


def test_the_original_is_not_changed(model):
    kinds = [type(module) for module in model.modules()]
    twin = copy.deepcopy(model)
    call_directly(twin, 16)
    assert [type(module) for module in model.modules()] == kinds
    assert type(twin.model.layers[0].mlp.up_proj) is not torch.nn.Linear


def test_hooks_and_own_forwards_still_run(model):
    calls = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append("hook"))
    own = model.model.layers[1].mlp.down_proj
    forward = own.forward

    def wrapped(x):
        calls.append("forward")
        return forward(x)

    own.forward = wrapped
    call_directly(model, 16)
    model(torch.tensor([[1, 2]]))
    assert calls == ["hook", "forward"]
