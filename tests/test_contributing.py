"""The files that CONTRIBUTING.md names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = sorted(
    set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:md|toml|txt|cff))`",
                   (ROOT / "CONTRIBUTING.md").read_text()))
)  # fmt: skip


def test_files_are_named():
    assert len(NAMED) > 20


@pytest.mark.parametrize("name", NAMED)
def test_a_named_file_exists(name):
    places = (ROOT, ROOT / "proxytune_kernels", ROOT / "benchmarks", ROOT / "csrc")
    assert any((place / name).exists() for place in places)
