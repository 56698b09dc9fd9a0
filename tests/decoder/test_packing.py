"""Packed weights against exact products, and what packing leaves as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from proxytune_kernels import quantize
from proxytune_kernels.decoder import packing
from proxytune_kernels.decoder.model import call_directly
from proxytune_kernels.decoder.packing import OneDnnLinear, PackingError, cannot_pack, pack_weights

_REASON = cannot_pack()
needs_packing = pytest.mark.skipif(_REASON is not None, reason=_REASON or "")


def make_model(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 80,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    }  # fmt: skip
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **settings))
    return model.to(dtype).eval()


def sharing_copy(model: Any) -> Any:
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def assert_exact(found: Tensor, x: Tensor, layer: nn.Linear) -> None:
    """Within the bound that the module states: fp32 sums in any order, one rounding to bf16."""
    x, weight = x.double(), layer.weight.double()
    bias = weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.double()
    y = linear(x, weight, bias)
    size = linear(x.abs(), weight.abs(), bias.abs())
    bound = 2.0**-8 * y.abs() + (layer.in_features + 2) * 2.0**-24 * size
    assert found.dtype == torch.bfloat16
    assert bool(((found.double() - y).abs() <= bound).all())


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 48), (33, 7), (1, 5), (1024, 256)], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (3, 5), (1, 64), (9,), (0, 4)], ids=str)
def test_results_are_exact_to_their_rounding(rows, shape, bias):
    width, out = shape
    torch.manual_seed(0)
    layer = nn.Linear(width, out, bias=bias).bfloat16()
    # Terms of very different sizes, whose sum in bf16 would be far off.
    x = (torch.randn(*rows, width) * torch.logspace(-2, 2, width)).bfloat16()
    pack_weights(layer)
    with torch.inference_mode():
        found = layer(x)
    assert found.shape == (*rows, out)
    assert_exact(found, x, layer)


@needs_packing
def test_inputs_that_lie_apart():
    torch.manual_seed(0)
    layer = nn.Linear(32, 16).bfloat16()
    x = torch.randn(4, 6, 32).bfloat16()
    pack_weights(layer)
    with torch.inference_mode():
        for part in (x[:, -1:], x[0::2], x.transpose(0, 1), x[:1].expand(3, 6, 32)):
            assert_exact(layer(part), part, layer)


@needs_packing
@pytest.mark.parametrize("directly", [False, True])
def test_all_layers_of_a_model_are_packed(directly, monkeypatch):
    model = make_model(attention_bias=True, mlp_bias=True)
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    assert pack_weights(model) == sum(layer.weight.numel() * 2 for layer in layers)
    if directly:
        call_directly(model, 64)
    of_packed = {id(layer.packed): layer for layer in layers}
    packed_op: Any = packing._linear
    called = []

    def checked(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
        result = packed_op(x, packed, *rest)
        assert_exact(result, x, of_packed[id(packed)])
        called.append(id(packed))
        return result

    monkeypatch.setattr(packing, "_linear", checked)
    with torch.inference_mode():
        model(torch.randint(97, (2, 5)), use_cache=False)
    assert sorted(called) == sorted(of_packed)


@needs_packing
def test_quantised_layers_stay_as_they_are():
    model = quantize(make_model().eval(), "int8")
    kinds = [type(module) for module in model.modules()]
    assert pack_weights(model) == 0
    assert [type(module) for module in model.modules()] == kinds


@needs_packing
def test_the_original_keeps_its_layers_and_weights():
    model = make_model()
    twin = sharing_copy(model)
    pack_weights(twin)
    assert not any(isinstance(module, OneDnnLinear) for module in model.modules())
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}


@needs_packing
def test_models_that_share_weights_share_packed_ones():
    model = make_model()
    twins = [sharing_copy(model) for _ in range(2)]
    packed: dict[int, Tensor] = {}
    first, second = (pack_weights(twin, packed) for twin in twins)
    assert first > 0
    assert second == 0
    ours, theirs = ([m.packed for m in t.modules() if isinstance(m, OneDnnLinear)] for t in twins)
    assert [id(p) for p in ours] == [id(p) for p in theirs]


@needs_packing
def test_layers_that_are_not_plain_stay():
    model = make_model()
    layer = model.model.layers[0].mlp
    own = layer.up_proj.forward
    layer.up_proj.forward = lambda x: own(x)
    layer.down_proj.float()
    pack_weights(model)
    assert type(layer.up_proj) is nn.Linear
    assert type(layer.down_proj) is nn.Linear
    assert type(layer.gate_proj) is OneDnnLinear


@needs_packing
def test_under_an_adapter():
    peft = pytest.importorskip("peft")
    from proxytune_kernels.decoder.pair.shared import PairLoRALayer, shared_pair

    anti = make_model()
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    expert = peft.inject_adapter_in_model(config, copy.deepcopy(anti))
    pair, _ = shared_pair(expert, anti)
    pack_weights(pair)
    layers: list[Any] = [m for m in pair.modules() if isinstance(m, PairLoRALayer)]
    assert layers
    x = torch.randn(2, 1, 64).bfloat16()
    with torch.inference_mode():
        for layer in layers:
            assert type(layer.base) is OneDnnLinear
        layer = layers[0]
        assert_exact(layer(x)[1], x[1], layer.base)
        assert not torch.equal(layer(x)[0], layer.base(x)[0])


@needs_packing
def test_a_packed_layer_compiles():
    layer = nn.Linear(32, 16).bfloat16()
    pack_weights(layer)
    x = torch.randn(2, 1, 32).bfloat16()
    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(PackingError, match=rf"bfloat16 on cpu, got Llama.* with {dtype} on cpu$"):
        pack_weights(make_model(dtype))


@needs_packing
def test_other_devices_and_layers_are_refused():
    with pytest.raises(PackingError, match="got Linear with torch.bfloat16 on meta"):
        pack_weights(nn.Linear(2, 2, dtype=torch.bfloat16, device="meta"))
    with pytest.raises(PackingError, match="got ReLU with no plain linear layer"):
        pack_weights(nn.ReLU())


def test_what_torch_or_the_cpu_lacks_is_said(monkeypatch):
    monkeypatch.setattr(packing, "_linear", None)
    with pytest.raises(PackingError, match="pack_weights: this torch is built without oneDNN"):
        pack_weights(make_model())
    monkeypatch.undo()
    if _REASON is None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        with pytest.raises(PackingError, match="this CPU has no vector instructions"):
            pack_weights(make_model())
