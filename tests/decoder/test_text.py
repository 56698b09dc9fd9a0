"""Incremental text: whole characters only, and the pieces joined are the text."""

from __future__ import annotations

from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from proxytune_kernels.decoder.request import Request, RequestOutput, StopRules
from proxytune_kernels.decoder.text import Detokenizer, StopStrings
from proxytune_kernels.params import SamplingParams
from tests.trio.checkpoints import ALPHABET, make_tokenizer


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


WORDS = (
    *("<s>", "</s>", "<unk>", "\u2581", "\u2581Hello", "\u2581world", "!", "a", "\u20ac"),
    "\ufffd",
)


@cache
def byte_fallback() -> Any:
    """A tokenizer such as Llama 2's: words of SentencePiece, and bytes for what no word has."""
    tokens = [*WORDS, *(f"<0x{i:02X}>" for i in range(256))]
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>")
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@cache
def metaspace() -> Any:
    """A SentencePiece tokenizer without bytes."""
    backend = Tokenizer(models.Unigram([(t, -1.0) for t in WORDS], unk_id=2))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


# Whole characters of one to four bytes, parts of them, and bytes that are in no character.
BYTES = "\n a!\u00e9\u20ac\U0001f642".encode() + b"\xf0\x9f\x80\xbf\xff\xc0\xed\xa0"
KINDS = {
    "byte level": (
        cache(make_tokenizer),
        [1, *(3 + ALPHABET.index(bytes_to_unicode()[b]) for b in BYTES)],
    ),
    "byte fallback": (byte_fallback, [*range(10), *(10 + b for b in BYTES)]),
    "metaspace": (metaspace, list(range(10))),
}


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_the_stream_is_the_text_behind_the_prompt(kind, skips, data):
    make, ids = KINDS[kind]
    tokenizer = make()
    tokens = st.lists(st.sampled_from(ids), max_size=14)
    prompt, output = data.draw(tokens), data.draw(tokens)
    detokenizer = Detokenizer(tokenizer, prompt, skips)
    streamed = ""
    for token_id in output:
        streamed += detokenizer.push(token_id)
        assert not streamed.endswith("\ufffd")
    streamed += detokenizer.flush()
    whole = tokenizer.decode(prompt + output, skip_special_tokens=skips)
    before = tokenizer.decode(prompt, skip_special_tokens=skips)
    shared = sum(accumulate((a == b for a, b in zip(before, whole, strict=False)), min))
    assert streamed == whole[shared:]


def test_a_prompt_that_ends_within_a_character(tokenizer):
    first, *rest = tokenizer.encode("\u20ac")
    detokenizer = Detokenizer(tokenizer, [first])
    assert "".join(detokenizer.push(i) for i in rest) + detokenizer.flush() == "\u20ac"


def test_a_space_after_characters_of_several_tokens(tokenizer):
    prompt = tokenizer.encode("Hello\U0001f642\U0001f642")
    detokenizer = Detokenizer(tokenizer, prompt)
    assert "".join(detokenizer.push(i) for i in tokenizer.encode(" world !")) == " world !"


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


def extended(tokenizer: Any, token_ids: list[int], **settings: Any) -> RequestOutput:
    """What becomes of a request that draws these tokens."""
    params = SamplingParams(**{"seed": 1, "max_tokens": len(token_ids), **settings})
    rules = StopRules.of(params, [], len(tokenizer), tokenizer)
    request = Request(0, 0, "p", {"base": tokenizer.encode("p")}, params, rules, tokenizer)
    texts, output = "", None
    for token_id in token_ids:
        event = request.extend([token_id], [0.0], [0.0])
        texts, output = texts + event.text, event.output
        if output is not None:
            break
    assert output is not None and output.text == texts
    return output


def test_a_stop_string_in_what_waits_ends_the_request():
    """A byte of a character may follow it, or never come."""
    tokenizer = make_tokenizer()
    lines = tokenizer.encode("a\nb")
    stray = tokenizer.encode("\U0001f642")[0]
    output = extended(tokenizer, [lines[0], stray, lines[1], lines[2]], stop=["\n"])
    assert (output.text, output.finish_reason, output.stop_reason) == ("a\ufffd", "stop", "\n")
    tokenizer = byte_fallback()
    newline, euro = 10 + 10, 10 + 0xE2
    output = extended(tokenizer, [7, newline, euro], stop=["\n"])
    assert (output.text, output.token_ids, output.stop_reason) == ("a", [7, newline], "\n")
    output = extended(tokenizer, [7, euro, newline], stop=["\ufffd\ufffd"])
    assert (output.text, output.stop_reason) == ("a", "\ufffd\ufffd")


def test_special_tokens_are_shown_where_asked_for():
    """Also to stop strings, which may begin or end in one."""
    tokenizer = make_tokenizer(extra=("<turn>",))
    ids = tokenizer.encode("a<turn>b</s>")
    shown: dict[str, Any] = {"skip_special_tokens": False}
    assert extended(tokenizer, ids).text == "ab"
    assert extended(tokenizer, ids, **shown).text == "a<turn>b</s>"
    output = extended(tokenizer, ids, **shown, stop=["n>b"])
    assert (output.text, output.stop_reason) == ("a<tur", "n>b")
    # The token that ends it is no part of the text unless that is asked for.
    ended: dict[str, Any] = {**shown, "stop_token_ids": [2]}
    assert extended(tokenizer, ids, **ended).text == "a<turn>b"
    assert extended(tokenizer, ids, **ended, include_stop_str_in_output=True).text == "a<turn>b</s>"
    # A shown token ends a run of bytes at once.
    euro = [10 + byte for byte in "\u20ac".encode()]
    for skips, pieces in ((True, ["", "", "", ""]), (False, ["", "", "", "\u20ac</s>"])):
        detokenizer = Detokenizer(byte_fallback(), [0, 4], skips)
        assert [detokenizer.push(i) for i in (*euro, 1)] == pieces


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_that_is_a_special_token(include):
    tokenizer = make_tokenizer(extra=("<turn>",))
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    ids = [*tokenizer.encode("ab"), turn, *tokenizer.encode("c")]
    output = extended(tokenizer, ids, stop=["<turn>"], include_stop_str_in_output=include)
    assert output.text == ("ab<turn>" if include else "ab")
    assert (output.finish_reason, output.stop_reason) == ("stop", "<turn>")
    assert output.token_ids == ids[:3]
