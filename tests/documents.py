"""The examples of the documentation, as text to run: they are tests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def examples(document: str, language: str) -> list[str]:
    """A document's fenced blocks of one language, such as ``("docs/trio.md", "python")``."""
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```", text, re.S | re.M)


def run_example(folder: Path, code: str, *shell: str, timeout: int = 120, **env: str) -> str:
    """What an example prints, run in a folder: Python's, or of a shell such as ("bash", "-ec")."""
    script = folder / "example.py"
    script.write_text(code)
    commands = Path(sys.executable).parent  # where proxytune is
    offline = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*shell, code] if shell else [sys.executable, script], capture_output=True, text=True,
        check=False, cwd=folder, timeout=timeout,
        env={"PATH": f"{commands}:/usr/bin:/bin", **offline, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
