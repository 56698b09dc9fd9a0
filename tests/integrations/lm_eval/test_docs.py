"""The examples of docs/lm_eval.md run as they stand, and print what it shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, examples


@pytest.mark.slow
def test_the_examples_of_the_documentation(tmp_path):
    [script] = examples("docs/lm_eval.md", "sh")
    [code] = examples("docs/lm_eval.md", "python")
    commands = Path(sys.executable).parent  # where proxytune is
    environment = {
        "PATH": f"{commands}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False,
            env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run("bash", "-e", "-c", script)
    shown = (ROOT / "docs/lm_eval.md").read_text()
    tables = [line.removeprefix("    ") for line in shown.splitlines() if "    |" in line]
    assert [line for line in printed.splitlines() if line.startswith("|")] == tables
    for alpha in ("0", "0.5", "1"):
        assert len(list((tmp_path / f"results/shipped-alpha-{alpha}").glob("results_*.json"))) == 1
    assert run(sys.executable, "-c", code).splitlines() == ["0.0 0.0", "0.5 1.0", "1.0 1.0"]
