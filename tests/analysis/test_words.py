"""Which words are of which part of speech, and the sides of equations."""

from __future__ import annotations

import time

import pytest

from proxytune_kernels.analysis.equations import sides
from proxytune_kernels.analysis.words import GROUPS, units


def test_parts_of_speech():
    text = "However, Tom's 3 - 1.5 apples (x 2) aren't so - good: 4% of $5\n"
    found = [(text[start:end], part) for start, end, part in units(text) if part != "layout"]
    assert found == [
        ("However", "manner"), (",", "punctuation"), ("Tom's", "content word"), ("3", "number"),
        ("-", "calculation"), ("1.5", "number"), ("apples", "content word"), ("(", "punctuation"),
        ("x", "calculation"), ("2", "number"), (")", "punctuation"), ("aren't", "function word"),
        ("so", "connective"), ("-", "punctuation"), ("good", "content word"), (":", "punctuation"),
        ("4", "number"), ("%", "calculation"), ("of", "function word"), ("$", "calculation"),
        ("5", "number"),
    ]  # fmt: skip
    assert {part for _, part in found} | {"layout"} == set(GROUPS)
    # Every character is of one unit.
    assert "".join(text[start:end] for start, end, _ in units(text)) == text


def shown(text: str) -> str:
    marks = {None: ".", "left": "l", "right": "r"}
    return "".join(marks[side] for side in sides(text))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so 3 + 4 = 7.", "...l.l.l...r."),
        ("<<3+4=7>>7", "..lll.r..."),
        ("12 x $1.5 = $18", "ll.l.llll...rrr"),
        ("2+3+4=5+4=9", "lllll.rrr.r"),
        ("3 apples + 4 apples = 7 apples", "l........l.l..........r......."),
        ("(3 + 4) * 2 = 14 and 5", "ll.l.ll.l.l...rr......"),
        (r"3 \times 4 = 12", r"l.llllll.l...rr"),
        ("x = 7, 10 = 10, a3+4=7, 3 + 4 =", "." * 31),
        ("1,000 - 10% = 900", "lllll.l.lll...rrr"),
        ("4 = 2 + 2 = 4", "....l.l.l...r"),
    ],
)
def test_sides_of_equations(text, wanted):
    assert shown(text) == wanted


def test_a_long_text_takes_no_longer_than_its_length():
    started = time.process_time()
    for text in ("1" * 20_000, "1 " * 20_000, "(" * 20_000, "1+" * 20_000, "a " * 20_000):
        sides(text)
    assert time.process_time() - started < 2  # all of them; going back and forth takes hours
