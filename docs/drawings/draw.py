"""Writes the drawings beside it: `python docs/drawings/draw.py`. A test holds them to this script.

They are narrow, so that they can be read on a phone, and take their colours from the page where
they are part of one (docs/sphinx_site.py), else from what the reader's system prefers.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH = 440
PROMPT = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have now?\nAnswer:"
STYLE = """\
svg.pt{font:13px system-ui,sans-serif;background:var(--paper);
--paper:var(--color-background-primary,#fff);
--ink:var(--color-foreground-primary,#1b1f24);--soft:var(--color-foreground-muted,#59616c);
--rule:var(--color-foreground-border,#8b939e);--field:var(--color-background-secondary,#f4f6f8)}
@media(prefers-color-scheme:dark){svg.pt{--paper:var(--color-background-primary,#131416);
--ink:var(--color-foreground-primary,#e8eaed);
--soft:var(--color-foreground-muted,#a5adb8);--field:var(--color-background-secondary,#1b1f24)}}
.pt text{fill:var(--ink)}.pt .s{fill:var(--soft);font-size:12px}.pt .b{font-weight:600}
.pt .m{font-family:ui-monospace,monospace}
.pt .f{fill:var(--field);stroke:var(--rule)}.pt .l{stroke:var(--rule);fill:none}
.pt .o{fill:none;stroke:var(--rule);stroke-dasharray:4 3}
.pt .base{fill:#3b7ddd}.pt .expert{fill:#2e9e6b}.pt .anti{fill:#d9822b}.pt .proxy{fill:#8f5fd0}
.pt .off{fill:var(--rule);opacity:.35}"""


class Drawing:
    """An SVG, line by line."""

    def __init__(self, title: str, height: int) -> None:
        self.height = height
        self.lines = [
            f'<svg class="pt" xmlns="http://www.w3.org/2000/svg" role="img" '
            f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="pt-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#8b939e"/>'
            "</marker></defs>",
        ]

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """One line."""
        self.lines.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, kind: str = "f") -> None:
        """A rectangle of one of the kinds of the style."""
        self.lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
            f'class="{kind}"/>'
        )

    def named(self, x: float, y: float, width: float, text: str, kind: str = "") -> None:
        """A box of one line with its text in the middle."""
        self.box(x, y, width, 26)
        if kind:
            self.box(x, y, 5, 26, kind)
        self.text(x + width / 2, y + 18, text, "", "middle")

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points, with a tip."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self.lines.append(f'<path d="M{path}" class="l" marker-end="url(#pt-tip)"/>')

    def __str__(self) -> str:
        return "\n".join([*self.lines, "</svg>", ""])


def steering() -> Drawing:
    """Probabilities of the next token under each model of the shipped trio, and under all three."""
    import torch

    import proxytune_kernels as ptk

    trio = ptk.load_trio("shipped", dtype="float32")
    token_ids, space = trio.tokenize(PROMPT), trio.tokenize(" ")
    with torch.inference_mode():
        logits = [
            trio.models[role](torch.tensor([token_ids[role] + space[role]])).logits[
                0, -1, : trio.vocab_size
            ]
            for role in ("base", "expert", "anti")
        ]
    columns = dict(zip(("base", "expert", "anti"), logits, strict=True))
    columns["proxy"] = ptk.combine(*(row[None] for row in logits), 1.0)[0]
    shares = {name: row.softmax(0) for name, row in columns.items()}
    chosen = {
        int(token) for name in ("proxy", "base") for token in shares[name].topk(4).indices[:4]
    }
    names = {trio.tokenizer.decode([token]): token for token in chosen}
    digits = {name: names[name] for name in sorted(names) if name.isdigit()}
    return probabilities(
        {
            name: {digit: float(share[token]) for digit, token in digits.items()}
            for name, share in shares.items()
        }
    )


def probabilities(shares: Mapping[str, Mapping[str, float]]) -> Drawing:
    """A column for each of base, expert, anti and proxy; a row for each token."""
    tokens = list(shares["base"])
    drawing = Drawing(
        "Probabilities of the next token under base, expert, anti-expert and the steered base",
        86 + 26 * len(tokens),
    )
    heads = {"base": "base", "expert": "expert", "anti": "anti-expert", "proxy": "steered"}
    left, step = 48, 100
    for column, (name, head) in enumerate(heads.items()):
        x = left + step * column
        drawing.text(x, 20, head, "b")
        drawing.box(x, 28, step - 24, 3, name)
        drawing.text(x + step - 9, 20, ["+", "\u2212", "=", ""][column], "b", "middle")
        for row, token in enumerate(tokens):
            y, share = 40 + 26 * row, round(100 * shares[name][token])
            drawing.box(x, y, max(1, share * 0.42), 16, name)
            drawing.text(x + max(1, share * 0.42) + 4, y + 13, f"{share}%", "s")
    for row, token in enumerate(tokens):
        drawing.text(left - 8, 53 + 26 * row, f"\u201c{token}\u201d", "m", "end")
    y = 58 + 26 * len(tokens)
    drawing.text(
        WIDTH / 2,
        y,
        "steered = base + \u03b1 (expert \u2212 anti-expert), \u03b1 = 1",
        "",
        "middle",
    )
    drawing.text(WIDTH / 2, y + 18, "logits are added; the bars are their softmax", "s", "middle")
    return drawing


def row() -> Drawing:
    """From three rows of logits to one token."""
    drawing = Drawing("Three rows of logits are read once and become one token", 452)
    heights = [9, 14, 7, 26, 12, 8, 17, 10, 6, 22, 11, 8]
    left, step = 20, 33.4
    for line, (name, label) in enumerate(
        (("base", "base"), ("expert", "expert"), ("anti", "anti-expert"))
    ):
        y = 24 + 30 * line
        drawing.text(left, y - 5, label, "s")
        for tile in range(12):
            drawing.box(left + step * tile, y, step - 4, 10, name)
    drawing.arrow((120, 100), (120, 128))
    drawing.text(132, 119, "1  read once, combined in fp32", "b")
    bottom, bound = 190, 17
    for tile, height in enumerate(heights):
        kind = "proxy" if height >= bound else "off"
        drawing.box(left + step * tile, bottom - 2 * height, step - 4, 2 * height, kind)
    drawing.lines.append(f'<path d="M{left - 8} {bottom - 2 * bound + 1}H430" class="o"/>')
    drawing.text(left, bottom + 17, "the highest x of each tile of 128 tokens; the dashed", "s")
    drawing.text(left, bottom + 33, "bound: what is above it has count and mass enough", "s")
    drawing.arrow((120, 232), (120, 260))
    drawing.text(132, 251, "2  three tiles are left", "b")
    masses = [62, 47, 36, 27, 21, 16, 12, 9, 7, 5, 4, 3]
    for token, mass in enumerate(masses):
        drawing.box(
            left + step * token, 334 - mass, step - 4, mass, "proxy" if token < 5 else "off"
        )
    x = left + step * 5 - 2
    drawing.lines.append(f'<path d="M{x:g} 268V340" class="o"/>')
    drawing.text(x + 6, 282, "3  the kept set ends here,", "b")
    drawing.text(x + 6, 299, "exactly: masses are integers", "s")
    for token, noise in enumerate([14, 40, 8, 30, 18]):
        drawing.box(left + step * token, 372, step - 4, 8, "proxy")
        drawing.box(left + step * token + 10, 384, 9, noise, "base")
    drawing.arrow((left + 2.4 * step, 342), (left + 2.4 * step, 366))
    drawing.text(x + 6, 380, "4  x / T + noise; the noise is a", "b")
    drawing.text(x + 6, 397, "function of seed, position and token", "s")
    drawing.arrow((left + 1.5 * step, 426), (left + 1.5 * step, 436), (x + 2, 436))
    drawing.text(x + 8, 441, "the highest: the token", "b")
    return drawing


def speculation() -> Drawing:
    """A round of four drafts, of which three are the target's own draws."""
    drawing = Drawing("Four drafts are checked at once; the first three are kept", 336)
    left, step, wide = 92, 68, 58
    drafts, draws = ["3", "+", "4", "is"], ["3", "+", "4", "="]
    drawing.text(10, 42, "expert", "b")
    drawing.text(10, 58, "drafts alone", "s")
    for place, draft in enumerate(drafts):
        drawing.named(left + step * place, 30, wide, draft, "expert")
        if place < 3:
            drawing.arrow((left + step * place + wide, 43), (left + step * (place + 1) - 2, 43))
    drawing.text(10, 112, "base, anti", "b")
    drawing.text(10, 128, "one forward", "s")
    drawing.box(left, 96, step * 4 + wide, 30)
    drawing.box(left, 96, 5, 15, "base")
    drawing.box(left, 111, 5, 15, "anti")
    drawing.text(
        left + (step * 4 + wide) / 2, 116, "logits behind all of them, five rows", "", "middle"
    )
    drawing.text(10, 182, "the draw", "b")
    drawing.text(10, 198, "of the seed", "s")
    for place, draw in enumerate(draws):
        x = left + step * place + wide / 2
        drawing.arrow((x, 128), (x, 164))
        drawing.named(left + step * place, 168, wide, draw, "proxy")
        same = drafts[place] == draw
        drawing.text(x, 212, "= draft" if same else "\u2260 draft", "s", "middle")
        drawing.text(x, 228, "kept" if same else "replaces it", "b", "middle")
    drawing.box(left + step * 4, 168, wide, 26, "o")
    drawing.text(left + step * 4 + wide / 2, 186, "dropped", "s", "middle")
    drawing.text(10, 280, "the text", "b")
    for place, draw in enumerate(draws):
        drawing.named(left + step * place, 262, wide, draw)
    drawing.text(left, 312, "four tokens for one forward of the base;", "s")
    drawing.text(left, 328, "without drafts they are the same four", "s")
    return drawing


def step() -> Drawing:
    """What one step of the decoder launches."""
    drawing = Drawing("A step: three forwards side by side, one operator, the tokens go back", 300)
    drawing.box(10, 26, 420, 214, "o")
    drawing.text(20, 44, "one step; on CUDA one captured graph", "s")
    for line, (name, label, width) in enumerate(
        (
            ("base", "base: forward of all slots", 236),
            ("expert", "expert", 120),
            ("anti", "anti", 120),
        )
    ):
        y = 58 + 36 * line
        drawing.named(60, y, width, label, name)
        drawing.arrow((26, 180), (26, y + 13), (56, y + 13))
        drawing.arrow((60 + width, y + 13), (318, y + 13), (338, 107))
    drawing.named(338, 94, 82, "sample", "proxy")
    drawing.text(379, 136, "waits for all", "s", "middle")
    drawing.named(60, 186, 236, "token, position, length of each slot")
    drawing.arrow((379, 142), (379, 199), (300, 199))
    drawing.arrow((56, 199), (26, 199), (26, 178))
    drawing.text(60, 230, "fed back on the device, without the host", "s")
    drawing.arrow((379, 199), (379, 262))
    drawing.text(
        WIDTH - 10, 280, "the host reads it one step behind, and fills free slots", "s", "end"
    )
    return drawing


DRAWINGS = {"steering": steering, "row": row, "speculation": speculation, "step": step}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (HERE / f"{name}.svg").write_text(str(draw()), "utf-8")
