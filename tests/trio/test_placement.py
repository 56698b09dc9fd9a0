"""Device maps: where weights go, what is offloaded, and that decoding stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import proxytune_kernels as ptk
from proxytune_kernels.trio import checkpoints
from proxytune_kernels.trio.adapters import copy_modules
from proxytune_kernels.trio.files import LoadError
from tests.decoder.conftest import tiny_llama

pytest.importorskip("accelerate")

PROMPT = "Question: Tom has 3 pens and buys 4 more. How many pens does Tom have now?\nAnswer:"
IDS = torch.tensor([[5, 6, 7, 200]])

# A stand-in for a model on several devices: accelerate's hooks bring in what is on the disk.
LAYERS = {"model.norm": "cpu", "model.rotary_emb": "cpu"} | {
    f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)
}
EMBEDDING_IN_MEMORY = {**LAYERS, "model.embed_tokens": "cpu", "lm_head": "cpu"}
EMBEDDING_ON_DISK = {**LAYERS, "model.embed_tokens": "disk", "lm_head": "disk"}


def load(**options: Any) -> Any:
    return ptk.load_trio("shipped", dtype="float32", **options)


@pytest.mark.parametrize(
    "device_map",
    ["auto", "cpu", torch.device("cpu"), {"": "cpu"}, {"base": "auto", "anti": {"": "cpu"}}],
    ids=str,
)
@torch.no_grad()
def test_on_one_device_it_is_the_model(device_map):
    placed, plain = load(device_map=device_map), load()
    for role, model in placed.models.items():
        assert torch.equal(model(IDS).logits, plain.models[role](IDS).logits)
        assert not model.training
        assert placed.info()["roles"][role]["device"] == "cpu"


@pytest.mark.parametrize(
    "device_map", [EMBEDDING_IN_MEMORY, EMBEDDING_ON_DISK], ids=["layers", "embedding-too"]
)
def test_offloaded_layers_decode_alike(device_map, plain_greedy):
    trio = load(device_map={"base": device_map})
    offloaded = {name for name, p in trio.base.named_parameters() if p.device.type == "meta"}
    assert any(name.startswith("model.layers.1.") for name in offloaded)
    assert not any(name.startswith("model.layers.2.") for name in offloaded)
    assert trio.info()["roles"]["base"]["device"] == "cpu, offloaded to disk"
    wanted = plain_greedy(load(), PROMPT, 12)
    assert plain_greedy(trio, PROMPT, 12) == wanted
    params = ptk.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = ptk.Decoder(trio, max_batch_size=2).generate([PROMPT, PROMPT], params)
    assert [output.token_ids for output in outputs] == [wanted, wanted]


def test_offloaded_layers_are_not_compiled():
    trio = load(device_map={"base": EMBEDDING_IN_MEMORY}, device="cpu")
    with pytest.raises(ValueError, match=r"compile must be False where .* as those of base are"):
        ptk.Decoder(trio, compile=True)


def test_a_device_is_for_the_roles_without_a_map():
    trio = load(device={"expert": "cpu", "anti": "cpu"}, device_map={"base": EMBEDDING_IN_MEMORY})
    places = [role["device"] for role in trio.info()["roles"].values()]
    assert places == ["cpu, offloaded to disk", "cpu", "cpu"]
    one = load(device="cpu", device_map={"base": EMBEDDING_IN_MEMORY})
    assert [role["device"] for role in one.info()["roles"].values()] == places


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"device": {"base": "cpu"}, "device_map": {"base": "auto"}},
            "device of base must not be given with a device_map of base, got 'cpu' and 'auto'",
        ),
        ({"device_map": {"base": "auto", "bass": "cpu"}}, "device_map must have keys .* 'bass'"),
        ({"device": {"bass": "cpu"}, "device_map": "auto"}, "device must have keys among .*'bass'"),
        ({"device_map": "automatic"}, "device_map of base must be one of auto, .*got 'automatic'"),
        ({"device_map": "disk"}, "device_map of base must be .* got 'disk'"),
        ({"device_map": {"": 1.5}}, "device_map of base must be .* got {'': 1.5}"),
        (
            {"device_map": {"": "cpu", "model.layers.1": "disk"}},
            "base must be a causal LM that its device_map can place .*: weight is on the meta",
        ),
    ],
)
def test_bad_device_maps(options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_accelerate_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match="device_map of base needs accelerate: pip install accel"):
        load(device_map="auto")


def test_offloaded_weights_are_not_quantised():
    with pytest.raises(LoadError, match=r"quantize of base: .*in memory, got model.layers.1.*"):
        load(device_map={"base": EMBEDDING_IN_MEMORY}, quantize="int8")


@torch.no_grad()
def test_the_hooks_of_a_sharing_copy_act_on_the_copy():
    from accelerate import cpu_offload

    model = tiny_llama(0, 16).float()
    wanted = model(IDS).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    twin = copy_modules(model)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the hook of the model itself")

    hooked = [m for m in model.modules() if hasattr(m, "_hf_hook")]
    for module in hooked:
        module._hf_hook.pre_forward = forbidden
    assert torch.equal(twin(IDS).logits, wanted)
    # What was offloaded to memory lies there once.
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        assert module is not other
        if getattr(module, "_hf_hook", None) is not None:
            maps = [getattr(m._hf_hook, "weights_map", None) for m in (module, other)]
            assert maps[0] is maps[1]
