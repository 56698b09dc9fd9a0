"""Quantised members: what becomes of the weights, what of the rest, and what decodes them."""

from __future__ import annotations

import copy
import gc
import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import proxytune_kernels as ptk
from proxytune_kernels.trio.adapters import copy_modules
from proxytune_kernels.trio.files import LoadError
from proxytune_kernels.trio.quantization import QuantizationError, quantization_of, weight_bytes
from tests.decoder.conftest import tiny_llama
from tests.trio.checkpoints import SHIPPED

pytest.importorskip("torchao")

PROMPTS = ["Tom has 3 pens", "1 + 1 ="]
IDS = torch.tensor([[5, 6, 7, 200]])


def make_model(hidden: int = 64, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "intermediate_size": 96,
        "attention_bias": True,
        "tie_word_embeddings": True,
    }
    defaults |= {"vocab_size": 259, "initializer_range": 0.02}
    model = tiny_llama(0, hidden, **{**defaults, **settings}).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def quantized_paths(model: Any) -> dict[str, Any]:
    """The layers that are to be quantised, by what the README says."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }


@torch.no_grad()
def weight_of(layer: Any) -> Tensor:
    """The weight [out, in] that a layer multiplies with."""
    twin = copy.copy(layer)
    twin._parameters = {**layer._parameters, "bias": None}
    return twin(torch.eye(layer.in_features, dtype=layer.weight.dtype)).T.contiguous()


def test_int8_weights_are_the_nearest_of_255_steps_of_their_row():
    model, plain = ptk.quantize(make_model(), "int8"), make_model()
    for path, layer in quantized_paths(plain).items():
        got = weight_of(model.get_submodule(path))
        largest = layer.weight.detach().abs().amax(dim=1, keepdim=True)
        # Half of a step of 2 * largest / 255. The quotient's rounding, 2^-24 of up to 128 steps,
        # may take the next step instead of one just as near.
        error = (got - layer.weight.detach()).abs()
        assert (error <= largest / 255 * (1 + 2**-15)).all()
        assert error.max() > 0


def test_int4_weights_are_the_nearest_of_16_of_their_group():
    model, plain = ptk.quantize(make_model(), "int4"), make_model()
    for path, layer in quantized_paths(plain).items():
        got = weight_of(model.get_submodule(path)).unflatten(1, (-1, 32))
        wanted = layer.weight.detach().unflatten(1, (-1, 32))
        low, high = wanted.amin(dim=2, keepdim=True), wanted.amax(dim=2, keepdim=True)
        # Half of a step; a step is of the size of the weights, and their fp32 rounding 2^-24 of it.
        assert ((got - wanted).abs() <= (high - low) / 30 * (1 + 2**-10)).all()
        assert max(len(group.unique()) for group in got.flatten(0, 1)) <= 16


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@torch.no_grad()
def test_nothing_changes_but_those_weights(quantization):
    model, plain = make_model(), make_model()
    kept = {name: p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name}
    assert ptk.quantize(model, quantization) is model
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is parameter for name, parameter in kept.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(parameters) == len(kept) + len(quantized_paths(plain))
    for path, layer in quantized_paths(plain).items():
        layer.weight.copy_(weight_of(model.get_submodule(path)))
    # Sums of at most 96 products in another order: each layer's are within 96 * 2^-24 of the sum of
    # their magnitudes, here about 1, and fourteen layers stand in a row.
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=14 * 96 * 2**-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("quantization", "bits", "scale_group"), [("int8", 8, None), ("int4", 4, 32)]
)
def test_the_bytes_are_those_of_the_packed_weights(quantization, bits, scale_group, dtype):
    model = make_model(dtype=dtype)
    layers = quantized_paths(model).values()
    rest = weight_bytes(model) - sum(layer.weight.nbytes for layer in layers)
    packed = sum(layer.weight.numel() for layer in layers) * bits // 8
    groups = sum(layer.weight.numel() // (scale_group or layer.in_features) for layer in layers)
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters())
    assert quantization_of(model) is None
    ptk.quantize(model, quantization)
    # A group has a scale and a zero point of at most four bytes each.
    assert rest + packed + groups <= weight_bytes(model) <= rest + packed + groups * 8
    assert quantization_of(model) == quantization
    assert model(IDS).logits.dtype == dtype


def test_a_layer_is_quantised_where_it_goes():
    model = ptk.quantize(make_model(), "int8", device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert quantization_of(model) == "int8"


def test_inductors_settings_stay(monkeypatch):
    def forbidden() -> None:
        raise AssertionError("settings of the whole process")

    monkeypatch.setattr("torchao.quantization.utils.recommended_inductor_config_setter", forbidden)
    for quantization in ("int8", "int4"):
        ptk.quantize(make_model(), quantization)


def packed_tensors() -> int:
    gc.collect()
    return sum(
        type(held).__name__ in ("Int8Tensor", "Int4OpaqueTensor") for held in gc.get_objects()
    )


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_sharing_copy_holds_the_packed_tensors(quantization):
    model = ptk.quantize(make_model(), quantization)
    twin = copy_modules(model)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert twin.model.layers[0].mlp is not model.model.layers[0].mlp
    assert torch.equal(twin(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "quantize",
    ["int8", {"base": "int4"}, {"base": "int4", "expert": "int8", "anti": "int8"}],
    ids=["all-int8", "base-int4", "mixed"],
)
def test_the_decoder_gives_the_greedy_tokens_of_the_quantised_models(quantize, plain_greedy):
    trio = ptk.load_trio("shipped", dtype="float32", quantize=quantize)
    packed = packed_tensors()
    decoder = ptk.Decoder(trio, max_batch_size=2)
    assert packed_tensors() == packed > 0
    # Few: on a CPU, int4 has fast kernels for bf16 only, and bf16 rounds where tokens are close.
    params = ptk.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = decoder.generate(PROMPTS, params)
    assert [o.token_ids for o in outputs] == [plain_greedy(trio, p, 8) for p in PROMPTS]


def test_a_trio_says_what_is_quantised():
    roles = ptk.load_trio("shipped", quantize={"base": "int4", "anti": "int8"}).info()["roles"]
    assert [roles[role]["quantized"] for role in roles] == ["int4", None, "int8"]
    assert roles["anti"]["bytes"] < roles["expert"]["bytes"]
    assert roles["anti"]["parameters"] == roles["expert"]["parameters"]
    assert {roles[role]["dtype"] for role in roles} == {"bfloat16"}


def test_a_trio_file_may_say_it(tmp_path):
    named = {role: str(SHIPPED / role) for role in ("base", "expert", "anti")}
    settings = {"format": 1, **named, "quantize": {"base": "int8", "anti": "int8"}}
    (tmp_path / "trio.json").write_text(json.dumps(settings))

    def found(quantize: Any) -> list[str | None]:
        trio = ptk.load_trio(tmp_path, tokenizer=SHIPPED, quantize=quantize)
        return [quantization_of(model) for model in trio.models.values()]

    assert found(None) == ["int8", None, "int8"]
    assert found({"base": None, "expert": "int8"}) == [None, "int8", "int8"]
    assert found("int8") == ["int8", "int8", "int8"]


@pytest.mark.parametrize(
    ("model", "quantization", "device", "message"),
    [
        ({}, "int3", None, "quantization must be one of int8, int4, got 'int3'"),
        ({"dtype": torch.float64}, "int8", None, "or float16, got float64 in model"),
        ({"hidden": 48}, "int4", None, "multiple of 32 .* got model.layers.0.self_attn.q_proj wi"),
        ({"intermediate_size": 40}, "int4", None, "got .*gate_proj with 64 inputs and 40 outputs"),
        ({}, "int4", "meta", "int4 runs on cpu and cuda, got .*q_proj on meta"),
        ({}, "int4", "cuda", "int4 needs bfloat16 weights on cuda, got float32 in .*q_proj"),
    ],
)
def test_what_cannot_be_quantised(model, quantization, device, message):
    made = make_model(**model)
    with pytest.raises(QuantizationError, match=message):
        ptk.quantize(made, quantization, device=device)
    # A model is quantised whole or not at all.
    assert quantization_of(made) is None
    assert {p.device.type for p in made.parameters()} == {"cpu"}


def with_adapter() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    return peft.inject_adapter_in_model(config, make_model())


# Its layers are not torch.nn.Linear.
GPT2: dict[str, Any] = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ptk.quantize(make_model(), "int8"), r"plain weights, got Int8Tensor in model.lay"),
        (lambda: make_model().to("meta"), r"in memory, got model.layers.0.* offloaded"),
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), "must have linear layers .* got none"),
        (with_adapter, r"before an adapter is added, got .*lora_A"),
    ],
    ids=["quantised", "offloaded", "gpt2", "adapter"],
)
def test_models_that_are_not_plain_are_refused(make, message):
    with pytest.raises(QuantizationError, match=message):
        ptk.quantize(make(), "int8")


def test_load_trio_names_the_role(monkeypatch):
    with pytest.raises(LoadError, match=r"quantize of expert: int4 needs .*down_proj with 176"):
        ptk.load_trio("shipped", quantize="int4")
    with pytest.raises(ValueError, match=r"quantize of base must be one of int8, int4, got 'int3'"):
        ptk.load_trio("shipped", quantize="int3")
    with pytest.raises(ValueError, match=r"quantize must have keys among .* got 'bass'"):
        ptk.load_trio("shipped", quantize={"bass": "int8"})
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    missing = r"quantize of base: int8 needs torchao .*pip install 'proxytune_kernels\[quant\]'"
    with pytest.raises(LoadError, match=missing):
        ptk.load_trio("shipped", quantize="int8")
