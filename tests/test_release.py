"""What a release says of itself in several places agrees; notebooks have no outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import proxytune_kernels as ptk

ROOT = Path(__file__).parents[1]


def test_one_version():
    """The package's own is the one that setuptools reads."""
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    released = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert cited and cited[1] == ptk.__version__ == released[0]


def test_notebooks_have_no_outputs():
    notebooks = [json.loads(p.read_text()) for p in (ROOT / "docs/notebooks").glob("*.ipynb")]
    cells = [cell for n in notebooks for cell in n["cells"] if cell["cell_type"] == "code"]
    assert len(notebooks) == 2 and cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
