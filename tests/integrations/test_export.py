"""`proxytune export-vllm`: what it writes, what it refuses, and that it loses nobody's files."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import Qwen2ForCausalLM as Qwen2

import proxytune_kernels as ptk
from proxytune_kernels.integrations.vllm_plugin import directory as writer
from proxytune_kernels.integrations.vllm_plugin.export import export, serve_command
from proxytune_kernels.trio.files import LoadError
from proxytune_kernels.trio.roles import ROLES
from proxytune_kernels.trio.vocabulary import VocabularyError
from tests.cli import assert_one_sentence, invoke
from tests.documents import examples
from tests.trio.checkpoints import (
    SHIPPED,
    edit,
    make_adapter,
    make_tokenizer,
    tiny_qwen2,
    write_gguf,
)

IDS = torch.tensor([[5, 6, 7, 200, 1000]])
INDEX = "model.safetensors.index.json"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def give_tokenizers(trio: Path) -> None:
    """A tokenizer for each role of a copy of the shipped trio, in place of one for all."""
    for role in ROLES:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(SHIPPED / name, trio / role)
    edit(trio / "trio.json", tokenizer=None)


def contents(directory: Path) -> dict[str, Any]:
    """Every file by name, and the target of every link."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = path.readlink()
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def weights(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def logits(directory: Path) -> Any:
    """Of a checkpoint as transformers opens it: by its model_type, not by its architecture."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(IDS).logits


def steered(expert: Path | str, anti: Path | str) -> dict[str, Any]:
    """What config.json, or its overrides, says of the shipped trio at alpha 0.5."""
    return {
        "architectures": ["ProxyTunedForCausalLM"],
        "proxy_tuning": {
            "expert": str(expert), "anti": str(anti), "alpha": 0.5,
            "base_architectures": ["LlamaForCausalLM"], "vocab_size": 1536,
        },
    }  # fmt: skip


def test_what_is_written(out):
    written = export(out, "shipped", alpha=0.5)
    base = json.loads((SHIPPED / "base" / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == base | steered("expert", "anti")
    links = {name: target for name, target in contents(out).items() if isinstance(target, Path)}
    folders = {"base": "", "expert": "expert/", "anti": "anti/"}
    file = "model.safetensors"
    assert links == {f"{at}{file}": SHIPPED / role / file for role, at in folders.items()}
    assert torch.equal(logits(out), logits(SHIPPED / "base"))
    for role in ("expert", "anti"):
        assert torch.equal(logits(out / role), logits(SHIPPED / role))
    text = "Question: Tom has 3 pens."
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode(text) == ptk.load_trio("shipped").tokenizer.encode(text)
    assert (out / "generation_config.json").is_file()
    assert (written.directory, written.vocab_size, written.notes) == (out, 1536, ())


def test_copies_are_self_contained(tmp_path, trio):
    export(tmp_path / "here" / "out", trio, copy=True)
    moved = tmp_path / "there"
    shutil.move(tmp_path / "here" / "out", moved)
    shutil.rmtree(trio)
    assert not any(path.is_symlink() for path in moved.rglob("*"))
    assert str(tmp_path) not in (moved / "config.json").read_text()
    assert_same(weights(moved), weights(SHIPPED / "base"))
    assert_same(weights(moved / "expert"), weights(SHIPPED / "expert"))
    assert list(tmp_path.joinpath("here").iterdir()) == []


def test_links_hold_wherever_the_command_ran(tmp_path, trio, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(Path("some") / "where" / "out", trio.name)
    assert_same(weights(tmp_path / "some" / "where" / "out"), weights(trio / "base"))


def test_dtype(out, trio):
    edit(trio / "base" / "config.json", dtype=None, torch_dtype="float16")
    written = export(out, trio, dtype="float32")
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], "torch_dtype" in config) == ("float32", False)
    assert any("--dtype float32" in note for note in written.notes)


def test_weights_in_parts(out, trio):
    base = AutoModelForCausalLM.from_pretrained(trio / "base")
    (trio / "base" / "model.safetensors").unlink()
    base.save_pretrained(trio / "base", max_shard_size="1MB")
    parts = {file.name for file in (trio / "base").glob("*.safetensors")}
    assert len(parts) > 2
    # What the index does not name is another form of the weights: vLLM would read it too.
    save_file({"other": torch.zeros(2)}, trio / "base" / "consolidated.safetensors")
    export(out, trio)
    assert {file.name for file in out.glob("*.safetensors")} == parts
    assert (out / INDEX).is_file()
    assert_same(weights(out), dict(weights(SHIPPED / "base")))


# peft 0.21 asks transformers 5.23 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("role", ["expert", "base"])
def test_an_adapter_is_merged(out, trio, role):
    pytest.importorskip("peft")
    # The expert's is over the anti, the base's over the base.
    over = {"expert": "anti", "base": "base"}[role]
    adapter = make_adapter(trio / "adapter", trio / over, f"../{over}")
    edit(trio / "trio.json", **{role: "adapter", "merge_adapter": None})
    export(out, trio)
    target = {"expert": out / "expert", "base": out}[role]
    merged = ptk.load_trio(trio).models[role]
    assert_same(AutoModelForCausalLM.from_pretrained(target).state_dict(), merged.state_dict())
    assert not torch.equal(logits(target), logits(SHIPPED / over))
    # safetensors makes files that only their owner can read.
    assert (target / "model.safetensors").stat().st_mode & 0o777 == (
        (out / "tokenizer.json").stat().st_mode & 0o777
    )
    assert not (target / "adapter_config.json").exists()
    with pytest.raises(LoadError, match=f"{role} must be .* weights have to be written: export it"):
        serve_command(trio)
    assert adapter.is_dir()


def test_gguf_is_unpacked(out, tmp_path):
    pytest.importorskip("gguf")
    for seed, role in enumerate(ROLES):
        (tmp_path / role).mkdir()
        write_gguf(tmp_path / role / "m.gguf", tiny_qwen2(seed), make_tokenizer())
    settings: dict[str, Any] = {"format": 1, **{role: role for role in ROLES}}
    settings["gguf_file"] = dict.fromkeys(ROLES, "m.gguf")
    (tmp_path / "trio.json").write_text(json.dumps(settings))
    export(out, tmp_path)
    opened = ptk.load_trio(tmp_path)
    for role, target in {"base": out, "expert": out / "expert", "anti": out / "anti"}.items():
        written = Qwen2.from_pretrained(target)
        assert_same(written.state_dict(), opened.models[role].state_dict())
        assert "quantization_config" not in json.loads((target / "config.json").read_text())
    ids = AutoTokenizer.from_pretrained(out).encode("xab")
    assert ids == opened.tokenize("xab")["base"]
    # One for all roles is no GGUF file's.
    assert export(tmp_path / "other", tmp_path, tokenizer=out).vocab_size == 260
    # Beside a config.json of Qwen2 transformers makes another class of this one, with more tokens.
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(LoadError, match="tokenizer must be the same .* as Qwen2Tokenizer"):
        export(tmp_path / "refused", tmp_path, tokenizer=tmp_path / "tokenizer")


def test_a_hub_name_is_its_cached_snapshot(out, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--some--base"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(SHIPPED / "base", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    export(out, "shipped", base="some/base")
    assert (out / "model.safetensors").readlink() == snapshot / "model.safetensors"
    with pytest.raises(LoadError, match="base must be a directory or hub name, got 'some/other'"):
        export(tmp_path / "more", "shipped", base="some/other")


# Settings of trio.json are a dictionary by that name.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"json": {"expert": None, "anti": None}}, "expert and anti must be given .* base alone"),
        ({"json": {"anti": None}}, "anti must be given with the other of the pair"),
        ({"json": {"prompts": {"expert": "chat"}}}, "same for all roles.* base plain, expert chat"),
        (
            {"json": {"pairs": [{"expert": "a", "anti": "b"}]}},
            "pairs in trio.json must be left out",
        ),
        ({"json": {"quantize": {"base": "int8"}}}, "quantize in trio.json .* vLLM does not do"),
        ({"json": {"gguf_file": {"bass": "x"}}}, "gguf_file must have keys .* got 'bass'"),
        ({"json": {"expert": "gone"}}, "expert must be a directory or hub name, got 'gone'"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"alpha": "1"}, "alpha must be a finite number, got '1'"),
        # The kernels hold it in fp32.
        ({"alpha": 1e39}, "alpha must be a finite number, got 1e\\+39"),
        ({"dtype": "float64"}, "dtype must be one of auto, .* got 'float64'"),
        ({"source": "nowhere"}, "source must be 'shipped' or a directory .* got 'nowhere'"),
    ],
)
def test_what_is_refused(out, trio, arguments, message):
    named = dict(arguments)
    edit(trio / "trio.json", **named.pop("json", {}))
    with pytest.raises(ValueError, match=message):
        export(out, **{"source": trio, **named})
    assert not out.exists()


def test_checkpoints_that_are_refused(out, trio):
    (trio / "anti" / "model.safetensors").rename(trio / "anti" / "pytorch_model.bin")
    with pytest.raises(LoadError, match="anti must have its weights in safetensors .* without"):
        export(out, trio)
    (trio / "anti" / INDEX).write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    with pytest.raises(LoadError, match="without part-1"):
        export(out, trio)
    edit(trio / "expert" / "config.json", architectures=None)
    with pytest.raises(LoadError, match="expert must name its architectures"):
        export(out, trio)
    edit(trio / "base" / "config.json", model_type="no-such-model")
    with pytest.raises(LoadError, match="base must be a causal LM .* got"):
        export(out, trio)
    export(out, "shipped")
    with pytest.raises(LoadError, match="base must be one model, got the exported trio"):
        export(trio.parent / "again", "shipped", base=out)


def test_vocabularies_agree_as_in_load_trio(out, trio):
    edit(trio / "base" / "config.json", vocab_size=1600)
    written = export(out, trio)
    said = json.loads((out / "config.json").read_text())
    assert written.vocab_size == said["proxy_tuning"]["vocab_size"] == 1536
    assert written.notes == ("base: 64 padding ids from 1536 on are never read",)
    give_tokenizers(trio)
    text = (trio / "expert" / "tokenizer.json").read_text()
    swapped = text.replace('"A": 33', '"A": 34').replace('"B": 34', '"B": 33')
    (trio / "expert" / "tokenizer.json").write_text(swapped)
    with pytest.raises(VocabularyError, match="2 ids that differ, first id 33: base 'A', expert"):
        export(out.parent / "other", trio)
    # One for all roles is what they then share.
    assert export(out.parent / "other", trio, tokenizer=SHIPPED).vocab_size == 1536


def test_an_end_that_not_every_role_has_is_refused(out, trio):
    edit(trio / "base" / "config.json", vocab_size=1600)
    edit(trio / "base" / "generation_config.json", eos_token_id=1590)
    edit(trio / "tokenizer_config.json", eos_token=None)
    with pytest.raises(VocabularyError, match="base must end its text with a token"):
        export(out, trio)


def test_chat_needs_one_template(out, trio):
    give_tokenizers(trio)
    for role in ROLES:
        (trio / role / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    edit(trio / "trio.json", prompts=dict.fromkeys(ROLES, "chat"))
    export(out, trio)
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages[0]['content'] }}"
    (trio / "expert" / "chat_template.jinja").write_text("other")
    with pytest.raises(LoadError, match="prompts of 'chat' must come from one template"):
        export(out.parent / "other", trio)


def test_force_replaces_an_earlier_export_and_nothing_else(out, trio):
    base = AutoModelForCausalLM.from_pretrained(trio / "base")
    base.save_pretrained(trio / "base", max_shard_size="1MB")
    export(out, trio)
    (out / "notes.txt").write_text("mine")
    (out / "anti" / "more").mkdir()
    with pytest.raises(LoadError, match="out must be new or empty, .* with an earlier export"):
        export(out, "shipped")
    export(out, "shipped", copy=True, force=True)
    names = set(contents(out))
    assert "model.safetensors" in names and INDEX not in names
    assert [name for name in names if name.startswith("model-")] == []
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "anti" / "more").is_dir()
    assert (trio / "base" / INDEX).is_file()  # a link was taken away, not what it named


@pytest.mark.parametrize(
    "change", ["edited", "relinked", "in the way", "folder", "empty folder", "outside"]
)
def test_force_refuses_what_it_did_not_write(out, trio, change):
    export(out, "shipped")
    if change == "edited":
        (out / "tokenizer_config.json").write_text("{}")
    elif change == "relinked":
        (out / "model.safetensors").unlink()
        (out / "model.safetensors").symlink_to(trio / "base" / "model.safetensors")
    elif change == "in the way":
        edit(out / writer.RECORD, files={})
    elif change == "folder":
        shutil.move(out / "expert", trio / "moved")
        (out / "expert").symlink_to(trio / "moved")
    elif change == "empty folder":
        shutil.rmtree(out / "expert")
        (trio / "empty").mkdir()
        (out / "expert").symlink_to(trio / "empty")
    else:
        outside = trio / "trio.json"
        size, time = outside.stat().st_size, outside.stat().st_mtime_ns
        record = json.loads((out / writer.RECORD).read_text())["files"]
        record["../trio/trio.json"] = {"bytes": size, "time_ns": time}
        edit(out / writer.RECORD, files=record)
    before = contents(out.parent)
    with pytest.raises(LoadError, match="out must"):
        export(out, "shipped", copy=True, force=True)
    assert contents(out.parent) == before


def test_other_peoples_directories_are_refused(tmp_path, trio):
    before = contents(trio)
    for force in (False, True):
        with pytest.raises(LoadError, match="out must be new, empty, or an earlier export"):
            export(trio / "anti", "shipped", force=force)
        with pytest.raises(LoadError, match="out must not hold what is exported"):
            export(trio, trio, force=force)
        with pytest.raises(LoadError, match="out must be a directory, got the file"):
            export(trio / "trio.json", "shipped", force=force)
    assert contents(trio) == before
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", "shipped")


def test_nothing_is_left_of_what_fails(out, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    export(out, "shipped")
    before = contents(out)
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        export(out, "shipped", force=True)
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_the_command(tmp_path):
    target = tmp_path / "a trio"
    settings = ["--alpha", "0.25", "--dtype", "float32"]
    result = invoke("export-vllm", "--trio", "shipped", *settings, target)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        *(f"{role}: linked from {SHIPPED / role}" for role in ROLES),
        "vocabulary: 1536 ids that mean the same to every role",
        "vLLM runs float32 checkpoints in 16 bits unless it is told --dtype float32",
        f"vllm serve '{target}'",
    ]
    assert json.loads((target / "config.json").read_text())["proxy_tuning"]["alpha"] == 0.25
    result = invoke("export-vllm", "--trio", "shipped", "--force", "--copy", str(target))
    assert result.stdout.startswith("base: copied from ")


def test_the_command_that_serves_it_where_it_lies():
    result = invoke("export-vllm", "--trio", "shipped", "--print-overrides", "--alpha", "0.5")
    assert result.exit_code == 0, result.output
    *command, overrides = shlex.split(result.stdout)
    assert command == [
        *("vllm", "serve", str(SHIPPED / "base")),
        *("--tokenizer", str(SHIPPED), "--hf-overrides"),
    ]
    assert json.loads(overrides) == steered(SHIPPED / "expert", SHIPPED / "anti")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["out"], 2, "no models: give --trio shipped"),
        (["--trio", "shipped"], 2, "give OUT, or --print-overrides without it"),
        (["--trio", "shipped", "--print-overrides", "out"], 2, "give OUT, or --print-overrides"),
        (["--trio", "shipped", "--print-overrides", "--copy"], 2, "takes no option of what is"),
        (["--trio", "nowhere", "out"], 1, "source must be 'shipped'"),
        (["--trio", "shipped", "--dtype", "int8", "out"], 1, "dtype must be one of auto"),
        (["--trio", "shipped", "--alpha", "inf", "out"], 1, "alpha must be a finite number"),
    ],
)
def test_a_users_mistake_is_one_sentence(arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(invoke("export-vllm", *arguments), code, words)
    assert list(tmp_path.iterdir()) == []


def test_the_command_of_the_documentation(tmp_path, monkeypatch):
    [line] = examples("docs/vllm.md", "sh")
    program, command, *arguments = shlex.split(line)
    monkeypatch.chdir(tmp_path)
    result = invoke(command, *arguments)
    assert (program, command, result.exit_code) == ("proxytune", "export-vllm", 0)
    assert result.stdout.endswith("\nvllm serve served\n")
    assert (tmp_path / "served" / "config.json").is_file()
