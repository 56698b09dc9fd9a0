"""An analysis as one HTML page: nothing to fetch, to be read without script, and to be printed."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from proxytune_kernels.analysis import wording
from proxytune_kernels.analysis.summaries import Summary
from proxytune_kernels.analysis.tokens import MOVED_BITS, Analysed, Token

MOST_BYTES = 500_000
"""Of a page, unless its first text alone is longer."""

_MOST_NAMED = 5  # tokens of a text that are named below it
_STRONGER, _STRONGEST = 1.5, 4.0  # bits: as on the server's page


def render(texts: Sequence[Analysed], summary: Summary, title: str) -> str:
    """The page.

    Args:
        texts: the first of them are shown, as many as there is room for; at least one.
        summary: of all of them.
        title: of the page, such as the trio's name.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def spaced(figure: str) -> str:
        """A figure whose interval moves to the next line as one."""
        value, bracket, ends = figure.partition(" [")
        return value + Markup(' <span class="ends">[{}</span>').format(ends) if bracket else value

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"spaced": spaced} | {
        name: getattr(wording, name)
        for name in ("percent", "share", "signed", "plain", "quoted", "label")
    }
    environment.globals |= {
        "isnan": math.isnan,
        "least": wording.percent(wording.LEAST),
        "no_interval": wording.NO_INTERVAL,
    }
    here = files("proxytune_kernels")
    # The same look as the server's page.
    [style] = re.findall(
        r"<style>(.*?)</style>", (here / "server" / "page.html").read_text("utf-8"), re.S
    )
    template = environment.from_string((here / "analysis" / "page.html").read_text("utf-8"))

    def page(count: int) -> str:
        """With the first of the texts."""
        shown = texts[:count]
        return template.render(
            title=title,
            style=style,
            summary=summary,
            alphas=sorted({wording.strengths(text) for text in texts}),
            texts=[(t, list(_marked(t)), wording.moved_most(t, _MOST_NAMED)) for t in shown],
            left_out=len(texts) - count,
            data=_data(shown),
        )

    count = min(len(texts), 1000)
    while (size := len((made := page(count)).encode())) > MOST_BYTES and count > 1:
        count = max(1, min(count - 1, count * MOST_BYTES // size))
    return made


def _data(texts: Sequence[Analysed]) -> str:
    """What the script knows of the tokens, deflated: most of it are digits."""
    alternatives: dict[str, int] = {}
    known = [[_packed(token, alternatives) for token in text.tokens] for text in texts]
    data = json.dumps([list(alternatives), known], separators=(",", ":"))
    return base64.b64encode(zlib.compress(data.encode(), 9)).decode()


def _marked(analysed: Analysed) -> Iterator[tuple[str, str]]:
    """(classes, text) of each token: u is up, d down, 1 to 3 how far, c changed, e without text."""
    for token in analysed.tokens:
        size = abs(token.moved)
        classes = []
        if size >= MOVED_BITS:
            strength = 1 + (size >= _STRONGER) + (size >= _STRONGEST)
            classes.append(f"{'u' if token.moved > 0 else 'd'}{strength}")
        if token.steering.changed:
            classes.append("c")
        if not token.text:
            classes.append("e")
        text = token.text.replace("\n", "\u21b5\n") if token.text else token.token
        yield " ".join(classes), text


def _packed(token: Token, alternatives: dict[str, int]) -> list[Any]:
    """Of a token: base, expert, anti, proxy, moved, rank, KL, then alternatives with theirs.

    Probabilities are in tenths of a percent, -1 for less; bits and nats in tenths; alternatives by
    their place in a list.
    """
    s = token.steering
    packed: list[Any] = [_tenths(p) for p in (s.base, s.expert, s.anti, s.proxy)]
    packed += [round(10 * token.moved), s.base_rank]
    packed.append(round(10 * s.kl) if math.isfinite(s.kl) else None)
    for text, p in token.alternatives:
        if p >= wording.LEAST:
            packed += [alternatives.setdefault(text, len(alternatives)), _tenths(p)]
    return packed


def _tenths(p: float) -> int | None:
    if math.isnan(p):
        return None
    return round(1000 * p) or -int(p > 0)
