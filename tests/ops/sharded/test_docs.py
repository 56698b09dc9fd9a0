"""The example of docs/sharded.md runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.documents import ROOT, examples


def test_the_example_of_the_documentation(tmp_path):
    [code] = examples("docs/sharded.md", "python")
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        check=False, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens = re.findall(r"rank (\d): tokens (\[.*\])", done.stdout)
    assert sorted(rank for rank, _ in tokens) == ["0", "1"]
    assert tokens[0][1] == tokens[1][1]
