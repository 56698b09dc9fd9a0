"""Every figure of a summary, on two texts that are made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from proxytune_kernels.analysis.summaries import Kinds, Summary, summarise
from proxytune_kernels.analysis.tokens import Analysed, Token
from proxytune_kernels.decoder import Steering

END = "<end>"
# (token, base, proxy, whether the likeliest token changed); what is added is their difference.
TEXTS: Any = [
    [(" 3", 0.1, 0.6, 1), (" +", 0.2, 0.9, 1), (" 4", 0.3, 0.7, 0), (" =", 0.5, 0.9, 1),
     (" 7", 0.4, 0.8, 0), ("\n", 0.9, 0.8, 0), ("so", 0.1, 0.3, 1), (" sorry", 0.5, 0.4, 0),
     (END, 0.2, 0.9, 1)],
    [(" 9", 0.2, 0.6, 1), (" -", 0.1, 0.9, 1), (" 4", 0.6, 0.7, 0), (" =", 0.7, 0.9, 0),
     (" 7", 0.4, 0.8, 1), ("\n", 0.8, 0.7, 0), ("so", 0.2, 0.1, 0), (" apples", 0.3, 0.2, 1)],
]  # fmt: skip
KL = (1.0, 0.5)  # of all tokens of a text; of the end nothing is known
NAN = math.nan


def analysed(index: int) -> Analysed:
    ids = {name: i for i, name in enumerate(sorted({t[0] for text in TEXTS for t in text}))}
    tokens, start = [], 0
    for name, base, proxy, changed in TEXTS[index]:
        kl = NAN if name == END else KL[index]
        steering = Steering(base, 0.5, 0.5, proxy, 1 + changed, bool(changed), kl)
        text = "" if name == END else name
        tokens.append(Token(ids[name], name, text, start, steering, ()))
        start += len(text)
    return Analysed(index, "?", tuple(tokens), 1.0)


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise([analysed(0), analysed(1)])


def same(figure: Any, *wanted: float) -> None:
    """Its value and its interval's ends.

    Of two prompts each is drawn twice in a quarter of the draws, so the ends are their own values.
    """
    assert figure == pytest.approx(wanted, nan_ok=True)


def test_all(summary):
    assert (summary.prompts, summary.texts, summary.all.tokens) == (2, 2, 17)
    same(summary.all.changed, 9 / 17, 4 / 8, 5 / 9)
    same(summary.all.added, 4.7 / 17, 1.6 / 8, 3.1 / 9)
    same(summary.kl, 0.75, 0.5, 1.0)


def test_by_position(summary):
    rows = {row.name: row for row in summary.positions}
    assert [(row.name, row.tokens) for row in rows.values()] == [
        ("1", 2), ("2 to 4", 6), ("5 to 16", 9),
    ]  # fmt: skip
    same(rows["1"].changed, 1, 1, 1)
    same(rows["1"].added, 0.45, 0.4, 0.5)
    same(rows["2 to 4"].changed, 3 / 6, 1 / 3, 2 / 3)
    same(rows["2 to 4"].added, 2.6 / 6, 1.1 / 3, 1.5 / 3)
    same(rows["5 to 16"].changed, 4 / 9, 2 / 5, 2 / 4)
    same(rows["5 to 16"].added, 1.2 / 9, 0.1 / 4, 1.1 / 5)


def test_by_kind_of_word(summary):
    rows = {row.name: row for row in (*summary.groups, *summary.parts)}
    counts = {name: row.tokens for name, row in rows.items()}
    assert counts == {
        "reasoning": 12, "style": 4, "content": 1,
        "number": 6, "calculation": 4, "connective": 2, "manner": 1, "layout": 3, "content word": 1,
    }  # fmt: skip
    same(rows["number"].added, 2.2 / 6, 0.9 / 3, 1.3 / 3)
    same(rows["calculation"].added, 2.1 / 4, 1.0 / 2, 1.1 / 2)
    same(rows["connective"].added, 0.05, -0.1, 0.2)
    same(rows["connective"].changed, 0.5, 0, 1)
    same(rows["layout"].added, 0.5 / 3, -0.1, 0.6 / 2)
    same(rows["reasoning"].added, 4.4 / 12, 1.8 / 6, 2.6 / 6)
    same(rows["style"].added, 0.4 / 4, -0.1, 0.5 / 3)
    # One prompt has it: nothing is known of its spread.
    same(rows["content"].added, -0.1, NAN, NAN)
    names = [row.name for row in summary.by_kind()]
    assert names == [
        "reasoning", "  number", "  calculation", "  connective", "style", "  manner", "  layout",
        "content",
    ]  # fmt: skip


def test_sides_of_equations(summary):
    left, right = summary.sides
    assert (left.name, left.tokens, right.name, right.tokens) == ("left side", 6, "right side", 2)
    same(left.added, 2.9 / 6, 1.3 / 3, 1.6 / 3)
    same(right.added, 0.4, 0.4, 0.4)
    same(summary.left_minus_right, 2.9 / 6 - 0.4, 1.3 / 3 - 0.4, 1.6 / 3 - 0.4)


def test_extremes_and_their_contexts(summary):
    assert summary.least_prompts == 2
    up = [(e.token, e.tokens, e.prompts, e.context, e.context_count) for e in summary.promoted]
    assert up == [
        (" 7", 2, 2, "4 = 7 \u21b5 so", 2),
        (" =", 2, 2, "4 = 7 \u21b5 so", 2),
        (" 4", 2, 2, "4 = 7 \u21b5 so", 2),
        ("so", 2, 2, "4 = 7 \u21b5 so", 2),
    ]
    for extreme, wanted in zip(
        summary.promoted, [(0.4, 0.4, 0.4), (0.3, 0.2, 0.4), (0.25, 0.1, 0.4), (0.05, -0.1, 0.2)],
        strict=True,
    ):  # fmt: skip
        same(extreme.added, *wanted)
    [down] = summary.suppressed
    assert (down.token, down.context, down.context_count) == ("\n", "= 7 \u21b5 so sorry", 1)
    same(down.added, -0.1, -0.1, -0.1)


def test_a_token_is_what_its_first_ink_is():
    first = analysed(0)
    # The same text in other tokens: what is said of its characters stays.
    one = first.tokens[0]
    pieces = [" 3 ", "+ 4", " =", " ", "7\n", "so sorry"]
    tokens, start = [], 0
    for piece in pieces:
        tokens.append(one._replace(token=piece, text=piece, start=start))
        start += len(piece)
    half = one._replace(token="bytes:\\xe2", text="", start=0)
    kinds = Kinds.of(replace(first, tokens=(half, *tokens)))
    assert kinds.sides == [None, "left", "left", None, None, "right", None]
    assert kinds.parts == [
        "layout", "number", "calculation", "calculation", "layout", "number", "connective",
    ]  # fmt: skip


def test_outputs_of_one_prompt_are_drawn_together(summary):
    alone = summarise([analysed(0), replace(analysed(1), index=0, sample=1)])
    assert (alone.prompts, alone.texts, alone.least_prompts) == (1, 2, 1)
    same(alone.all.changed, 9 / 17, NAN, NAN)
    assert alone.promoted[0].token == " -"
    with pytest.raises(ValueError, match="texts must have a token"):
        summarise([replace(analysed(0), tokens=())])
