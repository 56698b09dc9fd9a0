"""``proxytune tune``: the page from a CSV to a served model, and one sentence for a mistake."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="tuning needs the extra tune: peft is not there")
pytest.importorskip("accelerate", reason="tuning needs the extra tune: accelerate is not there")
pytest.importorskip("scipy", reason="tuning needs the extra tune: scipy is not there")

import proxytune_kernels as ptk
from proxytune_kernels.cli import tune as command
from tests.cli import assert_one_sentence, invoke
from tests.decoder.conftest import tiny_llama
from tests.documents import examples
from tests.trio.checkpoints import make_tokenizer

CHAT = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
}


def test_the_page_from_a_csv_to_a_served_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = examples("docs/tune.md", "python")
    assert code.count("range(800)") == 1
    exec(compile(code.replace("range(800)", "range(40)"), "rows.py", "exec"), {})
    *commands, request = examples("docs/tune.md", "sh")
    [check], [tune], then = (shell_lines(each) for each in commands)
    result = invoke(*check[1:])
    assert result.exit_code == 0 and result.stdout.count("% masked") == 40
    assert not (tmp_path / "sums").exists()
    assert tune.count("300") == 1  # steps
    result = invoke(*["3" if word == "300" else word for word in tune[1:]])
    assert result.exit_code == 0, result.output
    for row in ("base", "anti", "expert", "proxy, alpha 0.5", "proxy, alpha 1.5"):
        assert re.search(rf"{row} *│ *\d\.\d{{4}} │ \d\.\d{{4}} to \d\.\d{{4}}", result.stdout)
    assert "3/3" in result.stderr and re.search(r"loss \d\.", result.stderr)
    generate, export, serve = then
    assert invoke(*generate[1:]).exit_code == invoke(*export[1:]).exit_code == 0
    assert (tmp_path / "served" / "config.json").is_file()
    assert answered(serve[1:], request)["choices"][0]["finish_reason"] in ("stop", "length")


def shell_lines(commands: str) -> list[list[str]]:
    """The words of each command of a shell's text."""
    return [shlex.split(f"proxytune {part}") for part in commands.split("proxytune ")[1:]]


def answered(serve: list[str], curl: str) -> Any:
    """What the server that a command starts answers to curl's request."""
    pytest.importorskip("fastapi", reason="the server needs the extra serve: fastapi is not there")
    from tests.server.serving import serving

    assert serve[:3] == ["serve", "--trio", "sums"]
    body = json.loads(shlex.split(curl)[-1])
    assert body.pop("model") == "sums"
    with serving(ptk.Decoder(ptk.load_trio("sums"))) as server:
        response, data = server.ask("/v1/completions", {**body, "model": "shipped"})
    assert response.status == 200, data
    return json.loads(data)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an anti-expert whose tokenizer has a chat template."""
    root = tmp_path_factory.mktemp("models")
    for seed, role in enumerate(("base", "anti")):
        model = tiny_llama(seed, 16, 1, vocab_size=259, max_position_embeddings=64).float()
        model.save_pretrained(root / role)
        make_tokenizer(chat=role == "anti").save_pretrained(root / role)
    return root


def test_an_expert_of_chats_reads_its_template_and_the_base_plain_text(models, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(CHAT) + "\n" for _ in range(4)))
    named = ["--base", models / "base", "--anti", models / "anti", "--steps", 1]
    out = tmp_path / "out"
    result = invoke("tune", *named, "--data", data, "--out", out, "--held-out-rows", 1)
    assert result.exit_code == 0, result.output
    assert "1 held-out answers of 7 tokens" in result.stdout  # hello, the template's |, the end
    trio = ptk.load_trio(out)
    ids = trio.tokenize("hi")
    texts = {role: trio.tokenizers[role].decode(ids[role]) for role in ids}
    assert texts == {"base": "hi", "expert": "[user]hi|[assistant]", "anti": "hi"}
    plain = tmp_path / "plain"
    again = invoke("tune", *named, "--data", data, "--out", plain, "--plain", "--held-out-rows", 0)
    assert again.exit_code == 0 and "held-out answers" not in again.stdout
    assert "prompts" not in json.loads((plain / "trio.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--anti", "x"], 2, ["no models"]),
        (["--trio", "shipped", "--held-out", "x", "--held-out-rows", 1], 2, ["not both"]),
        (["--trio", "shipped", "--held-out-rows", 4], 2, ["more rows than are held out, 4, got 4"]),
        (["--trio", "nowhere"], 1, ["source must be 'shipped'"]),
        (["--trio", "shipped", "--resume"], 1, ["a run that was begun"]),
        (["--trio", "shipped", "--dtype", "int8"], 1, ["dtype of anti must be one of"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_mistakes(tmp_path, arguments, code, words):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    result = invoke("tune", "--data", data, "--out", tmp_path / "out", *arguments)
    lines = result.stderr.splitlines()
    assert result.exit_code == code, result.output
    assert [line for line in lines if line.startswith("Error: ")] == lines[-1:]
    assert all(word in lines[-1] for word in words), result.stderr


def test_wrong_rows_are_named_by_their_lines(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}\n\n{"text": ""}\n{"txt": "a"}\n')
    result = invoke("tune", "--trio", "shipped", "--data", data, "--out", tmp_path / "out")
    first, second, last = result.stderr.splitlines()
    assert result.exit_code == 1 and "line 3: text must be" in first
    assert "line 4: a row must hold one of" in second
    assert "must have rows that can be trained on, got 2 others" in last
    each = invoke("tune", "--trio", "shipped", "--data", data, "--out", tmp_path, "--check")
    assert each.exit_code == 1 and "line 1: 2 tokens, 50% masked" in each.stdout


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "peft" else name)
    result = invoke("tune", "--trio", "shipped", "--data", "x", "--out", tmp_path / "out")
    assert_one_sentence(result, 1, "tuning needs peft", "proxytune_kernels[tune]")
