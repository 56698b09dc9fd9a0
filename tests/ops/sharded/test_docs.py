"""The example of docs/sharded.md runs as it stands."""

from __future__ import annotations

import re

from tests.documents import examples, run_example


def test_the_example_of_the_documentation(tmp_path):
    [code] = examples("docs/sharded.md", "python")
    tokens = re.findall(r"rank (\d): tokens (\[.*\])", run_example(tmp_path, code))
    assert sorted(rank for rank, _ in tokens) == ["0", "1"]
    assert tokens[0][1] == tokens[1][1]
