"""The shared pair against PEFT: its mixed batch for the pair, its adapted model for the expert."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import proxytune_kernels as ptk
from proxytune_kernels.decoder.model import call_directly
from proxytune_kernels.decoder.pair.shared import PairError, has_lora, shared_pair
from tests.decoder.conftest import kind
from tests.decoder.pair.models import GPT2, SIZES, logits, token_ids

peft = pytest.importorskip("peft")
# PEFT asks a model for a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

LARGER: dict[str, Any] = {**SIZES, "head_dim": 8, "initializer_range": 0.3}
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama-biases": kind("Llama", LARGER, attention_bias=True),
    "gemma2-tied": kind("Gemma2", LARGER),
    "qwen3": kind("Qwen3", LARGER),
    "gpt2-conv1d": kind("GPT2", GPT2, initializer_range=0.3),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def make_anti(architecture: str = "llama-biases") -> Any:
    torch.manual_seed(0)
    kind, config = ARCHITECTURES[architecture]
    return kind(copy.deepcopy(config)).eval()


def adapt(anti: Any, dtype: torch.dtype | None = None, **settings: Any) -> Any:
    """PEFT's model: a copy of ``anti`` with a random adapter, of its dtype unless told other."""
    torch.manual_seed(1)
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    config = peft.LoraConfig(**{**defaults, "lora_dropout": 0.5, **settings})
    model = peft.get_peft_model(copy.deepcopy(anti), config, autocast_adapter_dtype=False).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype or anti.dtype)
    return model


def mixed(model: Any, ids: Tensor) -> Tensor:
    """PEFT's own way to run both."""
    return logits(model, ids, adapter_names=["default", "__base__"] * (len(ids) // 2))


def check(model: Any, anti: Any, ids: Tensor) -> None:
    pair, expert = shared_pair(model.get_base_model(), anti)
    for way in ("called as modules", "called directly"):
        found = logits(pair, ids)
        assert torch.equal(found, mixed(model, ids)), way
        assert torch.equal(found[1::2], logits(anti, ids)[1::2])
        assert torch.equal(logits(expert, ids[0::2]), logits(model, ids[0::2]))
        assert not torch.equal(found[0::2], logits(anti, ids)[0::2])
        call_directly(pair, 64)
        call_directly(expert, 64)


@pytest.mark.parametrize("shape", [(2, 1), (2, 7), (6, 1), (6, 5)], ids=str)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["one-dtype", "fp32-adapter"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_peft(dtype, adapter, shape):
    anti = make_anti().to(dtype)
    check(adapt(anti, adapter), anti, token_ids(*shape))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture):
    anti = make_anti(architecture)
    conv1d = architecture.startswith("gpt2")
    check(adapt(anti, fan_in_fan_out=conv1d), anti, token_ids(4, 3))


# Factors: 8 / 3, 5 / sqrt(4), 1, -2; then more of what an adapter may have.
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3},
        {"lora_alpha": 5, "use_rslora": True},
        {"lora_alpha": 4},
        {"lora_alpha": -8},
        {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
        {"lora_bias": True, "target_modules": ["q_proj", "o_proj"], "r": 3},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["lm_head", "v_proj"]},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"k_proj": 3}},
    ],
    ids=str,
)
def test_settings_of_an_adapter(settings):
    anti = make_anti().to(torch.bfloat16)
    check(adapt(anti, torch.float32, **settings), anti, token_ids(2, 3))


def test_updates_at_the_end_of_fp16():
    # lora_B is the smallest number there is; a quarter of it is 0.
    anti = make_anti().half()
    nn.init.zeros_(anti.lm_head.weight)
    model = adapt(anti, lora_alpha=1, target_modules=["lm_head"])
    layer = model.get_base_model().lm_head
    nn.init.constant_(layer.lora_A["default"].weight, 10.0)
    nn.init.constant_(layer.lora_B["default"].weight, 2.0**-24)
    ids = token_ids(2, 3)
    pair, _ = shared_pair(model.get_base_model(), anti)
    found = logits(pair, ids)
    assert torch.equal(found, mixed(model, ids))
    assert found[0].count_nonzero()


def test_an_inactive_adapter_and_layers_without_the_active_one():
    anti = make_anti()
    model = adapt(anti)
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ids = token_ids(2, 3)
    check(model, anti, ids)
    model.set_adapter("other")
    pair, expert = shared_pair(model.get_base_model(), anti)
    names = ["other", "__base__"]
    assert torch.equal(logits(pair, ids), logits(model, ids, adapter_names=names))
    assert torch.equal(logits(expert, ids), logits(model, ids))


def test_the_pair_compiles_as_one_graph():
    anti = make_anti()
    model = adapt(anti)
    pair, _ = shared_pair(model.get_base_model(), anti)
    ids = token_ids(4, 1)
    with torch.inference_mode():
        compiled = torch.compile(pair, fullgraph=True, backend="aot_eager")
        found = compiled(ids, use_cache=False).logits
    assert torch.equal(found, mixed(model, ids))


