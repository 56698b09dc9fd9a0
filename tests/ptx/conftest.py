"""What these tests need: Triton, g++, and no interpreter in their place."""

from __future__ import annotations

import os

import pytest

from tests.ptx import build


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = build.missing()
    if os.environ.get("TRITON_INTERPRET"):
        reason = "TRITON_INTERPRET is set: nothing is compiled"
    for item in items:
        if reason is not None and item.path.parent == build.HERE:
            item.add_marker(pytest.mark.skip(reason=reason))
