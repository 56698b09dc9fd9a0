"""What steering changed over all texts: where, which tokens, which kinds of words.

Every figure is a share or a mean over tokens, and its interval is that of drawing the prompts that
have such tokens again (:mod:`~proxytune_kernels.analysis.intervals`): tokens of one text depend on
each other, prompts do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from proxytune_kernels.analysis.equations import LEFT, RIGHT, sides
from proxytune_kernels.analysis.intervals import Interval, bootstrap
from proxytune_kernels.analysis.tokens import Analysed, Token
from proxytune_kernels.analysis.words import GROUPS, units

EXTREMES = 10
"""Tokens that are listed as most promoted, and as most suppressed, at most."""

CONTEXT_WORDS = 4
"""Words, numbers and signs of arithmetic in a context, its token among them."""

_STARTS = (1, 2, 5, 17, 65, 257)  # of the ranges of positions, 1 the first
_BESIDE = CONTEXT_WORDS // 2
_UNCOUNTED = frozenset(("punctuation", "layout"))


class Row(NamedTuple):
    """Some of the tokens."""

    name: str
    tokens: int
    changed: Interval
    """Share of them where the likeliest token is another than the base's."""
    added: Interval
    """Probability that steering added to them, on average: proxy - base."""


class Extreme(NamedTuple):
    """A token that steering made much likelier, or less likely, wherever it occurs."""

    token: str
    tokens: int
    prompts: int
    added: Interval
    context: str
    """The commonest of the contexts that it occurs in."""
    context_count: int
    """In how many of its occurrences."""


@dataclass(frozen=True)
class Summary:
    """The figures; a field is empty, or None, where the texts have no such tokens.

    Args:
        prompts, texts: how many.
        all: all tokens.
        kl: divergence of the proxy from the base in nats, on average.
        positions: by place in the text.
        groups, parts: by kind of word (:mod:`~proxytune_kernels.analysis.words`).
        sides: of equations (:mod:`~proxytune_kernels.analysis.equations`), the left and the right.
        left_minus_right: of what is added to both, over the prompts that have both.
        promoted, suppressed: the extremes among tokens that occur with ``least_prompts`` prompts or
            more, by what is added to them on average.
    """

    prompts: int
    texts: int
    all: Row
    kl: Interval
    positions: list[Row]
    groups: list[Row]
    parts: list[Row]
    sides: list[Row]
    left_minus_right: Interval | None
    promoted: list[Extreme]
    suppressed: list[Extreme]
    least_prompts: int

    def by_kind(self) -> list[Row]:
        """Each group, then those of its parts that are not all of it."""
        rows = []
        for group in self.groups:
            own = [p for p in self.parts if GROUPS[p.name] == group.name]
            rows += [group, *(p._replace(name=f"  {p.name}") for p in own if len(own) > 1)]
        return rows


@dataclass(frozen=True)
class Kinds:
    """What the tokens of one text are, one entry a token."""

    parts: list[str]
    sides: list[str | None]

    @classmethod
    def of(cls, analysed: Analysed) -> Kinds:
        """A token is what its first character is that is no space; an end is layout."""
        text = analysed.text
        by_character = [part for start, end, part in units(text) for _ in range(start, end)]
        side = sides(text)
        places = [_first_ink(text, token) for token in analysed.tokens]
        return cls(
            ["layout" if place is None else by_character[place] for place in places],
            [None if place is None else side[place] for place in places],
        )


def _first_ink(text: str, token: Token) -> int | None:
    """Where a token's first character is that is no space; a token of part of one has that one."""
    if not token.text:
        is_part = token.token.startswith("bytes:") and token.start < len(text)
        return token.start if is_part else None
    blank = len(token.text) - len(token.text.lstrip())
    return token.start if blank == len(token.text) else token.start + blank


