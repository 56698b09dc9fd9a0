"""Sharded draws are the unsharded ones, bit for bit, on every rank."""

from __future__ import annotations

import re

import pytest

from proxytune_kernels import kernels
from tests.ops.conftest import USABLE
from tests.ops.sharded import ranks
from tests.ops.sharded.cases import CASES, SPLITS
from tests.ops.sharded.checks import CHECKS, DRAFTS, ROWS

pytestmark = pytest.mark.slow

cpu = pytest.mark.skipif("cpu" not in USABLE, reason="the C++ extension is not built")
WORLDS = [
    pytest.param((backend, size), id=f"{backend}-{size}", marks=cpu if backend == "cpu" else ())
    for backend, sizes in (("cpu", SPLITS), ("reference", (1, 4)))
    for size in sizes
]


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_draws_as_the_whole_row(world, tmp_path):
    """All cases at once: starting processes takes longer than they do."""
    backend, size = world
    found = ranks.run(size, list(CASES), [], backend, tmp_path / "ranks").differences
    wrong = [f"{name}, {text}" for name, texts in found.items() for text in texts]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.triton
@pytest.mark.skipif(
    not kernels.interpreted(), reason="for Triton's interpreter (make interpret): ranks share a CPU"
)
def test_ranks_on_triton_kernels(tmp_path):
    names = [name for name in CASES if name.startswith("few-")]
    found = ranks.run(2, names, [], "triton", tmp_path / "ranks").differences
    wrong = [f"{name}, {text}" for name, texts in found.items() for text in texts]
    assert not wrong, "\n\n".join(wrong)


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    return ranks.run(2, [], list(CHECKS), "cpu", tmp_path_factory.mktemp("checks") / "all").checks


WORDS, SUMMARY, KEY = 40, 8, 8  # bytes a row


@cpu
@pytest.mark.parametrize(
    ("name", "candidates"),
    [("none", 0), ("greedy", 0), ("min-p", 0), ("top-k", 20), ("top-p", 128), ("promised-none", 0),
     ("promised-top-k", 20)],
)  # fmt: skip
def test_bytes_a_row(checks, name, candidates):
    """And under a promise the host reads nothing that a device would have to be waited for."""
    for one in checks:
        sent, reads = one["traffic"][name]
        assert sent == [ROWS * SUMMARY, ROWS * (WORDS + candidates * KEY)]
        assert reads == 0 or not name.startswith("promised")


@cpu
def test_bytes_a_flat_row(checks):
    """Samples, a histogram, the tokens between two edges, a histogram, and the draw."""
    for one in checks:
        sent, _ = one["traffic"]["flat"]
        search = [1024 // 2 * KEY, 2 * 8 * 1024, 1024 * KEY, 2 * 8 * 1024, WORDS]
        assert sent == [ROWS * size for size in (SUMMARY, WORDS + 128 * KEY, *search)]


@cpu
def test_bytes_of_verification(checks):
    at = ROWS * (DRAFTS + 1)
    for one in checks:
        assert one["traffic"]["coupled"] == ([at * SUMMARY, at * WORDS], 0)
        drafts, residual = ROWS * DRAFTS, ROWS * 16
        wanted = WORDS + KEY
        expected = [at * SUMMARY, at * wanted, drafts * SUMMARY, drafts * wanted, residual]
        assert one["traffic"]["rejection"] == (expected, 0)


@cpu
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gap", r"ValueError: .*leave a gap: vocab_start of rank 1 must be 10, got 11"),
        ("overlap", r"ValueError: .*overlap: vocab_start of rank 1 must be 10, got 9"),
        ("none", r"ValueError: .*sizes must add up to \[1, 2\^19\], got 0"),
        ("wide", r"ValueError: .*sizes must add up to \[1, 2\^19\], got 1048576"),
        ("backends", r"ValueError: .*backend must be the same on all ranks.*'cpu', 'reference'"),
    ],
)
def test_ranks_that_do_not_agree_all_say_so(checks, name, text):
    for one in checks:
        assert re.search(text, one["refusals"][name]), one["refusals"][name]


@cpu
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("one-is-wrong", "ValueError: Shard.agree: vocab_start must be an integer >= 0, got -1"),
        ("one-can-not", "RuntimeError: sharded: backend 'cuda' can't run"),
    ],
)
def test_no_rank_waits_for_one_that_refused(checks, name, own):
    assert checks[1]["refusals"][name].startswith(own)
    other = "RuntimeError: Shard.agree: rank 1 refused its arguments"
    assert checks[0]["refusals"][name] == other


@cpu
def test_rows_that_break_a_promise_are_said_to(checks):
    for one in checks:
        found = one["promises"]
        assert found["status"] == [0, 8, 8, 0, 0, 0]
        assert [token >= 0 for token in found["tokens"]] == [s == 0 for s in found["status"]]
        for column in found["differ"]:
            assert not any(column[row] for row in (0, 3, 4, 5))
        assert found["verified"] == [0, 8, 8, 0, 0, 0]
        assert all(found["accepted"][row] == 0 for row in (1, 2))
        assert found["drafted"] == [0, 8, 8, 0, 0, 0] and found["drafts accepted"][1] == 0
        for column in found["verify differs"]:
            assert not any(column[row] for row in (0, 3, 4, 5))


@cpu
def test_parameters_as_requests_and_keywords(checks):
    for one in checks:
        for name, columns in one["requests"].items():
            assert not any(any(column) for column in columns), name
