"""The examples of docs/lm_eval.md run as they stand, and print what it shows."""

from __future__ import annotations

from typing import Any

import pytest

from tests.documents import ROOT, examples, run_example


@pytest.mark.slow
def test_the_examples_of_the_documentation(tmp_path):
    [script] = examples("docs/lm_eval.md", "sh")
    [code] = examples("docs/lm_eval.md", "python")
    env: Any = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "timeout": 240}
    printed = run_example(tmp_path, script, "bash", "-e", "-c", **env)
    shown = (ROOT / "docs/lm_eval.md").read_text()
    tables = [line.removeprefix("    ") for line in shown.splitlines() if "    |" in line]
    assert [line for line in printed.splitlines() if line.startswith("|")] == tables
    for alpha in ("0", "0.5", "1"):
        assert len(list((tmp_path / f"results/shipped-alpha-{alpha}").glob("results_*.json"))) == 1
    assert run_example(tmp_path, code, **env).splitlines() == ["0.0 0.0", "0.5 1.0", "1.0 1.0"]