def summarise(texts: Sequence[Analysed], seed: int = 0) -> Summary:
    """Sum up texts.

    Args:
        texts: at least one token in all.
        seed: of the intervals.
    """
    flat = [token for text in texts for token in text.tokens]
    if not flat:
        raise ValueError("texts must have a token, got none")
    kinds = [Kinds.of(text) for text in texts]
    parts = np.array([part for kind in kinds for part in kind.parts])
    side = np.array([s or "" for kind in kinds for s in kind.sides])
    place = np.array([i for text in texts for i in range(1, len(text.tokens) + 1)])
    table = _Table(texts, flat, seed)
    groups = np.array([GROUPS[part] for part in parts])
    by_side = [table.row(f"{name} side", side == name) for name in (LEFT, RIGHT)]
    least = max(min(2, table.prompts), -(-table.prompts // 10))
    promoted, suppressed = _extremes(texts, flat, table, least)
    return Summary(
        prompts=table.prompts,
        texts=len(texts),
        all=_some(table.row("all", np.full(len(flat), True)))[0],
        kl=table.mean(table.kl, np.isfinite(table.kl)),
        positions=_some(
            *(
                table.row(f"{first}" if first + 1 == end else f"{first} to {end - 1}",
                          (first <= place) & (place < end))
                for first, end in zip(_STARTS, (*_STARTS[1:], max(_STARTS[-1], *place) + 1),
                                      strict=True)
            )
        ),
        groups=_some(*(table.row(g, groups == g) for g in dict.fromkeys(GROUPS.values()))),
        parts=_some(*(table.row(part, parts == part) for part in GROUPS)),
        sides=_some(*by_side),
        left_minus_right=table.difference(side == LEFT, side == RIGHT),
        promoted=promoted,
        suppressed=suppressed,
        least_prompts=least,
    )  # fmt: skip


def _some(*rows: Row | None) -> list[Row]:
    return [row for row in rows if row is not None]


class _Table:
    """All tokens, as columns."""

    def __init__(self, texts: Sequence[Analysed], flat: Sequence[Token], seed: int) -> None:
        indices = [text.index for text in texts for _ in text.tokens]
        self.prompt = np.unique(indices, return_inverse=True)[1]
        self.prompts = int(self.prompt.max()) + 1
        self.changed = np.array([token.steering.changed for token in flat], dtype=float)
        self.added = np.array([token.added for token in flat])
        self.kl = np.array([token.steering.kl for token in flat])
        self._seed = seed

    def row(self, name: str, chosen: np.ndarray) -> Row | None:
        """Figures of the chosen tokens; None where there are none."""
        if not chosen.any():
            return None
        shares = self.mean(self.changed, chosen), self.mean(self.added, chosen)
        return Row(name, int(chosen.sum()), *shares)

    def mean(self, values: np.ndarray, chosen: np.ndarray) -> Interval:
        """The mean over the chosen tokens; prompts are drawn."""
        sums, counts = self._by_prompt(values, chosen), self._by_prompt(None, chosen)
        some = counts > 0
        return bootstrap(sums[some], counts[some], statistic=_ratio, seed=self._seed)

    def difference(self, one: np.ndarray, other: np.ndarray) -> Interval | None:
        """Of what is added to two choices, over the prompts that have both."""
        columns = [
            self._by_prompt(values, chosen)
            for chosen in (one, other)
            for values in (self.added, None)
        ]
        some = (columns[1] > 0) & (columns[3] > 0)
        if not some.any():
            return None
        kept = [column[some] for column in columns]
        return bootstrap(*kept, statistic=_difference, seed=self._seed)

    def _by_prompt(self, values: np.ndarray | None, chosen: np.ndarray) -> np.ndarray:
        weights = None if values is None else values[chosen]
        counted = np.bincount(self.prompt[chosen], weights, minlength=self.prompts)
        return counted.astype(float)


def _ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    result: np.ndarray = sums.sum(axis) / counts.sum(axis)
    return result


def _difference(*columns: np.ndarray, axis: int) -> np.ndarray:
    return _ratio(columns[0], columns[1], axis) - _ratio(columns[2], columns[3], axis)


def _extremes(
    texts: Sequence[Analysed], flat: Sequence[Token], table: _Table, least: int
) -> tuple[list[Extreme], list[Extreme]]:
    """The tokens to which steering added most on average, and those from which it took most."""
    ids = np.array([token.token_id for token in flat])
    distinct, first, own = np.unique(ids, return_index=True, return_inverse=True)
    sums = np.bincount(own, table.added)
    counts = np.bincount(own)
    pairs = np.unique(own * table.prompts + table.prompt)
    prompts = np.bincount(pairs // table.prompts)
    means = sums / counts
    order = [i for i in np.argsort(-means, kind="stable") if prompts[i] >= least]
    up = [i for i in order if means[i] > 0][:EXTREMES]
    down = [i for i in reversed(order) if means[i] < 0][:EXTREMES]
    contexts = _contexts(texts, {int(distinct[i]) for i in (*up, *down)})

    def extreme(i: int) -> Extreme:
        added = table.mean(table.added, own == i)
        common = contexts[int(distinct[i])].most_common(1)
        context, count = common[0] if common else ("", 0)
        token = flat[first[i]].token
        return Extreme(token, int(counts[i]), int(prompts[i]), added, context, count)

    return [extreme(i) for i in up], [extreme(i) for i in down]


def _contexts(texts: Sequence[Analysed], wanted: set[int]) -> dict[int, Counter[str]]:
    """Token -> how many of its occurrences each context has."""
    found: dict[int, Counter[str]] = {token_id: Counter() for token_id in wanted}
    for analysed in texts:
        text = analysed.text
        counted = [unit for unit in units(text) if unit[2] not in _UNCOUNTED]
        unit_at = {c: i for i, unit in enumerate(counted) for c in range(unit[0], unit[1])}
        for token in analysed.tokens:
            if token.token_id not in wanted:
                continue
            place = _first_ink(text, token)
            at = None if place is None else unit_at.get(place)
            if at is None:  # punctuation, layout: what is on both sides
                start = token.start if place is None else place
                before = [unit for unit in counted if unit[1] <= start][-_BESIDE:]
                behind = [unit for unit in counted if unit[0] >= start][:_BESIDE]
                first = before[0][0] if before else 0
                windows = {text[first : behind[-1][1] if behind else len(text)]}
            else:
                starts = range(max(0, at - CONTEXT_WORDS + 1), at + 1)
                ends = [min(start + CONTEXT_WORDS, len(counted)) - 1 for start in starts]
                windows = {
                    text[counted[start][0] : counted[end][1]]
                    for start, end in zip(starts, ends, strict=True)
                }
            found[token.token_id].update(
                sorted(" ".join(w.replace("\n", " \u21b5 ").split()) for w in windows)
            )
    return found
