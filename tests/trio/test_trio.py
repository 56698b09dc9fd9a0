from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from proxytune_kernels.decoder import Decoder
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio, load_trio
from proxytune_kernels.trio.files import LoadError
from proxytune_kernels.trio.prompts import tokenize
from proxytune_kernels.trio.vocabulary import VocabularyError
from tests.decoder.conftest import tiny_llama
from tests.trio.checkpoints import ALPHABET, make_tokenizer, tiny_qwen2, write_gguf


def make_model(seed: int, vocab_size: int = 259, eos: int | list[int] = 2) -> Any:
    model = tiny_llama(seed, 16, 1, vocab_size=vocab_size, max_position_embeddings=64).float()
    model.generation_config.eos_token_id = eos
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trio directory: a tokenizer per role, the expert's embedding padded."""
    root = tmp_path_factory.mktemp("trio")
    for seed, (role, width) in enumerate({"base": 259, "expert": 272, "anti": 259}.items()):
        make_model(seed, width).save_pretrained(root / role)
        make_tokenizer().save_pretrained(root / role)
    write(root, {"prompts": {"expert": "chat"}})
    return root


def write(root: Path, settings: Mapping[str, Any]) -> None:
    named = {"format": 1, "base": "base", "expert": "expert", "anti": "anti"}
    (root / "trio.json").write_text(json.dumps({**named, **settings}))


def test_a_trio_directory(saved):
    trio = load_trio(saved)
    info = trio.info()
    assert trio.roles == ("base", "expert", "anti")
    assert trio.vocab_size == info["vocab_size"] == 259
    assert info["vocabulary_notes"] == ["expert: 13 padding ids from 259 on are never read"]
    assert info["prompts"] == {"base": "plain", "expert": "chat", "anti": "plain"}
    assert info["roles"]["expert"]["logits"] == 272
    assert trio.eos_token_ids == (2,)
    assert json.loads(json.dumps(info)) == info


def test_weights_are_those_of_their_role(saved):
    trio = load_trio(saved, dtype={"base": "float64", "expert": torch.bfloat16, "anti": "auto"})
    for seed, role in enumerate(trio.roles):
        wanted = make_model(seed, 272 if role == "expert" else 259).lm_head.weight
        got = trio.models[role].lm_head.weight
        assert torch.equal(got, wanted.to(got.dtype))
    dtypes = [trio.models[role].dtype for role in trio.roles]
    assert dtypes == [torch.float64, torch.bfloat16, torch.float32]
    assert not any(model.training for model in trio.models.values())


def test_roles_by_directory_and_a_replaced_one(saved):
    named = load_trio(base=saved / "base", expert=saved / "expert", anti=str(saved / "anti"))
    assert named.prompts["expert"] == "plain"
    replaced = load_trio(saved, anti=saved / "base")
    assert torch.equal(replaced.anti.lm_head.weight, replaced.base.lm_head.weight)
    alone = load_trio(base=saved / "base")
    assert (alone.roles, alone.expert, alone.anti) == (("base",), None, None)


def test_one_tokenizer_for_all(saved, tmp_path):
    for role in ("base", "expert", "anti"):
        (tmp_path / role).symlink_to(saved / role)
    make_tokenizer(extra=("<extra>",)).save_pretrained(tmp_path)
    write(tmp_path, {"tokenizer": "."})
    trio = load_trio(tmp_path)
    assert trio.tokenizers["base"] is trio.tokenizers["anti"]
    # The tokenizer's 260th token has no logit in the base.
    assert trio.vocab_size == 259
    assert "base: 1 tokens from id 259 on are never produced" in " ".join(trio.agreement.notes)


def test_further_pairs(saved, tmp_path):
    for role in ("base", "expert", "anti"):
        (tmp_path / role).symlink_to(saved / role)
    write(tmp_path, {"pairs": [{"expert": "base", "anti": "anti"}]})
    trio = load_trio(tmp_path, dtype={"base": "auto", "expert": "float64", "anti": "bfloat16"})
    assert trio.pairs == (("expert_2", "anti"),)  # opened once, and run once
    assert [*trio.members] == [*trio.info()["roles"]] == ["base", "expert", "anti", "expert_2"]
    second = trio.members["expert_2"].lm_head.weight
    assert torch.equal(second, trio.base.lm_head.weight.double())  # as what is said of expert
    given = load_trio(
        saved, pairs=[(saved / "expert", saved / "anti"), (saved / "anti", str(saved / "expert"))]
    )
    assert given.pairs == (("expert", "anti"), ("expert_3", "anti_3"))
    assert given.vocab_size == 259
    assert load_trio(tmp_path, pairs=[]).pairs == ()


