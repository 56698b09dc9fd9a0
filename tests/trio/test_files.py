"""Files from outside: whatever they name or hold, opening a trio writes and runs nothing of it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from proxytune_kernels.integrations.vllm_plugin.export import export
from proxytune_kernels.trio import load_trio
from proxytune_kernels.trio.files import INDEX_FILE, LoadError, file_in, read_object
from tests.trio.checkpoints import (
    SHIPPED,
    edit,
    make_adapter,
    make_tokenizer,
    tiny_qwen2,
    write_gguf,
)

WEIGHTS = "model.safetensors"


class _Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def refused(trio: Path, *words: str) -> None:
    """Check that neither a decoder nor an export opens it, and that both say these words."""
    for opened in (lambda: load_trio(trio), lambda: export(trio.parent / "out", trio, copy=True)):
        with pytest.raises(LoadError) as caught:
            opened()
        for word in words:
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (trio.parent / "out").exists()


def index(trio: Path, *names: Any) -> None:
    """Make the base's weights those of an index that names these files."""
    (trio / "base" / WEIGHTS).rename(trio / "base" / "part.safetensors")
    tensors = {f"tensor{i}": name for i, name in enumerate(names)}
    (trio / "base" / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": tensors}))


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b"),
        *("a\0b", "a\x1b[2J.safetensors", 7, None, ["part.safetensors"]),
    ],
)
def test_an_index_names_files_beside_it(trio: Path, name: Any) -> None:
    (trio / "outside.safetensors").write_bytes((trio / "base" / WEIGHTS).read_bytes())
    before = (trio / "outside.safetensors").read_bytes()
    index(trio, "part.safetensors", name)
    refused(trio, "base", "plain names" if isinstance(name, str) else "weight_map")
    assert (trio / "outside.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "pytorch_model.bin", "w.safetensors"])
def test_a_pickle_is_not_opened(trio: Path, name: str) -> None:
    index(trio, name)
    bomb = trio.parent / "ran"
    (trio / "base" / name).write_bytes(pickle.dumps(_Bomb(bomb)))
    refused(trio, "base must have its weights in safetensors", name)
    assert not bomb.exists()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_link_does_not_lead_out(trio: Path, name: str) -> None:
    home = trio if name == "tokenizer.json" else trio / "base"
    (home / name).rename(trio.parent / name)
    (home / name).symlink_to(trio.parent / name)
    refused(trio, "a link out of it", name)


def test_links_inside_and_into_the_blobs_of_a_snapshot(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    for directory in (snapshot, blobs):
        directory.mkdir(parents=True)
    (blobs / "123").write_text("{}")
    (snapshot / "blob").symlink_to(Path("../../blobs/123"))
    (snapshot / "beside").symlink_to("blob")
    (tmp_path / "other").write_text("{}")
    (snapshot / "other").symlink_to(Path("../../other"))
    assert file_in("base", snapshot, "beside").read_text() == "{}"
    with pytest.raises(LoadError, match="a link out of it"):
        file_in("base", snapshot, "other")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _header(size: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [_cut, _grow, _header(0), _header(1 << 62), _empty, Path.unlink],
    ids=["cut", "grown", "no header", "huge header", "empty", "gone"],
)
def test_weights_are_whole(trio: Path, spoil: Callable[[Path], None]) -> None:
    spoil(trio / "anti" / WEIGHTS)
    refused(trio, "anti must have its weights in safetensors")


@pytest.mark.parametrize("size", [0, 3, 4, 24, 200, 4000])
def test_a_gguf_file_is_whole(tmp_path: Path, size: int) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf", tiny_qwen2(), make_tokenizer())
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[:size])
    with pytest.raises(LoadError, match=r"base must .*GGUF|base must be a causal LM"):
        load_trio(base=tmp_path, gguf_file={"base": "tiny.gguf"})
    with pytest.raises(LoadError, match="plain names"):
        load_trio(base=tmp_path, gguf_file={"base": f"../{tmp_path.name}/tiny.gguf"})


_JSON = [
    *('{"a": ', "[]", "7", '"a"', "null", "", "\xff\xfe", '{"a": ' + "1" * 5000 + "}"),
    *("[" * 100_000, '{"a":' * 100_000),
]


@pytest.mark.parametrize("text", _JSON, ids=lambda text: re.sub(r"\W", "", text)[:8] or "signs")
@pytest.mark.parametrize(
    "name",
    ["trio.json", "base/config.json", "base/generation_config.json", "tokenizer_config.json"],
)
def test_json_is_one_object(trio: Path, name: str, text: str) -> None:
    (trio / name).write_text(text, encoding="latin-1")
    refused(trio, Path(name).name, "must hold an object in JSON")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("trio.json", {"base": 7}),
        ("trio.json", {"tokenizer": ["tokenizer"]}),
        ("trio.json", {"prompts": "chat"}),
        ("trio.json", {"prompts": {"base": 7}}),
        ("trio.json", {"prompts": {"base": "loud"}}),
        ("trio.json", {"gguf_file": ["a"]}),
        ("trio.json", {"gguf_file": {"base": 7}}),
        ("trio.json", {"quantize": 8}),
        ("trio.json", {"quantize": {"base": {}}}),
        ("trio.json", {"merge_adapter": "yes"}),
        ("trio.json", {"run": "me"}),
        ("base/config.json", {"architectures": "LlamaForCausalLM"}),
        ("base/config.json", {"architectures": [7]}),
        ("base/config.json", {"architectures": ["LlamaForSequenceClassification"]}),
        ("base/config.json", {"model_type": 7}),
        ("base/config.json", {"hidden_size": "wide"}),
        ("base/config.json", {"hidden_size": -1}),
        ("base/config.json", {"vocab_size": 10**9}),
        ("base/config.json", {"num_attention_heads": 0}),
        ("base/config.json", {"rope_parameters": 7}),
        ("base/config.json", {"quantization_config": 7}),
        ("base/generation_config.json", {"eos_token_id": -1}),
        ("base/generation_config.json", {"eos_token_id": 1.5}),
        ("base/generation_config.json", {"eos_token_id": "2"}),
        ("base/generation_config.json", {"eos_token_id": [2, "3"]}),
        ("base/generation_config.json", {"eos_token_id": {"2": 3}}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.json", "../x.json"]}),
        ("tokenizer_config.json", {"tokenizer_class": 7}),
        ("tokenizer_config.json", {"added_tokens_decoder": 7}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
        ("tokenizer_config.json", {"chat_template": 7}),
        ("tokenizer_config.json", {"chat_template": {"default": 7}}),
    ],
)
def test_values_of_other_types(trio: Path, name: str, changes: dict[str, Any]) -> None:
    if not (trio / name).exists():
        (trio / name).write_text("{}")
    edit(trio / name, **changes)
    with pytest.raises(ValueError) as caught:
        load_trio(trio)
    message = str(caught.value)
    role = "tokenizer" if "tokenizer" in name else name.partition("/")[0].removesuffix(".json")
    assert role in message or "prompts of base" in message
    assert "\n" not in message and len(message) < 1000


@pytest.mark.parametrize("text", ["", "[]", '{"version": "1.0"}', '{"model": ' * 10_000, "\0"])
def test_a_tokenizer_of_other_contents(trio: Path, text: str) -> None:
    (trio / "tokenizer.json").write_text(text)
    refused(trio, "tokenizer", "must be a tokenizer")


def test_a_checkpoint_without_some_of_its_weights(trio: Path) -> None:
    path = trio / "expert" / WEIGHTS
    tensors = load_file(path)
    name = next(name for name in tensors if "mlp" in name)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=f"expert must have all weights of .*{re.escape(name)}"):
        load_trio(trio)