def test_weights_are_held_once():
    anti = make_anti()
    model = adapt(anti, lora_alpha=4)
    expert_model = model.get_base_model()
    pair, expert = shared_pair(expert_model, anti)
    adapter = {p.data_ptr() for n, p in model.named_parameters() if "lora_" in n}
    held = {p.data_ptr() for p in anti.parameters()} | adapter
    for twin in (pair, expert):
        assert {p.data_ptr() for p in twin.parameters()} == held
    assert pair.config is not expert.config
    assert pair.config is not expert_model.config


def test_a_scaled_factor_is_held_once():
    anti = make_anti()
    pair, expert = shared_pair(adapt(anti, lora_alpha=8).get_base_model(), anti)
    assert {p.data_ptr() for p in pair.parameters()} == {p.data_ptr() for p in expert.parameters()}


def test_the_given_models_are_left_as_they_were():
    anti = make_anti()
    model = adapt(anti).train()
    kinds = [type(module) for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pair, _ = shared_pair(model.get_base_model(), anti)
    call_directly(pair, 64)
    logits(pair, token_ids(2, 3))
    assert [type(module) for module in model.modules()] == kinds
    assert model.training and not pair.training
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_quantised_weights_are_shared():
    models = [make_anti().to(torch.bfloat16) for _ in range(2)]
    anti, expert_base = (ptk.quantize(model, "int8") for model in models)
    model = adapt(expert_base, target_modules=["q_proj", "up_proj", "lm_head"])
    check(model, anti, token_ids(4, 3))
    other = make_anti().to(torch.bfloat16)
    refuse(
        model,
        other,
        r"equal weights, got .*\.self_attn\.q_proj\.weight of torch.int8",
    )
    # Twice the weights are the same integers with other scales.
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight *= 2
    other = ptk.quantize(other, "int8")
    refuse(model, other, r"other values in model\.layers\.1\.mlp\.down_proj\.scales")


def test_adapted_models_are_known():
    anti = make_anti()
    assert not has_lora(anti)
    assert has_lora(adapt(anti).get_base_model())


def refuse(expert: Any, anti: Any, message: str) -> None:
    if isinstance(expert, peft.PeftModel):
        expert = expert.get_base_model()
    with pytest.raises(PairError, match=message):
        shared_pair(expert, anti)


def test_other_weights_are_refused_by_name():
    anti, other = make_anti(), make_anti()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    refuse(adapt(other), anti, r"other values in model\.layers\.1\.mlp\.up_proj\.weight")
    refuse(
        adapt(anti), copy.deepcopy(anti).double(), r"equal weights, got .* torch\.float32 .* and"
    )
    tuned = adapt(anti, bias="all").get_base_model()
    nn.init.ones_(tuned.model.layers[0].self_attn.q_proj.base_layer.bias)
    refuse(tuned, anti, r"other values in model\.layers\.0\.self_attn\.q_proj\.bias")


def test_other_models_are_refused():
    anti = make_anti()
    refuse(adapt(make_anti("qwen3")), anti, r"of one class, got Qwen3ForCausalLM and Llama")
    other = copy.deepcopy(anti)
    other.config.rms_norm_eps = 1e-3
    refuse(adapt(other), anti, r"one configuration, got rms_norm_eps 0\.001 and 1e-06")
    more = copy.deepcopy(anti)
    more.model.norm.register_buffer("offset", torch.ones(1))
    refuse(adapt(more), anti, r"no weight but anti's and LoRA layers, got model\.norm\.offset")
    refuse(adapt(anti), more, r"must have all weights of anti, got none for model\.norm\.offset")
    refuse(copy.deepcopy(anti), anti, r"must have LoRA layers, got none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"plain LoRA, got Dora at model\.layers\.0\.self_attn\.q_proj"),
        (
            {"modules_to_save": ["lm_head"]},
            r"LoRA layers only, got ModulesToSaveWrapper at lm_head",
        ),
        ({"trainable_token_indices": [3]}, r"LoRA layers only, got TrainableTokensWrapper"),
        ({"target_modules": ["embed_tokens"]}, r"linear layers, got Embedding at model\.embed_tok"),
    ],
    ids=["dora", "modules-to-save", "tokens", "embedding"],
)
def test_other_adapters_are_refused(settings, message):
    anti = make_anti()
    refuse(adapt(anti, **settings), anti, message)


def test_other_methods_are_refused():
    anti = make_anti()
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    refuse(peft.get_peft_model(copy.deepcopy(anti), config), anti, "LoRA layers only, got Linear")


def test_states_of_an_adapter_are_refused():
    anti = make_anti()
    model = adapt(anti)
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    refuse(model, anti, r"one active adapter, got default, other at model\.layers\.0")
    model = adapt(anti)
    model.base_model.disable_adapter_layers()
    refuse(model, anti, "active beside its weights, got it disabled")
    model = adapt(anti)
    model.get_base_model().lm_head.register_forward_pre_hook(print)
    model.get_base_model().model.layers[0].mlp.up_proj.register_forward_pre_hook(print)
    refuse(model, anti, r"without hooks, got some at model\.layers\.0\.mlp\.up_proj")
    model = adapt(anti, init_lora_weights=True)
    # An adapter that changes nothing yet: merging it leaves the weights as they are.
    model.merge_adapter()
    refuse(model, anti, "active beside its weights, got it merged")