@pytest.mark.parametrize("pairs", ["base", {}, ["base"], [{"expert": "base"}], [{"expert": "base",
    "anti": None}], [{"expert": "base", "anti": "anti", "alpha": "1"}]])  # fmt: skip
def test_pairs_of_trio_json_that_are_none(tmp_path, pairs):
    write(tmp_path, {"pairs": pairs})
    with pytest.raises(LoadError, match=r"pairs in .* must be a list of objects of expert and"):
        load_trio(tmp_path)


def test_a_member_of_a_further_pair_that_does_not_open(saved):
    with pytest.raises(LoadError, match="expert_2"):
        load_trio(saved, pairs=[(saved / "none", saved / "anti")])


def test_the_plain_roles_and_the_chat_role_read_a_prompt_their_way(saved):
    trio = load_trio(saved)

    def text(prompt: Any) -> dict[str, str]:
        ids = trio.tokenize(prompt)
        return {role: trio.tokenizers[role].decode(ids[role]) for role in trio.roles}

    hello = {"base": "hi", "expert": "[user]hi|[assistant]", "anti": "hi"}
    assert text("hi") == hello
    assert text([{"role": "user", "content": "hi"}]) == hello
    system = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert text(system)["expert"] == "[system]be|[user]hi|[assistant]"
    assert text(system)["anti"] == "be\n\nhi"
    assert trio.tokenize([5, 6]) == {"base": [5, 6], "expert": [5, 6], "anti": [5, 6]}
    mixed = trio.tokenize({"base": [5], "expert": "hi", "anti": "a"})
    assert [len(ids) for ids in mixed.values()] == [1, len("[user]hi|[assistant]"), 1]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt of base must have at least one token, got none"),
        ([259], r"prompt of base must have token ids in \[0, 259\), got 259"),
        ([-1], r"got -1"),
        ([1.5], r"prompt of base must be a string, .* got \[1.5\]"),
        ([{"role": "user"}], "prompt of base must be a string, .* got "),
        (b"hi", "prompt of base must be a string, .* got b'hi'"),
        ({"base": "a", "expert": "a"}, "one entry per role .* got base, expert$"),
        ({"base": "a", "expert": 4, "anti": "a"}, "prompt of expert must be .* got 4"),
    ],
)
def test_bad_prompts(saved, prompt, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load_trio(saved).tokenize(prompt)


def test_one_bos_whoever_writes_it():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    a = tokenizer.convert_tokens_to_ids("a")

    def read(prompt: Any, style: str = "plain", add: bool = True) -> list[int]:
        widths, styles = {"base": 300}, {"base": style}
        return tokenize(prompt, {"base": tokenizer}, styles, widths, add)["base"]

    assert read("a") == read("<s>a") == [1, a, 2]
    assert read("a", add=False) == [a]
    assert read("<s>a", add=False) == [1, a]
    # As many as the text says.
    assert read("<s><s>a") == [1, 1, a, 2]
    assert read([{"role": "user", "content": "<s>a"}]) == [1, a, 2]
    decoder = Decoder(Trio.from_models(make_model(0), tokenizer=tokenizer), 1)
    for adds, ids in ((True, [1, a, 2]), (False, [a])):
        [output] = decoder.generate("a", SamplingParams(add_special_tokens=adds, max_tokens=1))
        assert output.prompt_token_ids == {"base": ids}
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}"
    assert read("a", "chat") == read("a", "chat", add=False) == [1, a]


def test_chat_without_a_template_is_refused():
    tokenizer = make_tokenizer(chat=False)
    trio = Trio.from_models(make_model(0), tokenizer=tokenizer, prompts={"base": "chat"})
    with pytest.raises(ValueError, match=r"prompts of base must be 'plain' .* got 'chat'"):
        trio.tokenize("hi")


