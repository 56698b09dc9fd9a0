"""Incremental text: whole characters only, and the pieces joined are the text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune_kernels.decoder.text import Detokenizer, StopStrings


@given(text=st.text(max_size=20))
def test_pieces_make_up_the_text(tokenizer, text):
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("before"))
    pieces = [detokenizer.push(i) for i in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + detokenizer.flush() == text


@given(token_ids=st.lists(st.integers(0, 261), max_size=30))
def test_pieces_of_any_tokens_make_up_their_text(tokenizer, token_ids):
    detokenizer = Detokenizer(tokenizer, [])
    text = "".join(detokenizer.push(i) for i in token_ids) + detokenizer.flush()
    assert text == tokenizer.decode(token_ids, skip_special_tokens=True)


def test_a_character_comes_with_its_last_byte(tokenizer):
    detokenizer = Detokenizer(tokenizer, [])
    pieces = [detokenizer.push(i) for i in tokenizer.encode("a€🙂")]
    assert pieces == ["a", "", "", "€", "", "", "", "🙂"]


def test_what_never_completes_is_replaced_at_the_end(tokenizer):
    detokenizer = Detokenizer(tokenizer, [])
    assert [detokenizer.push(i) for i in tokenizer.encode("€")[:2]] == ["", ""]
    assert detokenizer.flush() == "\ufffd"


def test_a_prompt_that_ends_within_a_character(tokenizer):
    first, *rest = tokenizer.encode("€")
    detokenizer = Detokenizer(tokenizer, [first])
    text = "".join(detokenizer.push(i) for i in rest) + detokenizer.flush()
    assert text == tokenizer.decode(rest)


def test_special_tokens_have_no_text(tokenizer):
    detokenizer = Detokenizer(tokenizer, [1])
    assert [detokenizer.push(i) for i in (2, tokenizer.encode("a")[0], 2)] == ["", "a", ""]


def run(stop: tuple[str, ...], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    strings, out = StopStrings(stop, include), ""
    for piece in pieces:
        text, found = strings.push(piece)
        out += text
        if found is not None:
            return out, found
    return out + strings.flush(), None


@given(text=st.text("abc", max_size=12), cuts=st.lists(st.integers(0, 12), max_size=6))
def test_where_the_text_is_cut_makes_no_difference(text, cuts):
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    pieces = [text[i:j] for i, j in pairwise(edges)]
    stop = ("abc", "bb", "cab")
    ends = {text.index(s) + len(s): s for s in stop if s in text}
    out, found = run(stop, pieces)
    if not ends:
        assert (out, found) == (text, None)
    else:
        end = min(ends)
        assert (out, found) == (text[: end - len(ends[end])], ends[end])
        assert run(stop, pieces, include=True)[0] == text[:end]


def test_nothing_of_a_stop_string_leaks():
    strings = StopStrings(["stop"], include=False)
    assert strings.push("a st") == ("a ", None)
    assert strings.push("o") == ("", None)
    assert strings.push("op stop") == ("stoop ", "stop")


@pytest.mark.parametrize(("include", "text"), [(False, "x"), (True, "xab")])
def test_of_two_that_end_together_the_longer_counts(include, text):
    assert run(("b", "ab"), ["xab", "y"], include) == (text, "ab")
