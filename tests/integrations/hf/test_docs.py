"""The examples of docs/transformers.md run as they stand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.documents import ROOT, examples

pytestmark = pytest.mark.slow

EXAMPLES = examples("docs/transformers.md", "python")


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_of_the_documentation(code, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_there_is_an_example():
    assert "ProxyTunedForCausalLM.from_trio" in EXAMPLES[0]