def test_other_tokens_are_refused():
    tokenizers = {
        "base": make_tokenizer(),
        "expert": make_tokenizer(swap=True),
        "anti": make_tokenizer(),
    }
    wanted = re.escape(
        f"2 ids that differ, first id 10: base '{ALPHABET[7]}', expert '{ALPHABET[8]}'"
    )
    with pytest.raises(VocabularyError, match=wanted):
        Trio.from_models(make_model(0), make_model(1), make_model(2), tokenizers)


def test_eos_is_the_bases():
    several = Trio.from_models(make_model(0, eos=[7, 2, 9]), tokenizer=make_tokenizer())
    assert several.eos_token_ids == (7, 2, 9)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = ALPHABET[0]
    both = Trio.from_models(make_model(0, eos=2), tokenizer=tokenizer)
    assert both.eos_token_ids == (2, 3)


def test_an_end_that_not_every_role_has_is_refused():
    chatty = make_tokenizer(extra=("<end>",))
    chatty.eos_token = "<end>"
    tokenizers = {"base": chatty, "expert": make_tokenizer(), "anti": make_tokenizer()}
    base, expert, anti = make_model(0, 260, eos=259), make_model(1, 260), make_model(2, 260)
    with pytest.raises(VocabularyError, match=r"base must end .* got \[259\] past the shared"):
        Trio.from_models(base, expert, anti, tokenizers)


def test_pickled_weights_are_refused(saved, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((saved / "base" / name).read_bytes())
    torch.save(make_model(0).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"base must have its weights in safetensors .*got "):
        load_trio(base=tmp_path)


def test_code_in_a_checkpoint_is_not_run(saved, tmp_path):
    config = json.loads((saved / "base" / "config.json").read_text())
    config |= {
        "model_type": "other",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(LoadError, match="base must have its weights in safetensors"):
        load_trio(base=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "base must be a model, got None"),
        (
            {"source": "nowhere"},
            "source must be 'shipped' or a directory with a trio.json, got 'now",
        ),
        ({"base": "b", "expert": "e"}, "anti must be given with the other of the pair, got None"),
        ({"base": "b", "dtype": "int8"}, "dtype of base must be one of auto, .* got 'int8'"),
        ({"base": "b", "dtype": {"anti": "auto"}}, "dtype must have an entry for base, got anti"),
        ({"base": "b", "device": {"bass": "cpu"}}, "device must have keys among .* got 'bass'"),
        ({"base": "b", "gguf_file": {"bass": "x"}}, "gguf_file must have keys .* got 'bass'"),
        ({"base": "/no/such/place"}, "base must be a directory or hub name, got '/no/such/place'"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        load_trio(**arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "trio.json of trio must hold an object in JSON"),
        ('{"format": 9}', "trio.json must be an object of format 1"),
        ("[]", "trio.json of trio must hold an object in JSON"),
        ('{"format": 1, "bass": "b"}', "trio.json must have keys among .* got 'bass'"),
        ('{"format": 1, "base": "base", "prompts": {"base": "loud"}}', "got 'loud'"),
    ],
)
def test_bad_trio_files(saved, tmp_path, text, message):
    (tmp_path / "base").symlink_to(saved / "base")
    (tmp_path / "trio.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_trio(tmp_path)


def test_a_pickled_adapter_is_refused(saved, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(LoadError, match=r"expert must have .* adapter_model.safetensors"):
        load_trio(saved, expert=tmp_path)


def test_gguf_is_unpacked(tmp_path):
    pytest.importorskip("gguf")
    model = tiny_qwen2()
    write_gguf(tmp_path / "tiny.gguf", model, make_tokenizer())
    trio = load_trio(base=tmp_path, gguf_file={"base": "tiny.gguf"}, dtype="float32")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(trio.base(ids).logits, model(ids).logits)
    assert type(trio.base.lm_head) is torch.nn.Linear
    assert trio.tokenize("xab")["base"] == [*make_tokenizer().encode("x"), 259]
    assert (trio.vocab_size, trio.eos_token_ids) == (260, (2,))
