"""The examples of the documentation, as text to run: they are tests."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def examples(document: str, language: str) -> list[str]:
    """A document's fenced blocks of one language, such as ``("docs/trio.md", "python")``."""
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```", text, re.S | re.M)
