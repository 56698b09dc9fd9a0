"""Heads of transformers' models: what their configurations do to logits, and a trio's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import proxytune_kernels as ptk
from benchmarks.harness.trios import make_prompts

SMALL: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, head_dim=16, pad_token_id=0,
)  # fmt: skip

# Configurations whose logits are changed on the way out, some tied to their embeddings.
CHANGED = {
    "Gemma2": dict(final_logit_softcapping=0.5),
    "Gemma3Text": dict(final_logit_softcapping=0.7),
    "Cohere": dict(logit_scale=0.3),
    "Granite": dict(logits_scaling=8.0),
    "Llama": {},
    "Phi": {},  # has a bias
}
# Names that mean something else elsewhere, or nothing that is known here.
UNKNOWN = {
    "FalconH1": (dict(lm_head_multiplier=0.5), "lm_head_multiplier = 0.5"),
    "RecurrentGemma": (dict(logits_soft_cap=3.0), "logits_soft_cap = 3.0"),
}


def config_of(name: str, **changes: Any) -> Any:
    kind = getattr(transformers, f"{name}Config")
    return kind(**SMALL, **changes)


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGED)
def test_logits_are_the_models_own(name):
    """fp32: products of 32 numbers in another order, then the same transform; 1e-5 is ample."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, **CHANGED[name]))
    for parameter in model.parameters():
        parameter.normal_(std=0.5)
    ids = torch.arange(12).view(3, 4)
    logits = model(ids).logits[:, -1].float()
    head = ptk.Head.of(model, model.base_model(ids).last_hidden_state[:, -1])
    assert head.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    got: Any = ptk.sample_hidden(head, top_logprobs=61).top
    wanted = logits.log_softmax(-1).gather(-1, got.token_ids)
    assert torch.allclose(got.logprobs, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.05  # not a row of equal logits, of which any transform is right


class _Named:
    """A model as far as its head is asked for."""

    def __init__(self, config: Any, layer: Any) -> None:
        self.config, self._layer = config, layer

    def get_output_embeddings(self) -> Any:
        return self._layer


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_transform_is_refused(name):
    changes, text = UNKNOWN[name]
    config = getattr(transformers, f"{name}Config")(**changes)
    with pytest.raises(ValueError, match=f"{config.model_type!r} has {text}: what that does"):
        ptk.Head.of(_Named(config, torch.nn.Linear(4, 9)), torch.zeros(1, 4))


def test_a_name_that_divides_elsewhere_is_refused():
    config = config_of("Llama")
    config.logits_scaling = 2.0
    with pytest.raises(ValueError, match="'llama' has logits_scaling = 2.0"):
        ptk.Head.of(_Named(config, torch.nn.Linear(4, 9)), torch.zeros(1, 4))


def test_another_output_layer_is_refused():
    class Quantised(torch.nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"must be a torch.nn.Linear, got Quantised"):
        ptk.Head.of(_Named(config_of("Llama"), Quantised(4, 9)), torch.zeros(1, 4))


@torch.no_grad()
def test_greedy_tokens_of_the_shipped_trio():
    """As ``sample`` draws them of the models' own fp32 logits, at every position of the prompts."""
    trio = ptk.load_trio("shipped", dtype="float32")
    ids = torch.tensor(make_prompts(trio, 4, 32))
    heads, logits = [], []
    for model in trio.models.values():
        hidden = model.base_model(ids).last_hidden_state.flatten(0, 1)
        heads.append(ptk.Head.of(model, hidden))
        logits.append(model(ids).logits.flatten(0, 1))
    base, expert, anti = heads
    width: Any = dict(vocab_size=trio.vocab_size)
    fused = ptk.sample_hidden(base, expert, anti, temperature=0, **width)
    plain = ptk.sample(*logits, temperature=0, **width)
    assert torch.equal(fused.token_ids, plain.token_ids)
    drawn = ptk.sample_hidden(base, expert, anti, top_p=0.9, seed=3, **width)
    plain = ptk.sample(*logits, top_p=0.9, seed=3, **width)
    assert (drawn.token_ids == plain.token_ids).all()
