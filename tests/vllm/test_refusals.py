"""What a trio can't do under vLLM is refused, with a sentence, before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

from tests.decoder.conftest import word_tokenizer
from tests.vllm.conftest import ENGINE
from tests.vllm.trios import VOCAB_SIZE, save_model, save_trio, write_trio


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("members")


@pytest.fixture(scope="module")
def trio(root: Path) -> Path:
    return save_trio(root, "llama")


@pytest.fixture
def members(root: Path) -> dict[str, Path]:
    """The members of ``trio``, to be changed."""
    roles = {"base": "llama", "expert": "expert", "anti": "anti"}
    return {role: save_model(root, name) for role, name in roles.items()}


def engine_config(directory: Path, **settings: Any) -> Any:
    """Settings of an engine, checked as when one starts."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(directory), **{**ENGINE, **settings}).create_engine_config()


def said(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["proxy_tuning"].update(changes)


def edited(trio: Path, to: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a trio's directory with another config.json."""
    shutil.copytree(trio, to)
    config = json.loads((trio / "config.json").read_text())
    edit(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


DRAFT = {"num_speculative_tokens": 2}
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "lora": ({"enable_lora": True}, "merge it into the expert"),
    "prompt-embeds": ({"enable_prompt_embeds": True}, "one embedding can't feed three models"),
    "transformers-backend": (
        {"model_impl": "transformers"},
        "not a registered model in the Transformers",
    ),
    "quantization": ({"quantization": "fp8"}, "unclear of which member"),
    "pooling": ({"runner": "pooling"}, "runner"),
    "drafter-of-unknown-needs": (
        {"speculative_config": {**DRAFT, "method": "custom_class", "model": "some.Drafter"}},
        "reads the hidden states of one model",
    ),
    "load-format": ({"load_format": "sharded_state"}, "three checkpoints"),
    "too-long": ({"max_model_len": 1024}, "max_model_len"),
    "micro-batches": ({"enable_dbo": True}, "micro-batches"),
}


@pytest.mark.parametrize(("settings", "sentence"), SETTINGS.values(), ids=SETTINGS)
def test_settings(trio, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        engine_config(trio, **settings)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "nothing": (
        lambda c: c.pop("proxy_tuning"),
        "proxy_tuning in config.json .* must be an object",
    ),
    "no-anti": (lambda c: c["proxy_tuning"].pop("anti"), "must name anti, got None"),
    "another-name": (said(anti_expert="x"), "must have keys among .*, got 'anti_expert'"),
    "prompts": (
        said(prompts={"expert": "chat"}),
        "prompts per role need proxytune_kernels.Decoder",
    ),
    "alpha": (said(alpha="1"), "alpha must be a finite number, got '1'"),
    "vocab-size": (said(vocab_size=0), "positive integer vocab_size, got 0"),
    "too-wide": (said(vocab_size=VOCAB_SIZE + 1), f"must be at most {VOCAB_SIZE}, the logits of"),
    "architectures": (said(base_architectures="LlamaForCausalLM"), "must list names"),
}


@pytest.mark.parametrize(("edit", "sentence"), CONFIGS.values(), ids=CONFIGS)
def test_what_config_json_says(trio, tmp_path, edit, sentence):
    with pytest.raises(ValueError, match=sentence):
        engine_config(edited(trio, tmp_path / "edited", edit))


def test_the_base_may_not_be_the_trio_itself(trio, tmp_path):
    def edit(config: dict[str, Any]) -> None:
        del config["proxy_tuning"]["base"]

    with pytest.raises(ValueError, match="base_architectures in proxy_tuning must name"):
        engine_config(edited(trio, tmp_path / "edited", edit))


def test_eagle(trio, root):
    eagle = {**DRAFT, "method": "eagle", "model": str(root / "expert")}
    with pytest.raises(ValueError, match="'eagle', which reads the hidden states"):
        engine_config(trio, speculative_config=eagle)


ORDINARY = {
    "model": "somewhere",
    "architectures": ["SomeForCausalLM"],
    "architecture": "SomeForCausalLM",
    "using_transformers_backend": lambda: False,
    **dict.fromkeys(("is_multimodal_model", "is_encoder_decoder", "has_inner_state"), False),
    **dict.fromkeys(("is_attention_free", "use_mla"), False),
}
KINDS = {
    "using_transformers_backend": (lambda: True, "that vLLM itself has, got SomeForCausalLM"),
    "is_multimodal_model": (True, "got the multimodal SomeForCausalLM"),
    "is_encoder_decoder": (True, "with an encoder and a decoder"),
    "has_inner_state": (True, "with state space layers"),
    "use_mla": (True, r"with latent attention \(MLA\)"),
    "architecture": ("GptOssForCausalLM", "sets the engine's for itself"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_members_of_other_kinds(kind):
    from proxytune_kernels.integrations.vllm_plugin.config import check_member

    check_member("anti", SimpleNamespace(**ORDINARY))
    value, sentence = KINDS[kind]
    with pytest.raises(ValueError, match=rf"anti \(somewhere\) must .*{sentence}"):
        check_member("anti", SimpleNamespace(**{**ORDINARY, kind: value}))


def test_a_state_space_base(members, root, tmp_path):
    members["base"] = tmp_path / "mamba"
    shutil.copytree(root / "llama", members["base"])
    transformers.MambaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        architectures=["MambaForCausalLM"],
    ).save_pretrained(members["base"])
    with pytest.raises(ValueError, match="got MambaForCausalLM with state space layers"):
        engine_config(write_trio(tmp_path / "trio", members))


def test_tokenizers_that_differ(members, tmp_path):
    """Same width, other tokens: refused whether the width is given or not."""
    other = tmp_path / "other"
    shutil.copytree(members["expert"], other)
    word_tokenizer(VOCAB_SIZE).save_pretrained(other)
    for width in (VOCAB_SIZE, None):
        trio = write_trio(
            tmp_path / f"trio-{width}", {**members, "expert": other}, vocab_size=width
        )
        with pytest.raises(ValueError, match="must share one vocabulary"):
            engine_config(trio)


def test_tokens_that_not_every_member_has(members, tmp_path):
    members["expert"] = Path(shutil.copytree(members["expert"], tmp_path / "fewer"))
    file = members["expert"] / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"] = []
    for token in ("st", "op", "stop"):
        del tokenizer["model"]["vocab"][token]
    file.write_text(json.dumps(tokenizer))
    shared = VOCAB_SIZE - 3
    with pytest.raises(ValueError, match=f"must be at most {shared}, the ids that the tokenizers"):
        engine_config(write_trio(tmp_path / "trio", members))
    found = engine_config(write_trio(tmp_path / "found", members, vocab_size=None))
    assert found.model_config.hf_config.proxy_tuning["vocab_size"] == shared


def test_neither_a_tokenizer_nor_a_width(members, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(members["anti"] / "config.json", bare)
    trio = write_trio(tmp_path / "trio", {**members, "anti": bare}, vocab_size=None)
    with pytest.raises(ValueError, match="no tokenizer beside anti"):
        engine_config(trio)


def test_the_length_is_the_shortest_members(members, root, tmp_path):
    members["expert"] = save_model(root, "expert", max_position_embeddings=96)
    config = engine_config(write_trio(tmp_path / "trio", members), max_model_len=None)
    assert config.model_config.max_model_len == 96
    with pytest.raises(ValueError, match="max_model_len must be at most 96, the length of expert"):
        engine_config(tmp_path / "trio", max_model_len=97)


def test_other_models_are_left_alone(root):
    config = engine_config(save_model(root, "llama"), enable_lora=True)
    assert not config.model_config.logits_processors
