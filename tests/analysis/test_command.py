"""``proxytune analyze``: in the terminal, as a page, as JSON lines; and docs/analyze.md."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from proxytune_kernels.cli import analyze
from tests.cli import assert_one_sentence, invoke
from tests.documents import examples

PROMPT = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have now?\nAnswer:"
SHIPPED = ("analyze", "--trio", "shipped", "--dtype", "float32")


def test_generated_and_given_texts_together(tmp_path):
    lines = [
        {"prompt": PROMPT, "n": 2, "max_tokens": 4},
        {"prompt": PROMPT, "completion": " 3 + 4 = 7"},
        {"text": "a\x1b[31m b"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html, jsonl = tmp_path / "page.html", tmp_path / "out.jsonl"
    result = invoke(
        *SHIPPED, "--file", tmp_path / "in.jsonl", "--html", html, "--jsonl", jsonl, "--show", 3
    )
    assert result.exit_code == 0, result.output
    assert "==> 4 texts of 3 prompts" in result.stdout and "In brackets: 95%" in result.stdout
    assert "\n1 more: --show" in result.stdout and "left minus right" in result.stdout
    assert "\x1b" not in result.stdout
    found = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert [(f["index"], f["sample"]) for f in found] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert [f["finish_reason"] for f in found] == ["length", "length", None, None]
    # What is generated greedily and what is given begin alike: so do their figures.
    for one, other in zip(found[0]["tokens"], found[2]["tokens"], strict=False):
        assert one["token_id"] == other["token_id"]
        # A batch of two by steps, and one by a whole forward: of fp32 sums in another order.
        assert one["proxy"] == pytest.approx(other["proxy"], abs=1e-4)
        assert {"base", "expert", "anti", "base_rank", "changed", "kl"} < set(one)
        assert len(one["alternatives"]) == 5
    given = found[2]
    assert given["text"] == " 3 + 4 = 7"
    assert [t["side"] for t in given["tokens"] if t["side"]] == ["left"] * 3 + ["right"]
    assert {t["part"] for t in given["tokens"]} <= {"number", "calculation", "layout"}
    assert html.read_text().count("<article>") == 4


def test_colours_are_for_terminals_that_want_them():
    arguments = (*SHIPPED, "--given", "3 + 4 = 7")
    seen = invoke(*arguments, FORCE_COLOR="1", TERM="xterm", NO_COLOR="").stdout
    assert "\x1b[" in seen and "steering made it likelier" in seen
    for plain in (
        invoke(*arguments, "--plain", FORCE_COLOR="1", TERM="xterm"),
        invoke(*arguments, FORCE_COLOR="1", TERM="xterm", NO_COLOR="1"),
    ):
        assert "\x1b" not in plain.stdout and "1 text of 1 prompt" in plain.stdout
        assert "With one prompt nothing is known of the spread" in plain.stdout


def test_mistakes_are_one_sentence(tmp_path, monkeypatch):
    def fails(line: str, *options: str) -> None:
        (tmp_path / "in.jsonl").write_text(line)
        words = options[-1]
        result = invoke(*SHIPPED, "--file", tmp_path / "in.jsonl", *options[:-1])
        assert_one_sentence(result, 2, words)

    fails('{"prompt": [{"role": "user", "content": "a"}]}', "--given", "prompts[0] must be a text")
    fails('{"prompt": "a", "completion": 3}', "a given text must be a string")
    fails('{"prompt": "a", "text": "b"}', '"prompt", or "text" alone')
    fails('{"text": "b", "nonsense": 1}', "unknown key 'nonsense'")
    result = invoke("generate", "--trio", "shipped", "--file", tmp_path / "in.jsonl")
    assert_one_sentence(result, 2, 'an object with "prompt"'.replace("an object", "a JSON object"))
    assert_one_sentence(invoke(*SHIPPED, "--temperature", -1, "a"), 2, "temperature")
    missing = invoke(*SHIPPED, "--html", tmp_path / "none" / "page.html", "a")
    assert_one_sentence(missing, 1, "No such file")
    monkeypatch.setattr(analyze, "find_spec", lambda name: None if name == "scipy" else name)
    assert_one_sentence(invoke(*SHIPPED, "a"), 1, "scipy", "proxytune_kernels[analysis]")


def test_the_examples_of_the_documentation(tmp_path, monkeypatch, capsys):
    [script] = examples("docs/analyze.md", "sh")
    [code] = examples("docs/analyze.md", "python")
    monkeypatch.chdir(tmp_path)
    # In this process: starting others takes longer than all they do.
    for name, text in re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", script, re.S | re.M):
        (tmp_path / name).write_text(text)
    commands = [shlex.split(line)[1:] for line in script.splitlines() if line[:4] == "prox"]
    printed = [invoke(*command) for command in commands]
    assert [result.exit_code for result in printed] == [0, 0]
    assert "==> 5 texts of 5 prompts" in printed[0].stdout
    assert "==> 2 texts of 2 prompts" in printed[1].stdout
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert len((tmp_path / "tokens.jsonl").read_text().splitlines()) == 5
    exec(code, {})
    names = capsys.readouterr().out.splitlines()
    assert names[0].startswith("number") and "left side" in names[1]
