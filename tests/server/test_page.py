"""The page in headless Chromium: by keyboard alone, on a desktop, a phone and in the dark."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest

import proxytune_kernels as ptk
from tests.page.browser import look
from tests.server.serving import PROMPT

# What the page asks for before anything is changed, but for one step of the temperature.
ASKED: dict[str, Any] = {"temperature": 0.65, "seed": 7, "max_tokens": 64}


@pytest.fixture(scope="module")
def seen(server, tmp_path_factory):
    return look("server.cjs", server.url, tmp_path_factory.mktemp("page"))


def test_it_shows_what_the_decoder_gives(seen, reference):
    [base] = reference.generate(PROMPT, ptk.SamplingParams(alpha=0.0, **ASKED))
    [proxy] = reference.generate(PROMPT, ptk.SamplingParams(steering=True, **ASKED))
    for found in seen.values():
        assert found["temperature"] == "0.65"
        assert (found["base"], found["count"]) == (base.text, f"{len(base.token_ids)} tokens")
        texts = [token["text"].replace("\u21b5\n", "\n") for token in found["tokens"]]
        assert texts[-1] == "end" and "".join(texts[:-1]) == proxy.text
        assert len(texts) == len(proxy.steering)
        second = proxy.steering[1]
        assert f"Its rank under the base: {second.base_rank}." in found["detail"]
        for role in ("base", "expert", "anti-expert", "proxy"):
            assert role in found["detail"]
        assert re.fullmatch(r"Done: steering moved \d+ of \d+ tokens\.", found["status"])


def test_what_moved_is_underlined_by_its_sign_and_said(seen):
    for token in seen["desktop"]["tokens"]:
        moved = abs(token["moved"]) >= 0.5
        assert (token["line"] == "underline") == moved
        if moved:
            assert token["kind"] == ("solid" if token["moved"] > 0 else "dashed")
            assert ("less likely" in token["label"]) == (token["moved"] < 0)
    assert any(token["line"] == "underline" for token in seen["desktop"]["tokens"])
    # One stop of Tab for all tokens.
    assert sum(token["tab"] == 0 for token in seen["desktop"]["tokens"]) == 1


def test_it_can_be_used_by_all(seen):
    for found in seen.values():
        assert found["violations"] == [] and found["passes"] > 20
        assert found["problems"] == [] and not found["overflows"]
        assert found["order"] == [
            "prompt",
            "alpha",
            "temperature",
            "tokens",
            "seed",
            "SUMMARY",
            "go",
        ]
        assert json.loads(found["tapped"]) == found["tokens"][2]["text"].replace("\u21b5", "")
    assert seen["desktop"]["animation"] == "blink" and seen["dark"]["animation"] == "none"
    assert seen["desktop"]["background"] != seen["dark"]["background"]


def test_it_is_one_file_that_asks_for_nothing_elsewhere(server):
    page = (files("proxytune_kernels") / "server" / "page.html").read_text("utf-8")
    found: list[Any] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend(value for name, value in attrs if name in ("src", "href", "action"))
            # A policy without 'unsafe-inline' lets no attribute be style or script.
            assert not any(name == "style" or name.startswith("on") for name, _ in attrs)

    Links().feed(page)
    assert found == ["data:,"]
    assert "http" not in page.replace('http-equiv="', "") and "innerHTML" not in page
    response, data = server.ask("/")
    assert data.decode() == page
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
