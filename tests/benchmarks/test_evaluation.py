"""benchmarks.evaluation: a difference is noticed, and documents repeat."""

import pytest

from benchmarks import evaluation
from benchmarks.evaluation import CONTEXT_TOKENS, compare, make_documents
from benchmarks.harness.memory import in_fresh_process


def test_answers_that_rounding_does_not_explain_are_an_error():
    ours, theirs = [(-1.0, True), (-2.0, False)], [(-1.0, True), (-2.1, True)]
    assert compare(ours, theirs, [1, 2], 0.06)["differing_greedy"] == 1
    with pytest.raises(RuntimeError, match=r"differ by up to 0\.0[0-9]+ per token"):
        compare(ours, theirs, [1, 2], 0.04)


def test_documents_share_a_context_and_repeat():
    one, other = (make_documents("shipped", 12, 3) for _ in range(2))
    assert [[r.args for r in d] for d in one] == [[r.args for r in d] for d in other]
    for document in one:
        assert len({request.args[0] for request in document}) == 1
        words = len(document[0].args[0].split())
        assert CONTEXT_TOKENS[0] <= words <= CONTEXT_TOKENS[1]


@pytest.mark.slow
def test_command(records_of, monkeypatch):
    peaks: list[dict[str, int]] = []

    def measured_once(*given):  # a process takes 6 s
        peaks.extend([] if peaks else [in_fresh_process(*given)])
        return peaks[0]

    monkeypatch.setattr(evaluation, "in_fresh_process", measured_once)
    (ours, hflm), _ = records_of(
        evaluation.main, "--trio", "shipped", "--documents", 10, "--choices", 2, "--batch-size", 4,
        "--threads", 1,
    )  # fmt: skip
    assert (ours["provider"], hflm["provider"], ours["requests"]) == ("ours", "HFLM", 20)
    assert 0 < ours["worst_difference_per_token"] < 1e-4
    assert ours["block_seconds"]["count"] == evaluation.BLOCKS
    assert hflm["speed_over_hflm"]["median"] == 1
    assert ours["memory"]["total_bytes"] > ours["memory"]["extra_bytes"] > 0
