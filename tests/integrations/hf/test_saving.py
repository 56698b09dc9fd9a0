"""Saving and loading: three names, or weights where no checkpoint has them."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import proxytune_kernels as ptk
from proxytune_kernels.integrations.hf import ProxyTunedConfig, ProxyTunedForCausalLM
from proxytune_kernels.trio import Trio
from proxytune_kernels.trio.files import LoadError
from proxytune_kernels.trio.quantization import quantization_of
from tests.decoder.conftest import byte_tokenizer, tiny_llama
from tests.integrations.hf.conftest import PLAIN

IDS = torch.tensor([[5, 9, 13, 7]])
ROLES = ("base", "expert", "anti")


def three() -> tuple[Any, Any, Any]:
    base, expert, anti = (tiny_llama(seed, 16, 1).float() for seed in range(3))
    return base, expert, anti


def named(directory):
    return json.loads((directory / "config.json").read_text())["checkpoints"]


def same(one, other, alpha=0.7):
    with torch.no_grad():
        return torch.equal(one(IDS, alpha=alpha).logits, other(IDS, alpha=alpha).logits)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three checkpoints on disk, each with its tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    for role, model in zip(ROLES, three(), strict=True):
        model.save_pretrained(root / role)
        byte_tokenizer().save_pretrained(root / role)
    return root


def test_trainer_resumes_where_it_was(checkpoints, tmp_path):
    """Half of a run, resumed by another process's model, ends where the whole run ends."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 200, (8,), generator=generator) for _ in range(8)]
    data = [{"input_ids": text, "labels": text} for text in texts]

    def trainer() -> tuple[Any, Trainer]:
        model = ProxyTunedForCausalLM.from_trio(
            ptk.load_trio(**{role: checkpoints / role for role in ROLES})
        )
        for role in ("base", "anti"):
            getattr(model, role).requires_grad_(False)
        options = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, save_steps=2,
            learning_rate=0.01, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
        )  # fmt: skip
        return model, Trainer(model, options, train_dataset=data)

    whole, run = trainer()
    before = {role: copy.deepcopy(getattr(whole, role).state_dict()) for role in ROLES}
    run.train()
    half = tmp_path / "checkpoint-2"
    # The two that are frozen are named, and written nowhere.
    assert named(half) == {r: "expert" if r == "expert" else str(checkpoints / r) for r in ROLES}
    with safe_open(half / "model.safetensors", "pt") as file:
        assert all(key.startswith("expert.") for key in file.keys())  # noqa: SIM118
    resumed, run = trainer()
    run.train(resume_from_checkpoint=str(half))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])
    again = ProxyTunedForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert same(whole.eval(), again)
    moved = [not torch.equal(v, before[r][k]) for r in ROLES
             for k, v in getattr(whole, r).state_dict().items()]  # fmt: skip
    assert any(moved)


@pytest.fixture
def opened(checkpoints):
    return ptk.load_trio(**{role: checkpoints / role for role in ROLES})


