"""Looks at a page in headless Chromium; skips where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
MISSING = [
    name
    for name, there in {
        "Chromium (Debian: apt install chromium)": CHROMIUM,
        "node (Debian: apt install nodejs)": shutil.which("node"),
        "playwright-core and axe-core (make page installs them)": (HERE / "node_modules").exists(),
    }.items()
    if not there
]


def look(script: str, url: str, folder: Path) -> Any:
    """What a script of this folder found at a URL, window by window."""
    if MISSING:
        pytest.skip(f"the page is not looked at: {', '.join(MISSING)} is missing")
    done = subprocess.run(
        ["node", script, url, str(CHROMIUM), str(folder)],
        cwd=HERE, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
