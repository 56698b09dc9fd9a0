"""Whole tasks from local files through lm_eval's evaluation: its own model's results, and ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from proxytune_kernels.integrations.lm_eval_model import (
    ProxyTuneLM,
    document_scores,
    evaluate_alphas,
)
from tests.integrations.lm_eval.conftest import write_tasks
from tests.integrations.lm_eval.test_hflm import per_token

pytestmark = pytest.mark.slow

TASKS = ["local_choice", "local_text", "local_answer"]
ALPHA = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def run(lm: Any, folder: Path, **arguments: Any) -> Any:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = arguments.pop("tasks", TASKS)
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **arguments)


def assert_same(own: Any, other: Any, bound: float) -> None:
    """Every response, and every figure of the results."""
    for task, samples in other["samples"].items():
        for ours, theirs in zip(own["samples"][task], samples, strict=True):
            assert ours["arguments"] == theirs["arguments"]
            for [mine], [wanted] in zip(ours["resps"], theirs["resps"], strict=True):
                if isinstance(wanted, tuple):
                    length = sum(map(len, theirs["arguments"][0]))
                    assert mine[0] == pytest.approx(wanted[0], abs=bound * length)
                    assert mine[1] == wanted[1]
                elif isinstance(wanted, float):
                    length = len(theirs["arguments"][0][0])
                    assert mine == pytest.approx(wanted, abs=bound * length)
                else:
                    assert mine == wanted
    for task, figures in other["results"].items():
        for name, wanted in figures.items():
            if isinstance(wanted, float):
                # Perplexities are exp of a mean: a relative error of the mean's.
                assert own["results"][task][name] == pytest.approx(wanted, rel=20 * bound), name
            else:
                assert own["results"][task][name] == wanted


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_fewshot": 2}, {"apply_chat_template": True, "num_fewshot": 1}],
    ids=["plain", "few-shot", "chat"],
)
def test_tasks_give_what_hflm_gives(trio_with_bos, make_hflm, folder, arguments):
    asked = {"system_instruction": "Be short."} if "apply_chat_template" in arguments else {}
    ours = run(ProxyTuneLM(trio_with_bos, alpha=ALPHA, batch_size=4), folder, **arguments, **asked)
    theirs = run(make_hflm(trio_with_bos, ALPHA, batch_size=4), folder, **arguments, **asked)
    assert_same(ours, theirs, per_token(trio_with_bos))


def test_each_alpha_has_its_own_results_in_lm_evals_files(trio, folder, tmp_path):
    lm = ProxyTuneLM(trio, batch_size=4)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    alphas = [0.0, 0.7]
    written: Any = {"name": "tiny", "output_path": str(tmp_path), "log_samples": True}
    asked: Any = {"tasks": TASKS, "task_manager": manager, "bootstrap_iters": 0}
    found = dict(evaluate_alphas(lm, alphas, model_args={"base": "B"}, **written, **asked))
    assert list(found) == alphas
    for alpha in alphas:
        alone = run(ProxyTuneLM(trio, alpha=alpha, batch_size=4), folder)
        assert found[alpha]["results"] == alone["results"]
        [path] = (tmp_path / f"tiny-alpha-{alpha:g}").glob("results_*.json")
        saved = json.loads(path.read_text())
        assert saved["results"].keys() == set(TASKS)
        assert saved["config"]["model"] == saved["model_source"] == "proxytune"
        assert saved["config"]["model_args"] == {"base": "B", "alpha": alpha}
        assert saved["config"]["alpha"] == alpha
        assert saved["config"]["scoring"]["contexts"]["base"].startswith("run once")
        assert saved["max_length"] == lm.max_length
        for task in TASKS:
            [lines] = (tmp_path / f"tiny-alpha-{alpha:g}").glob(f"samples_{task}_*.jsonl")
            assert len(lines.read_text().splitlines()) == len(alone["samples"][task])
    assert found[0.0]["results"] != found[0.7]["results"]


def test_scores_of_each_document(trio, folder):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = ProxyTuneLM(trio, batch_size=4)
    asked: dict[str, Any] = {"task_manager": manager, "limit": 5}
    metric, scores = document_scores(lm, [0.0, 1.5], "local_choice", "acc_norm", **asked)
    runs = evaluate_alphas(lm, [0.0, 1.5], tasks=["local_choice"], bootstrap_iters=0, **asked)
    means = [results["results"]["local_choice"]["acc_norm,none"] for _, results in runs]
    assert metric == "acc_norm" and [len(own) for own in scores] == [5, 5]
    assert [sum(own) / 5 for own in scores] == pytest.approx(means)
    for task, wrong, words in (
        ("local_choice", "f1", "must have the metric 'f1', it has acc, acc_norm"),
        ("local_text", None, "word_perplexity of local_text must be a number for each document"),
    ):
        with pytest.raises(ValueError, match=words):
            document_scores(lm, [0.0], task, wrong, **asked)
