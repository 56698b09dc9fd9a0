"""An analysis in the terminal: texts with their tokens coloured, and tables of figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxytune_kernels.analysis import wording
from proxytune_kernels.analysis.tokens import Analysed
from proxytune_kernels.cli.chat import Piece, style
from proxytune_kernels.cli.options import printable

if TYPE_CHECKING:
    from proxytune_kernels.analysis.summaries import Extreme, Row, Summary

_MOST = 5  # tokens that are listed below a text
_OTHERS = 2  # likely tokens beside each of them
_WIDTH = 110  # where it is no terminal that says how wide it is
_LEGEND = (
    ("green underline", "steering made it likelier"),
    ("red strike", "less likely"),
    ("bold", "the likeliest token is another than the base's"),
)
_COLUMNS = (
    "base, proxy, expert, anti: the token's probability under each. rank: its place among the "
    "base's tokens.\nchanged: whether the likeliest token is another than the base's. KL: "
    "divergence of the proxy from the base, in nats."
)


class View:
    """Writes to standard output.

    Args:
        plain: no colours; nor are there any where standard output is no terminal.
    """

    def __init__(self, plain: bool) -> None:
        options: dict[str, Any] = {}
        if plain or os.environ.get("NO_COLOR"):
            options["color_system"] = None
        self._console = Console(file=sys.stdout, highlight=False, markup=False, **options)
        self._colored = self._console.is_terminal and self._console.color_system is not None
        if not self._console.is_terminal:
            self._console.width = _WIDTH
        self._began = False

    def text(self, analysed: Analysed) -> None:
        """A text, and those of its tokens that moved most."""
        if not self._began:
            self._legend()
        prompt = printable(" ".join(wording.label(analysed).split()))
        self._print(Text(f"\n==> {prompt} <==", style="bold"))
        text = Text()
        for token in analysed.tokens:
            shown = printable(token.text)
            text.append(shown, style(Piece(shown, token.moved, token.steering.changed)))
        self._print(text)
        rows = []
        for token in wording.moved_most(analysed, _MOST):
            s = token.steering
            probabilities = [wording.percent(p) for p in (s.base, s.proxy, s.expert, s.anti)]
            others = [
                f"{wording.quoted(t)} {wording.percent(p)}"
                for t, p in token.alternatives
                if p >= wording.LEAST
            ]
            rows.append(
                [
                    wording.quoted(token.token), *probabilities, str(s.base_rank),
                    "yes" if s.changed else "", f"{s.kl:.2f}", ", ".join(others[:_OTHERS]),
                ]
            )  # fmt: skip
        names = "moved most,base,proxy,expert,anti,rank,changed,KL,other likely tokens"
        self._table(names.split(","), rows, words=(0, 8))

    def summary(self, summary: Summary, left_out: int) -> None:
        """The figures of all texts, some of which were left out."""
        if left_out and self._began:
            self._print(f"\n{left_out:,} more: --show, --html and --jsonl have them.")
        every = summary.all
        self._print(
            Text(
                f"\n==> {_many(summary.texts, 'text')} of {_many(summary.prompts, 'prompt')}, "
                f"{_many(every.tokens, 'token')} <==",
                style="bold",
            )
        )
        self._print(
            f"At {wording.share(every.changed)} of the positions the likeliest token is another "
            f"than the base's.\nSteering added {wording.signed(every.added)} to the probability of "
            f"the token that stands there, on average.\nThe divergence of the proxy from the base "
            f"is {wording.plain(summary.kl)} nats a position."
        )
        brackets = "In brackets: 95% intervals, by drawing the prompts again (bootstrap)."
        self._print(brackets if summary.prompts > 1 else wording.NO_INTERVAL)
        self._rows("position in the text", summary.positions)
        self._rows("kind of word", summary.by_kind())
        self._rows("side of equations", summary.sides)
        if summary.left_minus_right is not None:
            difference = wording.signed(summary.left_minus_right)
            self._print(f"left minus right: probability added {difference}")
        self._extremes("most promoted", summary.promoted)
        if summary.suppressed:
            self._extremes("most suppressed", summary.suppressed)
        else:
            self._print("\nNone was made less likely, on average.")

    def _legend(self) -> None:
        self._began = True
        if self._colored:
            parts = [part for style, words in _LEGEND for part in ((words, style), "; ")]
            self._print(Text.assemble(*parts[:-1]))
        self._print(_COLUMNS)

    def _rows(self, title: str, rows: Sequence[Row]) -> None:
        cells = [
            [row.name, f"{row.tokens:,}", wording.share(row.changed), wording.signed(row.added)]
            for row in rows
        ]
        self._table((title, "tokens", "likeliest token changed", "probability added"), cells)

    def _extremes(self, title: str, rows: Sequence[Extreme]) -> None:
        cells = []
        for row in rows:
            of = f"{row.context_count} of {row.tokens}"
            cells.append(
                [wording.quoted(row.token), f"{row.tokens:,}", f"{row.prompts:,}",
                 wording.signed(row.added), f"{row.context} ({of})"]
            )  # fmt: skip
        columns = (title, "occurs", "prompts", "probability added", "commonest context")
        self._table(columns, cells, words=(0, 4))

    def _table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)
    ) -> None:
        if not rows:
            return
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for i, column in enumerate(columns):
            last = i == len(columns) - 1
            table.add_column(column, justify="left" if i in words else "right", no_wrap=not last)
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._print("")
        self._console.print(table)

    def _print(self, text: Text | str) -> None:
        self._console.print(text, soft_wrap=True)


def _many(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"
