"""Adapters kept beside the anti's weights: what is shared, and that PEFT's numbers come out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import proxytune_kernels as ptk
from proxytune_kernels.trio import Trio, load_trio
from proxytune_kernels.trio.adapters import beside
from proxytune_kernels.trio.files import LoadError
from tests.decoder.conftest import tiny_llama
from tests.trio.checkpoints import SHIPPED, edit, make_adapter

peft = pytest.importorskip("peft")

# peft 0.21 asks transformers 5.23 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PROMPT = "Question: Tom has 3 pens and buys 4 more. How many pens does Tom have now?\nAnswer:"
IDS = torch.tensor([[5, 6, 7, 200, 1000]])


def open_anti(dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(SHIPPED / "anti", dtype=dtype).eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "expert", SHIPPED / "anti")


@pytest.fixture
def broken(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be changed."""
    return Path(shutil.copytree(adapter, tmp_path / "expert"))


def load(adapter: Path, **options: Any) -> Any:
    named: dict[str, Any] = {"dtype": "float32", "merge_adapter": False, **options}
    return load_trio("shipped", expert=adapter, **named)


def own_and_shared(expert: Any, anti: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The expert's tensors that the anti has not, and those it has, by the anti's names."""
    theirs = dict([*anti.named_parameters(), *anti.named_buffers()])
    own, shared = {}, {}
    for name, tensor in (*expert.named_parameters(), *expert.named_buffers()):
        plain = name.replace(".base_layer", "")
        if plain in theirs:
            assert tensor is theirs[plain]
            shared[plain] = tensor
        else:
            own[name] = tensor
    assert shared.keys() == theirs.keys()
    return own, shared


def storages(*models: Any) -> int:
    """Bytes of all storages that models hold, each once."""
    held = (t.untyped_storage() for m in models for t in (*m.parameters(), *m.buffers()))
    return sum({s.data_ptr(): s.nbytes() for s in held}.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_the_expert_is_pefts_and_its_weights_are_the_antis(adapter, dtype):
    trio = load(adapter, dtype=dtype)
    wanted = peft.PeftModel.from_pretrained(open_anti(dtype), adapter).eval()
    assert torch.equal(trio.expert(IDS).logits, wanted(IDS).logits)
    assert torch.equal(trio.anti(IDS).logits, open_anti(dtype)(IDS).logits)
    assert (trio.expert(IDS).logits - trio.anti(IDS).logits).abs().max() > 0.1
    assert type(trio.expert) is type(trio.anti)
    own, _ = own_and_shared(trio.expert, trio.anti)
    # On a CPU, whatever the dtype of the weights that they are added to.
    assert {tensor.dtype for tensor in own.values()} == {torch.float32}
    assert all(".lora_" in name for name in own)
    added = sum(tensor.nbytes for tensor in own.values())
    assert storages(trio.expert, trio.anti) == storages(trio.anti) + added
    assert trio.expert.config is not trio.anti.config
    assert not trio.expert.training


def test_the_decoder_gives_the_greedy_tokens(adapter, plain_greedy):
    trio = load(adapter)
    params = ptk.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    [output] = ptk.Decoder(trio).generate([PROMPT], params)
    assert output.token_ids == plain_greedy(trio, PROMPT, 16)
    merged = load_trio("shipped", expert=adapter, dtype="float32")
    assert type(merged.expert) is type(merged.anti)
    with torch.no_grad():
        got, wanted = merged.expert(IDS).logits, trio.expert(IDS).logits
    # fp32 products of 64 terms, summed in another order.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert output.token_ids == plain_greedy(merged, PROMPT, 16)


def test_merging_is_the_default_and_a_trio_file_may_say_otherwise(adapter, tmp_path):
    def kept(trio: Any) -> int:
        return trio.info()["roles"]["expert"]["adapter_parameters"]

    assert kept(load_trio("shipped", expert=adapter)) == 0
    weights = load_file(adapter / "adapter_model.safetensors")
    count = sum(weight.numel() for weight in weights.values())
    assert kept(load(adapter)) == count > 0
    named = {"base": str(SHIPPED / "base"), "expert": str(adapter), "anti": str(SHIPPED / "anti")}
    settings = {"format": 1, **named, "tokenizer": str(SHIPPED), "merge_adapter": False}
    (tmp_path / "trio.json").write_text(json.dumps(settings))
    assert kept(load_trio(tmp_path)) == count
    assert kept(load_trio(tmp_path, merge_adapter=True)) == 0


def test_a_further_pair_stands_beside_an_adapter(adapter):
    pairs = [(SHIPPED / "expert", SHIPPED / "anti")]
    params = ptk.SamplingParams(temperature=0, max_tokens=6, alpha=0.5, pair_alphas=[0.5])
    found = []
    for merge_adapter in (False, True):
        trio = load(adapter, merge_adapter=merge_adapter, pairs=pairs)
        assert trio.pairs == (("expert_2", "anti"),)
        found.append(ptk.Decoder(trio, 1, 64).generate("2 + 2 =", params)[0].token_ids)
    assert found[0] == found[1]


def test_equal_weights_under_another_name_will_do(broken, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(SHIPPED / "anti", other)
    edit(broken / "adapter_config.json", base_model_name_or_path="../other")
    trio = load(broken)
    own_and_shared(trio.expert, trio.anti)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"anti must be .*other', or .* another model.layers.1.mlp"):
        load(broken)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (str(SHIPPED / "base"), r"anti must be the model that expert's adapter names"),
        ("no/such-model", r"'no/such-model', or have its weights.* to compare them"),
        (None, r"expert must be an adapter that names its model, got .*None"),
    ],
    ids=["base", "unknown", "none"],
)
def test_an_adapter_for_another_model_is_refused(broken, named, message):
    edit(broken / "adapter_config.json", base_model_name_or_path=named)
    with pytest.raises(LoadError, match=message):
        load(broken)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # else pytest's would do
@pytest.mark.parametrize("merge_adapter", [False, True])
def test_an_adapter_that_lacks_weights_is_refused(broken, merge_adapter):
    file = broken / "adapter_model.safetensors"
    weights = load_file(file)
    removed = min(weights)
    save_file({k: v for k, v in weights.items() if k != removed}, file)
    with pytest.raises(LoadError, match=r"expert must be an adapter for this model"):
        load(broken, merge_adapter=merge_adapter)


def test_an_adapter_with_other_weights_is_refused(broken):
    file = broken / "adapter_model.safetensors"
    weights = load_file(file)
    key = min(weights)
    save_file({**weights, key.replace("layers.0", "layers.7"): weights[key].clone()}, file)
    with pytest.raises(LoadError, match=r"got weights for a layer that is not there, .*layers.7"):
        load(broken)
    save_file({**weights, key: torch.zeros(3, 3)}, file)
    with pytest.raises(
        LoadError, match=r"expert must be an adapter for this model, got .*size mism"
    ):
        load(broken)


def test_an_adapter_that_sets_the_models_weights_is_refused(tmp_path):
    # PiSSA starts from the largest singular values, and takes them off the weights.
    directory = make_adapter(tmp_path / "expert", SHIPPED / "anti", init_lora_weights="pissa")
    with pytest.raises(LoadError, match=r"leaves the model's own weights as they are, .*merge it"):
        load(directory)


def test_an_adapter_that_is_not_lora_is_refused(tmp_path):
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(open_anti(), config).save_pretrained(tmp_path)
    edit(tmp_path / "adapter_config.json", base_model_name_or_path=str(SHIPPED / "anti"))
    with pytest.raises(LoadError, match=r"must have a LoRA adapter to keep it apart, got LOHA"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert": SHIPPED / "expert"}, "needs expert to be a directory with a LoRA adapter, got"),
        ({"dtype": {"base": "auto", "expert": "float32", "anti": "auto"}}, "dtype of expert must"),
        ({"quantize": {"anti": "int8"}}, "quantize of expert must be that of anti, .* None and 'i"),
        ({"device_map": {"expert": "auto"}}, "device of expert must be that of anti"),
    ],
)
def test_what_is_said_of_the_expert_must_be_said_of_the_anti(adapter, options, message):
    arguments: dict[str, Any] = {"expert": adapter, "merge_adapter": False, **options}
    with pytest.raises(LoadError, match=message):
        load_trio("shipped", **arguments)


@pytest.mark.parametrize("merge_adapter", [False, True])
def test_offloaded_weights_take_no_adapter(adapter, merge_adapter):
    places = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    offloaded = {**places, "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    maps = {"expert": offloaded, "anti": offloaded}
    with pytest.raises(LoadError, match=r"in memory, got model.layers.1.* offloaded by device_map"):
        load(adapter, device_map=maps, merge_adapter=merge_adapter)


@torch.no_grad()
def test_a_merged_expert_may_have_a_device_map(adapter):
    plain = load(adapter, merge_adapter=True)
    placed = load(adapter, merge_adapter=True, device_map={"": "cpu"})
    assert torch.equal(placed.expert(IDS).logits, plain.expert(IDS).logits)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@torch.no_grad()
def test_the_adapter_stands_beside_quantised_weights(quantization, tmp_path):
    # The shipped pair is too narrow for int4: an anti of the base's shape instead.
    make_adapter(tmp_path, SHIPPED / "base")
    plain = AutoModelForCausalLM.from_pretrained(SHIPPED / "base", dtype="bfloat16")
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path)
    trio = load(tmp_path, anti=SHIPPED / "base", dtype="bfloat16", quantize=quantization)
    own, _ = own_and_shared(trio.expert, trio.anti)
    assert {tensor.dtype for tensor in own.values()} == {torch.float32}
    assert trio.info()["roles"]["expert"]["quantized"] == quantization
    wanted = adapted.eval().get_base_model()
    for layer in wanted.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.base_layer = trio.anti.get_submodule(path_of(wanted, layer))
    wanted.set_input_embeddings(trio.anti.get_input_embeddings())
    wanted.set_output_embeddings(trio.anti.get_output_embeddings())
    assert torch.equal(trio.expert(IDS).logits, wanted(IDS).logits)


def test_a_quantised_pair_decodes_alike(adapter, plain_greedy):
    trio = load(adapter, quantize="int8")
    params = ptk.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    wanted = plain_greedy(trio, PROMPT, 12)
    for pair in ("shared", "separate"):
        [output] = ptk.Decoder(trio, pair=pair).generate([PROMPT], params)
        assert output.token_ids == wanted


def path_of(model: Any, module: Any) -> str:
    return next(path for path, other in model.named_modules() if other is module)


@pytest.fixture
def peft_expert(adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(open_anti("bfloat16"), adapter)


@torch.no_grad()
def test_a_peft_model_is_taken_as_the_model_in_it(peft_expert, adapter):
    shipped = load_trio("shipped")
    before = {name: tensor for name, tensor in peft_expert.named_parameters()}
    trio = Trio.from_models(shipped.base, peft_expert, shipped.anti, shipped.tokenizer)
    assert type(trio.expert) is type(shipped.anti)
    assert torch.equal(trio.expert(IDS).logits, load(adapter, dtype="auto").expert(IDS).logits)
    inner = dict(peft_expert.get_base_model().named_parameters())
    for name, tensor in trio.expert.named_parameters():
        assert tensor.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
        # PEFT made the adapter fp32, as it stays.
        assert tensor is inner[name]
    # The caller's model stays as it is.
    assert all(tensor is before[name] for name, tensor in peft_expert.named_parameters())
    assert {t.dtype for name, t in before.items() if ".lora_" in name} == {torch.float32}


def test_peft_models_that_are_no_pair_are_refused(peft_expert):
    shipped = load_trio("shipped")

    def refuse(expert: Any, anti: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Trio.from_models(shipped.base, expert, anti, shipped.tokenizer)

    inner = peft_expert.get_base_model()
    refuse(peft_expert, inner, "anti must be the model without the adapter, got one")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompts = peft.get_peft_model(open_anti("bfloat16"), config)
    refuse(prompts, shipped.anti, "expert must have a LoRA adapter .* got PROMPT_TUNING")


def test_an_adapter_with_biases_for_the_model_is_refused(tmp_path):
    model, other = (tiny_llama(0, 16, 1, attention_bias=True).float() for _ in range(2))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    peft.get_peft_model(other, config).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"nothing but LoRA weights to keep them apart, got .*bias"):
        beside("expert", model, tmp_path)


WRONG_MERGE, SETS_WEIGHTS, MORE = (
    "can be merged",
    "leaves the model's own weights",
    "nothing but LoRA",
)


@pytest.mark.parametrize(
    ("settings", "merged", "kept"),
    [
        ({}, None, None),
        ({"use_rslora": True}, None, None),
        ({"use_dora": True}, None, None),
        ({"init_lora_weights": "gaussian"}, None, None),
        ({"init_lora_weights": "orthogonal"}, None, None),
        ({"init_lora_weights": "olora"}, None, SETS_WEIGHTS),
        ({"init_lora_weights": "pissa"}, None, SETS_WEIGHTS),
        ({"target_modules": ["embed_tokens"]}, WRONG_MERGE, MORE),
        ({"target_modules": ["lm_head"]}, WRONG_MERGE, MORE),
        ({"layer_replication": [[0, 2], [0, 2]]}, WRONG_MERGE, None),
        ({"modules_to_save": ["lm_head"]}, None, MORE),
        ({"modules_to_save": ["norm"]}, None, MORE),
        ({"trainable_token_indices": [5, 6]}, None, MORE),
        ({"alora_invocation_tokens": [5]}, "does not support merging", "acts on every token"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_is_what_peft_runs_or_refused(
    tmp_path: Path, settings: dict[str, Any], merged: str | None, kept: str | None
) -> None:
    """PEFT's own unmerged forward is the right one; the anti stays what it was."""
    from peft import LoraConfig, PeftModel, get_peft_model

    trio, directory = SHIPPED, tmp_path / "adapter"
    torch.manual_seed(3)
    named = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(trio / "anti", dtype="float32"), LoraConfig(**named)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.02 if "lora_" in name else 0.3
                parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(str(directory))
    edit(directory / "adapter_config.json", base_model_name_or_path=str(trio / "anti"))
    ids = torch.tensor([[5, 6, 7, 200, 1000]])
    plain = AutoModelForCausalLM.from_pretrained(trio / "anti", dtype="float32")
    with torch.no_grad():
        anti = plain(ids).logits
        wanted = PeftModel.from_pretrained(plain, str(directory)).eval()(ids).logits
        for merge, refusal in ((True, merged), (False, kept)):
            if refusal is not None:
                with pytest.raises(LoadError, match=refusal):
                    load_trio(trio, expert=directory, merge_adapter=merge, dtype="float32")
                continue
            opened = load_trio(trio, expert=directory, merge_adapter=merge, dtype="float32")
            assert torch.equal(opened.anti(ids).logits, anti)
            # Of sums of some hundred fp32 products; kept apart, the products are PEFT's own.
            bound = 64 * torch.finfo(torch.float32).eps * float(wanted.abs().max()) if merge else 0
            assert float((opened.expert(ids).logits - wanted).abs().max()) <= bound
