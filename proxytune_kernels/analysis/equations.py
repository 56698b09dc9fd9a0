r"""The sides of the equations in a text, by characters: which tokens it has does not matter.

An equation is a calculation (numbers with an operator between any two), an equals sign, and a
number or a calculation; in ``2 + 3 + 4 = 5 + 4 = 9`` what is behind the first equals sign is the
right side. A unit of one word may stand behind a number (``3 apples + 4 apples = 7 apples``): it
is no part of a side, nor are spaces and the equals signs.

Liu et al. 2024 (arXiv 2401.08565, section 6.1) compare how much probability steering adds to
tokens of either side. Their program looks for a token that is ``=`` and for tokens of digits or
of ``,$€+-x*/`` beside it; in a vocabulary that writes `` =`` as one token, it finds none.
"""

from __future__ import annotations

import re

# Possessive: a text can't make the search go back and forth.
_NUMBER = r"\(*+[-+−]?[$€£]?\d++(?:[.,]\d++)*+%?\)*+"
_TERM = _NUMBER + r"(?:[ ]?[^\W\d_]{2,}+)?+"
_OPERATOR = r"\s*+(?:[-+−–*/×÷·x^]|\\times|\\cdot|\\div)\s*+"
_SIDE = re.compile(rf"{_TERM}(?:({_OPERATOR}){_TERM})*+")
_CHAIN = re.compile(rf"(?<![\w.,(]){_SIDE.pattern}(?:\s*+=\s*+{_SIDE.pattern})*+")
_UNCOUNTED = re.compile(r"(\\[a-z]+)|\s+|[^\W\d_]{2,}")

LEFT, RIGHT = "left", "right"


def sides(text: str) -> list[str | None]:
    """For each character, the side of an equation that it is on; None where it is on none."""
    found: list[str | None] = [None] * len(text)
    for chain in _CHAIN.finditer(text):
        parts = list(_SIDE.finditer(text, *chain.span()))
        calculation = next((i for i, part in enumerate(parts) if part[1]), len(parts))
        if calculation + 1 >= len(parts):
            continue  # nothing is calculated, or no result follows
        for part in parts[calculation:]:
            side = LEFT if part is parts[calculation] else RIGHT
            found[part.start() : part.end()] = [side] * len(part[0])
            for skipped in _UNCOUNTED.finditer(text, *part.span()):
                if not skipped[1]:
                    found[skipped.start() : skipped.end()] = [None] * len(skipped[0])
    return found
