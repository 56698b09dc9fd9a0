"""Sharded draws are the unsharded ones, bit for bit, on every rank."""

from __future__ import annotations

import pytest

from tests.ops.conftest import USABLE
from tests.sharded import ranks
from tests.sharded.cases import CASES, SPLITS

BACKENDS = [name for name in ("cpu", "reference") if name in USABLE]


@pytest.fixture(scope="module", params=[(b, w) for b in BACKENDS for w in SPLITS], ids=str)
def world(request, tmp_path_factory):
    backend, size = request.param
    folder = tmp_path_factory.mktemp("ranks") / "all"
    return ranks.run(size, list(CASES), backend, folder)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_unsharded(world, name):
    assert not world[name], "\n\n".join(world[name])
