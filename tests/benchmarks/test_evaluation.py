"""The evaluation benchmark: both answer the same documents, and a difference is noticed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import evaluation
from benchmarks.evaluation import Block, Settings, measure
from benchmarks.evaluation_cases import CONTEXT_TOKENS, make_documents


def test_both_answer_every_document_once():
    records, check = measure(Settings("shipped", None, 1, 10, 2, 4, 1))
    assert [record["provider"] for record in records] == ["ours", "HFLM"]
    assert check["requests"] == 20
    assert 0 < check["worst_difference_per_token"] < 1e-4
    for record in records:
        assert record["seconds"] > 0 and record["block_seconds"]["count"] == evaluation.BLOCKS
    assert records[1]["speed_over_hflm_seconds"]["median"] == 1


def test_answers_that_rounding_does_not_explain_are_an_error():
    ours = Block([(-1.0, True), (-2.0, False)], 1.0, 1.0)
    theirs = Block([(-1.0, True), (-2.1, False)], 1.0, 1.0)
    with pytest.raises(RuntimeError, match="differ by up to 0.0[0-9]+ per token"):
        evaluation._check({"ours": [ours], "HFLM": [theirs]}, [1, 2], torch.float32)


def test_documents_share_a_context_and_repeat():
    one, other = (make_documents("shipped", 12, 3) for _ in range(2))
    assert [[r.args for r in d] for d in one] == [[r.args for r in d] for d in other]
    for document in one:
        assert len({request.args[0] for request in document}) == 1
        words = len(document[0].args[0].split())
        assert CONTEXT_TOKENS[0] <= words <= CONTEXT_TOKENS[1]
