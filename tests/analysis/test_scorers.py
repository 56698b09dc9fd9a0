"""Scorers: what they make of texts and rows whose score is plain to see."""

from __future__ import annotations

import pytest

from proxytune_kernels.analysis.scorers import (
    GivenScorer,
    Likelihood,
    TextScorer,
    choice,
    exact_match,
    likelihood,
    scorer_of,
)


@pytest.mark.parametrize(
    ("pattern", "text", "answer", "score"),
    [
        (r"####\s*(-?\d+)", " 3 + 4 = 7\n#### 7\n#### 8", "7", 1),
        (r"####\s*(-?\d+)", "#### 8\n#### 7", 7, 0),
        (r"####\s*(-?\d+)", "7", 7, 0),
        (r"\d+", "it is 12", " 12 ", 1),
        (r"(yes)|no", "no", "no", 0),
    ],
)
def test_exact_match(pattern, text, answer, score):
    assert exact_match(pattern)(text, {"answer": answer}) == score


def test_given_texts():
    found = [Likelihood(-4.0, 8), Likelihood(-2.0, 1), Likelihood(-2.0, 2)]
    row = {"choices": ["a", "b", "c"], "completion": "a"}
    assert choice().texts(row) == ["a", "b", "c"]
    assert choice()(found, {**row, "answer": 1}) == choice()(found, {**row, "answer": "b"}) == 1
    assert choice()(found, {**row, "answer": 0}) == 0
    assert likelihood().texts(row) == ["a"]
    assert likelihood()(found, row) == -0.5


def test_names(monkeypatch, tmp_path):
    (tmp_path / "own_scorer.py").write_text(
        "def length(text, row):\n    return len(text)\nother = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = scorer_of("own_scorer:length")
    assert isinstance(own, TextScorer) and own("abc", {}) == 3
    assert isinstance(scorer_of("choice"), GivenScorer)
    assert scorer_of("regex:a:b").name == "regex:a:b"
    for wrong, words in (
        ("exact", "must be regex:PATTERN"),
        ("regex:", "must be regex:PATTERN"),
        ("regex:(", "must be a regular expression"),
        ("own_scorer:none", "must be a function in a module"),
        ("no_such_module:f", "must be a function in a module"),
        ("own_scorer:other", "must be a function, got 'own_scorer:other', int"),
    ):
        with pytest.raises(ValueError, match=words):
            scorer_of(wrong)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda text, row: None, "fails: TypeError"),
        (lambda text, row: row["x"], "fails: KeyError: 'x'"),
        (lambda text, row: float("nan"), "must give a finite number, got nan"),
    ],
)
def test_a_score_that_is_none(score, words):
    with pytest.raises(ValueError, match=words):
        TextScorer("own", score)("a", {})
    with pytest.raises(ValueError, match="a row must have 'answer', got 'prompt'"):
        exact_match("a")("a", {"prompt": ""})
    with pytest.raises(ValueError, match="index of one of 2, got 2"):
        choice()([Likelihood(0, 1)] * 2, {"choices": ["a", "b"], "answer": 2})
