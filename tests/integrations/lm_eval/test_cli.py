"""``proxytune eval``: what it prints and writes, and one sentence for a user's mistake."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from proxytune_kernels.cli.evaluate import _value
from proxytune_kernels.cli.options import strengths
from tests.cli import assert_one_sentence, invoke
from tests.integrations.lm_eval.conftest import write_tasks

TRIO = ["--trio", "shipped", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_tables_and_files_of_each_alpha(folder, tmp_path):
    asked = ["--include-path", folder, "--output-path", tmp_path, "--log-samples", "--limit", 3]
    asked += ["--tasks", "local_choice,local_answer", "--alpha", "0:0.5:0.5"]
    both = invoke("eval", *asked, *TRIO)
    assert both.exit_code == 0, both.output
    tables = re.split(r"^proxytune, alpha (.*)$", both.stdout, flags=re.M)
    assert tables[1::2] == ["0", "0.5"]
    for table in tables[2::2]:
        assert "|local_choice|" in table and "|local_answer|" in table and "acc_norm" in table
    for alpha in ("0", "0.5"):
        [path] = (tmp_path / f"shipped-alpha-{alpha}").glob("results_*.json")
        saved = json.loads(path.read_text())
        assert saved["config"]["model_args"] == {
            "trio": "shipped", "dtype": "float32", "alpha": float(alpha)
        }  # fmt: skip
        assert saved["config"]["limit"] == 3 and saved["config"]["batch_size"] == 8
        assert saved["config"]["fewshot_seed"] == 1234


def test_a_sweep_over_a_task(folder):
    pytest.importorskip("scipy", reason="sweeps need the extra analysis: scipy is not there")
    asked = ["--include-path", folder, "--alpha", "0:0.5:0.5", *TRIO, "--limit", 3]
    swept = invoke("sweep", *asked, "--score", "lm-eval:local_choice/acc_norm")
    assert swept.exit_code == 0, swept.output
    assert "local_choice/acc_norm, 3 rows" in swept.stdout
    tables = invoke("eval", "--tasks", "local_choice", *asked).stdout
    wanted = [float(x) for x in re.findall(r"\|acc_norm *\|↑ *\| *([\d.]+)", tables)]
    found = re.findall(r"^│ +[\d.]+ │ +([\d.]+) │", swept.stdout, re.M)
    assert [float(x) for x in found] == pytest.approx(wanted, abs=5e-5)  # four digits


def test_model_args_say_what_options_say(folder):
    asked = ["--tasks", "local_choice", "--include-path", folder, "--num-fewshot", 1, "--seed", 3]
    options = invoke("eval", *asked, *TRIO, "--alpha", 0.7, "--batch-size", 2, "--max-length", 200)
    packed = "trio=shipped,dtype=float32,alpha=0.7,batch_size=2,max_length=200"
    assert options.exit_code == 0, options.output
    assert invoke("eval", *asked, "--model-args", packed).stdout == options.stdout
    assert invoke("eval", *asked, *TRIO, "--alpha", -3).stdout != options.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model-args", "trio=shipped,alhpa=1"], 2, ["alpha", "got 'alhpa=1'"]),
        ([*TRIO, "--model-args", "trio=shipped"], 2, ["trio must be given once, got it twice"]),
        ([*TRIO, "--alpha", "0:1"], 2, ["FIRST:STEP:LAST", "got '0:1'"]),
        ([*TRIO, "--alpha", "0:-0.5:1"], 2, ["a step that leads from first to last"]),
        ([*TRIO, "--alpha", "inf"], 2, ["finite", "got 'inf'"]),
        ([*TRIO, "--seed", "1,2"], 2, ["--seed must be one integer, or four", "got '1,2'"]),
        ([*TRIO, "--log-samples"], 2, ["--log-samples needs --output-path"]),
        ([*TRIO, "--batch-size", "0"], 2, ["batch_size must be an integer of at least 1, got 0"]),
        ([*TRIO, "--max-length", "4096"], 2, ["at most 1024, the context of base, got 4096"]),
        ([*TRIO, "--include-path", "no-such-place"], 2, ["--include-path must be a directory"]),
        ([*TRIO, "--gen-kwargs", "num_beams=2"], 1, ["num_beams must be 1"]),
        ([*TRIO, "--apply-chat-template"], 1, ["a tokenizer with a chat template"]),
        ([*TRIO, "--output-path", "/dev/null/results"], 1, ["Not a directory"]),
        ([], 2, ["no models"]),
        (["--base", "no-such-model"], 1, ["base"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(folder, arguments, code, words):
    own = [] if "--include-path" in arguments else ["--include-path", folder]
    result = invoke("eval", "--tasks", "local_answer", *own, *arguments)
    assert_one_sentence(result, code, *words, logs=True)


def test_without_lm_eval(monkeypatch, folder):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = invoke("eval", "--tasks", "a", "--trio", "shipped")
    assert_one_sentence(result, 1, "evaluation needs lm_eval", "proxytune_kernels[eval]", logs=True)


def test_an_unknown_task(monkeypatch, folder):
    import lm_eval.tasks

    # lm_eval's own tasks are thousands of files.
    class OwnTasksOnly(lm_eval.tasks.TaskManager):  # type: ignore[misc]
        def __init__(self, include_path: str | None, include_defaults: bool) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", OwnTasksOnly)
    result = invoke("eval", "--tasks", "local_answer,nope", "--include-path", folder, *TRIO)
    assert_one_sentence(result, 2, "--tasks has no such task: nope", logs=True)


def test_strengths():
    assert strengths(None) == [1.0]
    assert strengths(["0:0.1:0.3", "0.2", "2"]) == [0.0, 0.1, 0.2, 0.3, 2.0]
    assert strengths(["1:-0.5:-0.6"]) == [1.0, 0.5, 0.0, -0.5]
    assert strengths("0.5") == strengths(0.5) == [0.5]


def test_values_of_model_args():
    assert [_value(text) for text in ("8", "-1", "True", "none", "0.5", "a/b")] == [
        8, -1, True, None, "0.5", "a/b"
    ]  # fmt: skip
