"""The parts of speech of a text, in three groups: reasoning, style and content.

Liu et al. 2024 (arXiv 2401.08565, section 6.1) conclude that steering moves reasoning and style
more than content. They name tokens and give no rule; this is ours, in the order in which it is
asked, for English text. In other languages every word is a content word.

- *number*: digits, with points and commas between them.
- *calculation*: a sign of arithmetic beside a number (spaces may be between), and words for one.
- *connective*: words that join steps of an argument, or order them.
- *manner*: words that hedge, address the reader, or lead on from one remark to the next.
- *function word*: articles, pronouns, prepositions, auxiliaries and other conjunctions.
- *content word*: all other words.
- *punctuation*: all other signs.
- *layout*: spaces, new lines, and the end of the text.
"""

from __future__ import annotations

import re

GROUPS = {
    "number": "reasoning",
    "calculation": "reasoning",
    "connective": "reasoning",
    "manner": "style",
    "function word": "style",
    "punctuation": "style",
    "layout": "style",
    "content word": "content",
}
"""Part of speech -> group."""

_LISTS = {
    "calculation": """
        plus minus times divided multiplied added subtracted equals equal sum total altogether
        difference product half twice double per percent""",
    "connective": """
        so therefore thus hence because since if then else otherwise first firstly second secondly
        third thirdly next finally lastly now consequently accordingly thereby given suppose assume
        let means implies""",
    "manner": """
        however additionally moreover furthermore besides although though while whereas instead
        nevertheless overall ultimately please sorry thank thanks welcome sure certainly
        course glad happy help hope apologize apologise unfortunately important importantly note
        noting worth recommended advise consider respect respectful respectfully appropriate
        perhaps maybe likely possibly possible generally typically often sometimes usually
        particularly several various common complex here""",
    "function word": """
        a an the this that these those some any each every all both no not none
        i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his
        himself she her hers herself it its itself they them their theirs themselves one ones
        who whom whose which what when where why how there
        and or but nor as than whether until unless about above across after against along among
        around at before behind below beneath beside between beyond by down during except for from
        in inside into near of off on onto out over past through throughout to toward towards
        under up upon with within without
        am is are was were be been being have has had having do does did doing can could may might
        must shall should will would cannot can't don't doesn't didn't isn't aren't wasn't weren't
        won't wouldn't couldn't shouldn't haven't hasn't hadn't i'm i've i'll i'd it's that's
        there's you're you've you'll we're we've we'll they're they've he's she's let's
        also too very just only even more most much many few less least other another such own same
        again already yet still ever never""",
}
_PARTS = {word: part for part, words in _LISTS.items() for word in words.split()}

_UNITS = re.compile(
    r"(?P<number>\d++(?:[.,]\d++)*+)|(?P<word>[^\W\d_]++(?:['’][^\W\d_]++)*+)|(?P<space>\s++)|(?P<sign>.)"
)
_SIGNS = frozenset("+-−–*/×÷x=<>≤≥≈%^$€£")


def units(text: str) -> list[tuple[int, int, str]]:
    """(start, end, part of speech) of all words, numbers, signs and spaces of a text, in order."""
    found = []
    for match in _UNITS.finditer(text):
        kind = match.lastgroup
        if kind == "word" and match[0] != "x":
            part = _PARTS.get(match[0].lower().replace("’", "'"), "content word")
        elif kind in ("sign", "word"):
            other = "punctuation" if kind == "sign" else "content word"
            part = "calculation" if _calculates(text, match.start()) else other
        else:
            part = "layout" if kind == "space" else "number"
        found.append((match.start(), match.end(), part))
    return found


def _calculates(text: str, place: int) -> bool:
    """Whether the sign at a place is one of arithmetic, beside a number."""
    if text[place] not in _SIGNS:
        return False
    before = text[max(0, place - 8) : place].rstrip(" ")[-1:]
    behind = text[place + 1 : place + 9].lstrip(" ")[:1]
    return before.isdigit() or behind.isdigit() or behind in tuple("$€£")