def test_a_classifier_is_no_language_model(trio: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(trio / "base", num_labels=2)
    model.save_pretrained(trio / "base")
    refused(trio, "base", "architectures", "causal LM")
    edit(trio / "base" / "config.json", architectures=["LlamaForCausalLM"])
    if not model.config.tie_word_embeddings:
        with pytest.raises(LoadError, match="base must have all weights of .*lm_head"):
            load_trio(trio)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: _cut(d / "adapter_model.safetensors"), "weights in safetensors"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "an object in JSON"),
        (lambda d: edit(d / "adapter_config.json", base_model_name_or_path=7), "names its model"),
        (lambda d: edit(d / "adapter_config.json", r="many"), "an adapter for this model"),
        (lambda d: edit(d / "adapter_config.json", peft_type="NEW"), "an adapter for this model"),
        (lambda d: edit(d / "adapter_config.json", target_modules=7), "an adapter for this model"),
    ],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_adapters(trio: Path, spoil: Callable[[Path], None], words: str) -> None:
    pytest.importorskip("peft")
    adapter = make_adapter(trio / "adapter", trio / "anti")
    spoil(adapter)
    with pytest.raises(LoadError, match=f"expert .*{words}"):
        load_trio(trio, expert=adapter)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        os.truncate(file.fileno(), (1 << 28) + 1)  # sparse: takes no space
    with pytest.raises(LoadError, match="of at most"):
        read_object("base", path)


def test_an_exported_directory_holds_only_what_its_record_lists(trio: Path) -> None:
    (trio / "base" / "secret.json").write_text("{}")
    out = export(trio.parent / "out", trio, copy=True).directory
    record = read_object("export", out / "proxytune_export.json")["files"]
    found = {str(p.relative_to(out)) for p in out.rglob("*") if not p.is_dir()}
    assert found == {*record, "proxytune_export.json"}
    assert not any(name.endswith("secret.json") for name in found)


def test_bytes_decide_not_the_end_of_a_name(trio: Path) -> None:
    torch.save({"a": torch.zeros(1)}, trio / "base" / WEIGHTS)
    refused(trio, "base must have its weights in safetensors")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_a_hub_name_is_looked_up_once(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its model and its tokenizer; what an adapter names is found for the adapter."""
    looked_up = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        looked_up.append(name)
        return str(trio / name.removeprefix("some/"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for role in ("base", "anti"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(SHIPPED / name, trio / role)
    make_adapter(trio / "adapter", trio / "anti", name="some/anti")
    opened = load_trio(base="some/base", expert="some/adapter", anti="some/anti")
    assert sorted(looked_up) == ["some/adapter", "some/anti", "some/anti", "some/base"]
    names = {role: described["name"] for role, described in opened.info()["roles"].items()}
    assert names == {"base": "some/base", "expert": "some/anti", "anti": "some/anti"}
    assert opened.tokenizers["expert"].name_or_path == "some/anti"