def test_a_trio_from_checkpoints_is_three_names(checkpoints, opened, tmp_path):
    model = ProxyTunedForCausalLM.from_trio(opened, 0.3)
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path)
    assert named(tmp_path) == {role: str(checkpoints / role) for role in ROLES}
    assert not list(tmp_path.rglob("*.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, ProxyTunedForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ProxyTunedConfig)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == byte_tokenizer().get_vocab()
    assert (again.alpha, again.generation_config.max_new_tokens) == (0.3, 5)
    assert again.trio is not None
    assert again.trio.prompts == opened.prompts
    assert same(model, again)
    assert torch.equal(model.generate(IDS, do_sample=False), again.generate(IDS, do_sample=False))


def test_models_that_were_never_saved_are_written(tmp_path):
    model = ProxyTunedForCausalLM.from_models(*three(), byte_tokenizer())
    model.save_pretrained(tmp_path / "one")
    assert named(tmp_path / "one") == {role: role for role in ROLES}
    # It can be moved.
    (tmp_path / "one").rename(tmp_path / "two")
    assert same(model, ProxyTunedForCausalLM.from_pretrained(tmp_path / "two"))


def test_a_model_that_was_changed_is_written_and_the_others_are_named(
    checkpoints, opened, tmp_path
):
    with torch.no_grad():
        opened.expert.lm_head.weight[3, 3] += 1
    model = ProxyTunedForCausalLM.from_trio(opened)
    model.save_pretrained(tmp_path)
    assert named(tmp_path) == {
        "base": str(checkpoints / "base"),
        "expert": "expert",
        "anti": str(checkpoints / "anti"),
    }
    assert same(model, ProxyTunedForCausalLM.from_pretrained(tmp_path))


def test_an_adapter_that_was_merged_is_not_mistaken_for_its_checkpoint(checkpoints, tmp_path):
    from peft import LoraConfig, get_peft_model

    anti = AutoModelForCausalLM.from_pretrained(checkpoints / "anti")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for an attribute by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        adapter = get_peft_model(
            anti, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
    adapter.save_pretrained(tmp_path / "adapter")
    paths = {"base": checkpoints / "base", "anti": checkpoints / "anti"}
    merged = ptk.load_trio(**paths, expert=tmp_path / "adapter")
    model = ProxyTunedForCausalLM.from_trio(merged)
    assert merged.expert.config._name_or_path == str(checkpoints / "anti")
    model.save_pretrained(tmp_path / "merged")
    assert named(tmp_path / "merged")["expert"] == "expert"
    assert same(model, ProxyTunedForCausalLM.from_pretrained(tmp_path / "merged"))

    apart = ptk.load_trio(**paths, expert=tmp_path / "adapter", merge_adapter=False)
    model = ProxyTunedForCausalLM.from_trio(apart)
    with pytest.raises(ValueError, match="checkpoints must name where expert was opened from"):
        model.save_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "apart", checkpoints={"expert": str(tmp_path / "adapter")})
    again = ProxyTunedForCausalLM.from_pretrained(tmp_path / "apart")
    assert same(model, again)
    shared = {p.data_ptr() for p in again.expert.parameters()}
    assert again.anti.lm_head.weight.data_ptr() in shared
    # The engine reads the weights that they share once.
    again.generate(IDS, **PLAIN, max_new_tokens=2)
    assert again.info()["cache"].endswith("the pair shared")


def test_one_model_in_two_roles_is_written_once(tmp_path):
    base, expert, _ = three()
    ProxyTunedForCausalLM.from_models(base, expert, expert).save_pretrained(tmp_path)
    assert named(tmp_path) == {"base": "base", "expert": "expert", "anti": "expert"}
    again = ProxyTunedForCausalLM.from_pretrained(tmp_path)
    assert same(again, ProxyTunedForCausalLM.from_models(base, expert, expert))


def test_tied_embeddings_come_back_tied_and_are_named(tmp_path):
    base, expert, anti = (
        tiny_llama(seed, 16, 1, tie_word_embeddings=True).float() for seed in range(3)
    )
    ProxyTunedForCausalLM.from_models(base, expert, anti).save_pretrained(tmp_path / "written")
    again = ProxyTunedForCausalLM.from_pretrained(tmp_path / "written")
    head = again.base.lm_head.weight
    assert head.data_ptr() == again.base.get_input_embeddings().weight.data_ptr()
    again.save_pretrained(tmp_path / "named")
    assert named(tmp_path / "named")["base"] == str(tmp_path / "written" / "base")


def test_each_role_keeps_its_own_tokenizer_and_prompt_style(tmp_path):
    tokenizers = {role: byte_tokenizer() for role in ROLES}
    tokenizers["expert"].chat_template = "[{{ messages[0]['content'] }}]"
    trio = Trio.from_models(*three(), tokenizers, prompts={"expert": "chat"})
    ProxyTunedForCausalLM.from_trio(trio).save_pretrained(tmp_path)
    again = ProxyTunedForCausalLM.from_pretrained(tmp_path)
    assert again.trio is not None
    assert again.trio.tokenize("hi") == trio.tokenize("hi")
    assert trio.tokenize("hi")["expert"] != trio.tokenize("hi")["base"]


def test_options_of_loading(checkpoints, opened, tmp_path):
    ProxyTunedForCausalLM.from_trio(opened).save_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert {m.dtype for m in model.models.values()} == {torch.bfloat16}
    assert set(model.info()["attention"].values()) == {"eager"}
    model = ProxyTunedForCausalLM.from_pretrained(tmp_path, alpha=-2.0, device_map="cpu")
    assert model.alpha == -2.0
    with pytest.raises(ValueError, match="from_pretrained: revision is not supported here"):
        ProxyTunedForCausalLM.from_pretrained(tmp_path, revision="main")
    with pytest.raises(ValueError, match="save_pretrained: push_to_hub is not supported here"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="directory must be a local one, got 'someone/trio'"):
        ProxyTunedForCausalLM.from_pretrained("someone/trio")


def test_quantised_models_are_named_and_quantised_anew(checkpoints, opened, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    ptk.quantize(opened.base, "int8")
    model = ProxyTunedForCausalLM.from_trio(opened)
    with pytest.raises(ValueError, match="base was opened from, since it has int8 weights"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, checkpoints={"base": str(checkpoints / "base")})
    again = ProxyTunedForCausalLM.from_pretrained(tmp_path)
    assert [quantization_of(m) for m in again.models.values()] == ["int8", None, None]
    assert same(model, again)


def test_a_checkpoint_that_is_gone_is_named(checkpoints, opened, tmp_path):
    model = ProxyTunedForCausalLM.from_trio(opened)
    model.save_pretrained(tmp_path, checkpoints={"anti": str(tmp_path / "gone")})
    with pytest.raises(LoadError, match=r"anti must be a directory or hub name.*gone"):
        ProxyTunedForCausalLM.from_pretrained(tmp_path)
