"""The page of an analysis: what is in it, its size, and how it looks in headless Chromium."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from proxytune_kernels.analysis import page
from proxytune_kernels.analysis.summaries import summarise
from proxytune_kernels.analysis.tokens import Analysed, Token
from proxytune_kernels.decoder import Steering
from tests.page.browser import look

EVIL = "<script>alert(1)</script>&amp;\"'<b onclick=x>"
# (token, its text, base, proxy, whether the likeliest token changed)
TOKENS: Any = [
    (" 3", " 3", 0.5, 0.5, 0), (EVIL, EVIL, 0.01, 0.6, 1), ("\n", "\n", 0.9, 0.1, 1),
    ("bytes:\\xc3", "", 0.2, 0.3, 0), ("bytes:\\xa9", "é", 1e-9, 1e-4, 0),
    ("<end>", "", 0.0, 0.9, 1),
]  # fmt: skip


def analysed(index: int = 0) -> Analysed:
    tokens, start = [], 0
    for i, (name, text, base, proxy, changed) in enumerate(TOKENS):
        steering = Steering(base, float("nan"), 0.25, proxy, 7, bool(changed), 1.25)
        others = ((EVIL, 0.25), ("x", 0.015), ("y", 0.001))
        tokens.append(Token(i, name, text, start, steering, others))
        start += len(text)
    return Analysed(index, f"Say {EVIL}", tuple(tokens), 1.0, "stop")


def written(count: int = 1) -> str:
    texts = [analysed(i) for i in range(count)]
    return page.render(texts, summarise(texts), EVIL)


class Read(HTMLParser):
    """The texts and scripts of a page, and what its attributes refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.inside, self.scripts = "", "", 0
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside = tag
        self.tags.add(tag)
        self.scripts += tag == "script"
        self.links += [value for name, value in attrs if name in ("src", "href", "action")]
        assert not any(name == "style" or name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text += data


def test_what_a_text_holds_is_shown_as_text():
    read = Read(written(2))
    assert (read.scripts, read.links) == (2, ["data:,"])  # the data, and what reads it
    assert "b" not in read.tags
    # The title, the heading's line, two prompts, two texts; elsewhere its quotes are escaped.
    assert read.text.count(EVIL) == 6
    assert read.text.count("<script>alert(1)</script>&amp;") > 8


def test_the_page_asks_for_nothing_elsewhere():
    text = written()
    own = text.replace(page._data([analysed()]), "")
    assert "http" not in own and "innerHTML" not in own and "url(" not in own


def test_a_hundred_outputs_are_at_most_500_kb():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 6))) for _ in range(2000)]

    def token(i: int) -> Token:
        proxy, base = rng.random(), rng.random()
        others = tuple((rng.choice(words), rng.random() / 5) for _ in range(5))
        steering = Steering(base, rng.random(), rng.random(), proxy, i, i % 2 == 0, 9 * base)
        return Token(i, word := rng.choice(words), word, 0, steering, others)

    texts = [
        replace(analysed(i), tokens=tuple(token(j) for j in range(128)), prompt="?" * 100)
        for i in range(100)
    ]
    made = page.render(texts, summarise(texts[:2]), "random")
    assert 400_000 < len(made.encode()) <= page.MOST_BYTES
    # Random figures hold more than any model's: some texts find no room, and that is said.
    shown = made.count("<article>")
    assert f"{100 - shown} more texts found no room" in made and shown > 50


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "page.html").write_text(written(3), "utf-8")
    return look("analysis.cjs", (folder / "page.html").as_uri(), folder)


def test_it_reads_in_every_window(seen):
    for name, found in seen.items():
        assert found["problems"] == []
        texts = [token["text"] for token in found["tokens"][: len(TOKENS)]]
        assert texts == [" 3", EVIL, "\u21b5\n", "bytes:\\xc3", "é", "<end>"]
        assert "Moved most" in found["text"] and "In short" in found["text"], name
    assert "Without script" in seen["still"]["text"]


def test_colour_is_never_the_only_sign(seen):
    for found in seen.values():
        same, up, down, part, tiny, end = found["tokens"][:6]
        assert [t["line"] for t in (same, up, down, tiny)] == ["none"] + ["underline"] * 3
        assert (up["style"], down["style"], end["style"]) == ("solid", "dashed", "solid")
        assert [t["weight"] == "700" for t in (same, up, down, end)] == [False, True, True, True]
        assert part["kind"].startswith("u1")


def test_it_can_be_used_by_all(seen):
    for name in ("desktop", "phone", "dark"):
        found = seen[name]
        assert found["violations"] == [] and found["passes"] > 20
        assert not found["overflows"]
        assert re.search(r"60 times likelier\. Its rank under the base: 7\.", found["detail"])
        assert "expert" in found["detail"] and "not run" in found["detail"]
        assert EVIL.replace('"', '\\"') in found["detail"] and "1.5%" in found["detail"]
        assert found["pointed"] == '"\\n"'
        first = found["tokens"][: len(TOKENS)]
        assert "less likely" in first[2]["label"] and "new line" in first[2]["label"]
        assert [token["tab"] for token in first] == [0] + [-1] * (len(TOKENS) - 1)
        assert found["printed"] == {
            "detail": "none", "ink": "rgb(0, 0, 0)", "paper": "rgb(255, 255, 255)",
        }  # fmt: skip
    assert seen["desktop"]["background"] != seen["dark"]["background"]


def test_the_package_has_the_template():
    assert (Path(page.__file__).parent / "page.html").exists()
