"""Two checkpoints as one model against each of them alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxytune_kernels.decoder.model import call_directly
from proxytune_kernels.decoder.pair.batched import batched_pair
from proxytune_kernels.decoder.pair.shared import PairError
from tests.decoder.conftest import kind
from tests.decoder.pair.models import GPT2, SIZES, VOCAB_SIZE, logits, token_ids

OPT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48,
    "num_attention_heads": 4, "word_embed_proj_dim": 32,
}  # fmt: skip
# Biases; norms of heads; scaled, tied embeddings and norms by 1 + weight; layer norms.
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama": kind("Llama", SIZES, attention_bias=True, mlp_bias=True),
    "qwen3": kind("Qwen3", SIZES, head_dim=8),
    "gemma3": kind("Gemma3", SIZES, head_dim=8, tie_word_embeddings=True),
    "phi": kind("Phi", SIZES),
    "gpt2": kind("GPT2", GPT2),
    "opt": kind("OPT", OPT),
}


def make_model(architecture: str, seed: int, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(seed)
    kind, config = ARCHITECTURES[architecture]
    model = kind(copy.deepcopy(config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def check(pair: Any, expert: Any, anti: Any, ids: Tensor, **keywords: Any) -> None:
    found = logits(pair, ids, **keywords)
    # Sums in fp64 in another order; norms round to fp32, each time 2^-24 of values of some tens.
    for rows, model in ((found[0::2], expert), (found[1::2], anti)):
        wanted = logits(model, ids, **keywords)
        wanted = wanted[0::2] if model is expert else wanted[1::2]
        torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1), (2, 5), (6, 1), (6, 4)], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "phi"])
def test_rows_are_those_of_each_model(architecture, shape):
    expert, anti = (make_model(architecture, seed) for seed in (0, 1))
    pair = batched_pair(expert, anti)
    for _ in range(2):
        check(pair, expert, anti, token_ids(*shape))
        # The last tokens of several lie apart in memory.
        check(pair, expert, anti, token_ids(*shape), logits_to_keep=1)
        call_directly(pair, 64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [2, 6])
def test_products_in_bf16_are_exact_to_their_rounding(rows, bias):
    both = [make_model("llama", seed, torch.bfloat16) for seed in (0, 1)]
    layers: list[Any] = [model.model.layers[0].mlp.down_proj for model in both]
    if not bias:
        for layer in layers:
            layer.bias = None
    layer = batched_pair(*both).model.layers[0].mlp.down_proj
    torch.manual_seed(2)
    x = torch.randn(rows, 3, layer.in_features).bfloat16()
    with torch.inference_mode():
        found = layer(x).double()
    for row, model in enumerate([*layers] * (rows // 2)):
        weight, inputs = model.weight.double(), x[row].double()
        shift = model.bias.double() if bias else weight.new_zeros(1)
        y = inputs @ weight.T + shift
        size = inputs.abs() @ weight.abs().T + shift.abs()
        # fp32 sums of n + 1 terms in any order, rounded to bf16 once.
        bound = 2.0**-8 * y.abs() + (layer.in_features + 2) * 2.0**-24 * size
        assert bool(((found[row] - y).abs() <= bound).all())


def test_equal_layers_serve_both_as_they_are():
    expert = make_model("llama", 0)
    anti = copy.deepcopy(expert)
    changed = anti.model.layers[1]
    for layer in (changed.mlp.up_proj, changed.input_layernorm):
        nn.init.normal_(layer.weight)
    nn.init.ones_(changed.self_attn.q_proj.bias)
    pair = batched_pair(expert, anti)
    check(pair, expert, anti, token_ids(4, 3))
    held = {id(p) for p in pair.parameters()}
    given = {id(p) for p in expert.parameters()}
    # Weight and bias of two linear layers, the weight of a norm.
    assert len(held - given) == 5
    assert len(given - held) == 5


def test_the_given_models_are_left_as_they_were():
    expert, anti = (make_model("gemma3", seed) for seed in (0, 1))
    kinds = [type(module) for module in expert.modules()]
    before = [p.clone() for model in (expert, anti) for p in model.parameters()]
    pair = batched_pair(expert, anti)
    call_directly(pair, 64)
    logits(pair, token_ids(2, 3))
    assert [type(module) for module in expert.modules()] == kinds
    after = [p for model in (expert, anti) for p in model.parameters()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert pair.config is not expert.config


def test_the_pair_compiles_as_one_graph():
    expert, anti = (make_model("llama", seed) for seed in (0, 1))
    pair = batched_pair(expert, anti)
    ids = token_ids(4, 1)
    with torch.inference_mode():
        compiled = torch.compile(pair, fullgraph=True, backend="aot_eager")
        found = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(found, logits(pair, ids), rtol=0, atol=1e-5)


def refuse(expert: Any, anti: Any, message: str) -> None:
    with pytest.raises(PairError, match=message):
        batched_pair(expert, anti)


def test_unknown_layers_are_refused():
    refuse(make_model("gpt2", 0), make_model("gpt2", 1), r"Conv1D at transformer\.h\.0\.attn\.c_")
    # An embedding in name, whose ids are counted from a mask.
    refuse(make_model("opt", 0), make_model("opt", 1), r"PositionalEmbedding at .* another weight")
    expert, anti = make_model("llama", 0), make_model("llama", 1)
    own = expert.model.layers[0].mlp.up_proj
    own.forward = own.forward
    refuse(expert, anti, r"got method as forward in Linear at model\.layers\.0\.mlp\.up_proj")


def test_torchs_own_norm_is_refused():
    expert, anti = make_model("llama", 0), make_model("llama", 1)
    for model in (expert, anti):
        model.model.norm = nn.RMSNorm(32, dtype=torch.float64)
    nn.init.zeros_(anti.model.norm.weight)
    refuse(expert, anti, r"RMSNorm at model\.norm with another weight")


def test_models_that_differ_in_more_are_refused():
    expert, anti = make_model("llama", 0), make_model("llama", 1)
    refuse(expert, make_model("qwen3", 1), "of one class, got LlamaForCausalLM and Qwen3")
    refuse(expert, copy.deepcopy(anti).float(), r"of one kind, got .* torch\.float64 .* and weight")
    other = copy.deepcopy(anti)
    other.config.rope_parameters["rope_theta"] = 7.0
    refuse(expert, other, "one configuration, got rope_parameters")
    anti.model.rotary_emb.inv_freq *= 2
    refuse(expert, anti, r"LlamaRotaryEmbedding at model\.rotary_emb with another inv_freq")
    scaled = make_model("gemma3", 1)
    scaled.model.embed_tokens.embed_scale *= 2
    refuse(
        make_model("gemma3", 0), scaled, r"ScaledWordEmbedding at .* another embed_scale, weight"
    )
    fewer = make_model("llama", 1)
    fewer.model.layers[1].mlp.down_proj = nn.Identity()
    refuse(expert, fewer, r"got .* and none in model\.layers\.1\.mlp\.down_proj")


def test_state_that_is_neither_parameter_nor_buffer_counts():
    def changed(change: Any) -> Any:
        model = make_model("llama", 0)
        change(model.model.layers[1].mlp)
        return model

    def held(value: Any) -> Any:
        return changed(lambda layer: setattr(layer, "held", value))

    expert = make_model("llama", 0)
    batched_pair(held(torch.ones(2)), held(torch.ones(2)))
    refuse(held([torch.ones(2)]), held([torch.zeros(2)]), r"LlamaMLP at .* with another held\.0")
    refuse(held(torch.ones(2)), expert, r"weights of one kind, got held .* and none in model\.lay")
    refuse(held(object()), held(object()), r"got object as held in LlamaMLP at model\.layers\.1")
    weight = torch.ones(2)
    refuse(held(lambda x: x * weight), expert, "got function as held in LlamaMLP")
    hook = changed(lambda layer: layer.register_forward_hook(lambda *_: None))
    refuse(hook, expert, r"must have no hooks, got some on LlamaMLP")
    refuse(expert, hook, r"must have no hooks, got some on LlamaMLP")
    deeper = changed(lambda layer: layer.add_module("more", nn.Linear(2, 2)))
    refuse(expert, deeper, "must have the same layers")


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    expert, anti = make_model("llama", 0), make_model("llama", 1)
    accelerate.cpu_offload(anti, execution_device=torch.device("cpu"))
    refuse(anti, copy.deepcopy(anti), "must be in memory, got some offloaded in model.embed_tok")
    refuse(expert, anti, "of one kind, got .* on cpu and .* on meta in model.embed_tokens")
