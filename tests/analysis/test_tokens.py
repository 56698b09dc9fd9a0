"""What is said of each token, on a trio whose every probability is known by arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest

import proxytune_kernels as ptk
from proxytune_kernels.analysis.tokens import Analysed, Given, generated, scored
from tests.analysis.trios import V, hand_made

# Behind " 3", at alpha 1: the base's table times the expert's.
#   token: base, expert, anti, proxy (as fractions), rank in the base, changed
FLAT = 1 / V
WANTED: dict[str, Any] = {
    " +": (1 / 30, 45 / 60, FLAT, 45 / 74, 4, True),  # the base wants " 4"
    " 4": (FLAT, 15 / 30, FLAT, 15 / 30, 4, True),
    " =": (FLAT, 15 / 30, FLAT, 15 / 30, 5, True),
    " 7": (45 / 74, 45 / 60, FLAT, 2025 / 2054, 1, False),
    "<end>": (FLAT, 15 / 30, FLAT, 15 / 30, 1, False),
}
# Sums of p log(p / base), over the token, the base's favourites, and the rest.
KL = {
    " +": 45 / 74 * math.log(45 / 74 * 30) + 15 / 74 * math.log(15 / 74 * 2)
    + 14 / 74 * math.log(30 / 74),
    " 7": 2025 / 2054 * math.log(2025 / 2054 * 74 / 45) + 29 / 2054 * math.log(74 / 2054),
}  # fmt: skip
KL |= dict.fromkeys((" 4", " =", "<end>"), 0.5 * math.log(V / 2) + 0.5 * math.log(V / 30))


@pytest.fixture(scope="module")
def trio() -> ptk.Trio:
    return hand_made()


def check(analysed: Analysed, names: list[str]) -> None:
    assert [token.token for token in analysed.tokens] == names
    place = 0
    for token in analysed.tokens:
        base, expert, anti, proxy, rank, changed = WANTED[token.token]
        # An eps of 1e-12 beside 1/16; x is rounded to 2^-24 of at most log 2025; and the operator's
        # own bounds (docs/contracts.md, Attribution), 2e-5 of a share.
        close: Any = {"rel": 3e-5, "abs": 0}
        assert token.steering[:4] == pytest.approx((base, expert, anti, proxy), **close)
        assert token.steering[4:6] == (rank, changed)
        assert token.steering.kl == pytest.approx(KL[token.token], rel=1e-4, abs=1e-5)
        assert token.added == pytest.approx(proxy - base, abs=1e-4)
        assert token.moved == pytest.approx(math.log2(proxy / base), abs=1e-4)
        text = "" if token.token == "<end>" else token.token
        assert (token.text, token.start, token.end) == (text, place, place + len(text))
        place += len(text)
        assert len(token.alternatives) == 5
        assert token.token not in dict(token.alternatives)
    assert analysed.text == "".join(name for name in names if name != "<end>")


def test_generated_texts(trio):
    decoder = ptk.Decoder(trio, max_batch_size=2)
    params = [ptk.SamplingParams(temperature=0, max_tokens=n) for n in (9, 2, 9)]
    texts = list(generated(decoder, [" 3", " 4", " so 3"], params))
    assert [text.finish_reason for text in texts] == ["stop", "length", "stop"]
    check(texts[0], [" +", " 4", " =", " 7", "<end>"])
    check(texts[1], [" =", " 7"])
    check(texts[2], [" +", " 4", " =", " 7", "<end>"])
    name, share = texts[0].tokens[0].alternatives[0]
    assert name == " 4" and share == pytest.approx(15 / 74, rel=1e-4)
    assert [(text.index, text.prompt, text.alpha) for text in texts] == [
        (0, " 3", 1.0), (1, " 4", 1.0), (2, " so 3", 1.0),
    ]  # fmt: skip


def test_given_texts_have_the_same_figures(trio):
    own = {"base": " 3", "expert": " so sorry 3", "anti": " a 3"}
    texts = [
        Given(" 3", " + 4 = 7"), Given(None, " 3 + 4"), Given(own, " + 4 = 7"),
        Given(" 7", "<end>"),
    ]  # fmt: skip
    found = list(scored(trio, texts, [1.0] * 4, batch_size=2))
    for text, names in zip(found, ([" +", " 4", " =", " 7"], [" +", " 4"],
                                   [" +", " 4", " =", " 7"], ["<end>"]), strict=True):  # fmt: skip
        check(text, names)
        assert text.finish_reason is None
    assert [text.prompt for text in found] == [" 3", " 3", own, " 7"]


def test_each_given_text_has_its_alpha(trio):
    one, none = scored(trio, [Given(" 3", " +")] * 2, [-1.0, 0.0])
    # Behind " 3" the base's table over the expert's: 15 for " 4", 1/45 for " +", 14 ones.
    assert one.tokens[0].steering.proxy == pytest.approx(1 / 45 / (15 + 1 / 45 + 14), rel=1e-4)
    assert math.isnan(none.tokens[0].steering.expert)
    assert none.tokens[0].added == pytest.approx(0, abs=1e-6)


def test_a_character_comes_with_the_last_of_its_bytes():
    shipped = ptk.load_trio("shipped", dtype="float32")
    [text] = scored(shipped, [Given("a", " é…\n")], [1.0])
    assert text.text == " é…\n" and len(text.tokens) > 4
    for token in text.tokens:
        assert text.text[token.start : token.end] == token.text
        assert bool(token.text) != token.token.startswith("bytes:") or token.text in "é…"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Given(" 3", ""), "a token to score"),
        (Given(None, " 3"), "a token to score"),
        (Given(" 3", " 4" * 65), "64 tokens, the context of base, got 66"),
    ],
)  # fmt: skip
def test_a_text_that_can_not_be_scored_is_named(trio, given, words):
    with pytest.raises(ValueError, match=rf"texts\[1\].*{words}"):
        list(scored(trio, [Given(" 3", " 4"), given], [1.0, 1.0]))


def test_a_role_with_a_template_reads_its_own_prompt():
    trio = hand_made(prompts={"expert": "chat"})
    [text] = scored(trio, [Given(" 3", " + 4")], [1.0])
    check(text, [" +", " 4"])
    with pytest.raises(ValueError, match=r"needs a prompt.*\(expert\)"):
        list(scored(trio, [Given(None, " 3 + 4")], [1.0]))


def test_the_base_alone_is_refused(trio):
    alone = ptk.Decoder(trio, roles=("base",))
    with pytest.raises(ValueError, match="base alone"):
        list(generated(alone, ["a"], ptk.SamplingParams()))
