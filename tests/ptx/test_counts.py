"""Stored counts are read back as they were written, and what gets worse is told."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.ptx.counts import CLIFF, Case, Cost, cases, read, table, worse

SELECT = Cost(8_000, 200, 0.06)


def test_a_table_is_read_as_it_was_written():
    one = {"scan": Cost(990, 8, 1.01), "select": SELECT, "draw": Cost(CLIFF + 1, 9_000, 12.5)}
    idle = {"scan": Cost(990, 8, 1.01), "select": SELECT, "draw": Cost(46, 0, 0.0)}
    costs = {Case("peaked", "top_k=65", 0, 1): one, Case("flat", "none", 5, 1): idle}
    text = table(costs)
    assert "| 400,000+ |" in text
    assert read(text) == {
        "peaked top_k=65 B=1": one | {"draw": Cost(CLIFF, 9_000, 12.5)},
        "flat none top_logprobs=5 B=1": {"scan": idle["scan"], "select": SELECT},
    }


def test_names_of_cases_differ():
    names = [str(case) for case in cases()]
    assert len(set(names)) == len(names) > 200


@pytest.mark.parametrize(
    ("now", "said"),
    [({}, []),
     ({"select": Cost(8_100, 203, 0.07)}, []),  # within 2%
     ({"select": Cost(9_000, 200, 0.06)}, ["9,000 instructions of the longest program, were 8,000",
                                           "9,000 instructions of the longest programs of all"]),
     ({"select": Cost(7_000, 300, 0.06)}, ["300 their barriers"]),
     ({"select": Cost(4_000, 90, 0.06), "draw": Cost(4_000, 90, 0.06)}, ["0.12 reads"]),
     ({"select": Cost(4_000, 90, 0.01), "draw": Cost(3_900, 90, 0.01)}, [])],
)  # fmt: skip
def test_what_is_worse(now, said):
    found = list(worse({"select": SELECT} | now, {"select": SELECT}))
    assert len(found) == len(said)
    assert all(text.startswith(start) for text, start in zip(found, said, strict=True)), found


def test_cliffs_are_compared_as_cliffs():
    cliff = {"draw": Cost(CLIFF + 1, 9_000, 12.5)}
    assert not list(worse({"draw": Cost(CLIFF + 1, 20_000, 30.0)}, cliff))
    assert list(worse(cliff, {"draw": SELECT}))
