"""One server for the tests of a process, on the shipped trio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import proxytune_kernels as ptk


@pytest.fixture(scope="session")
def trio32() -> ptk.Trio:
    return ptk.load_trio("shipped", dtype="float32")


@pytest.fixture(scope="session")
def server(trio32: ptk.Trio) -> Iterator[Any]:
    from tests.server.serving import serving

    with serving(ptk.Decoder(trio32)) as running:
        yield running


@pytest.fixture(scope="session")
def reference(trio32: ptk.Trio) -> ptk.Decoder:
    """A decoder of the same trio, of which no server knows."""
    return ptk.Decoder(trio32)
