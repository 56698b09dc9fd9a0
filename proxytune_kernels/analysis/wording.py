"""Figures and tokens as people read them, in a terminal and on a page."""

from __future__ import annotations

import json
import math

from proxytune_kernels.analysis.intervals import Interval
from proxytune_kernels.analysis.tokens import MOVED_BITS, Analysed, Token

LEAST = 0.01
"""Probability from which an alternative is shown."""

NO_INTERVAL = "With one prompt nothing is known of the spread: there are no intervals."


def percent(p: float) -> str:
    """A probability: no more digits than say something."""
    if math.isnan(p):
        return "not run"
    if p >= 0.0995:
        return f"{100 * p:.0f}%"
    if p >= 0.0005:
        return f"{100 * p:.1f}%"
    return "< 0.1%" if p > 0 else "0%"


def share(figure: Interval) -> str:
    """A share in percent, with its interval where it has one."""
    ends = "" if math.isnan(figure.low) else f" [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
    return f"{100 * figure.value:.1f}%{ends}"


def signed(figure: Interval) -> str:
    """A difference of probabilities, with its interval where it has one."""
    ends = "" if math.isnan(figure.low) else f" [{figure.low:+.3f}, {figure.high:+.3f}]"
    return f"{figure.value:+.3f}{ends}"


def plain(figure: Interval) -> str:
    """Any other figure likewise."""
    ends = "" if math.isnan(figure.low) else f" [{figure.low:.2f}, {figure.high:.2f}]"
    return f"{figure.value:.2f}{ends}"


def quoted(text: str) -> str:
    """A token in quotes: spaces and new lines show."""
    return json.dumps(text, ensure_ascii=False)


def label(analysed: Analysed) -> str:
    """The prompt as text."""
    prompt = analysed.prompt
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def moved_most(analysed: Analysed, count: int) -> list[Token]:
    """The tokens that steering moved most, each spelling once, in their order."""
    most: dict[int, Token] = {}
    for token in sorted(analysed.tokens, key=lambda token: -abs(token.added)):
        if abs(token.moved) >= MOVED_BITS and len(most) < count:
            most.setdefault(token.token_id, token)
    return [token for token in analysed.tokens if most.get(token.token_id) is token]


def strengths(analysed: Analysed) -> str:
    """The alpha of a text."""
    alphas = [analysed.alpha] if isinstance(analysed.alpha, float | int) else analysed.alpha
    return ", ".join(f"{alpha:g}" for alpha in alphas)
