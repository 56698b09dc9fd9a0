from __future__ import annotations

import pytest

from proxytune_kernels.trio.vocabulary import RoleVocabulary, VocabularyError, agree

TOKENS = dict(enumerate("abcdef"))


def roles(*vocabularies: RoleVocabulary) -> dict[str, RoleVocabulary]:
    return dict(zip(("base", "expert", "anti"), vocabularies, strict=False))


GAP = {i: t for i, t in TOKENS.items() if i != 3}
LACKED = (
    "expert: 2 tokens from id 6 on are never produced, since not every role has them ('<x>', '<y>')"
)


@pytest.mark.parametrize(
    ("vocabularies", "notes"),
    [
        ([(TOKENS, 6)] * 3, ()),
        ([(TOKENS, 6), (TOKENS, 64)], ("expert: 58 padding ids from 6 on are never read",)),
        ([(TOKENS, 16), ({**TOKENS, 6: "<x>", 7: "<y>"}, 16)], (LACKED,)),
        ([(GAP, 6)] * 3, ()),
    ],
    ids=["equal", "padding", "tokens-that-a-role-lacks", "a-gap-that-all-share"],
)
def test_the_shared_ids_and_what_is_said_of_the_others(vocabularies, notes):
    agreement = agree(roles(*[RoleVocabulary(*each) for each in vocabularies]))
    assert agreement.vocab_size == 6
    assert agreement.notes[-1:] == notes


def test_padding_of_all_is_cut_too():
    assert agree(roles(*[RoleVocabulary(TOKENS, 8)] * 3)).vocab_size == 6


@pytest.mark.parametrize(
    ("vocabularies", "message"),
    [
        (
            [TOKENS, {**TOKENS, 2: "C", 4: "E"}],
            "got 2 ids that differ, first id 2: base 'c', expert 'C'; id 4: base 'e', expert 'E'$",
        ),
        (
            [{**TOKENS, 6: "<x>"}, {**TOKENS, 6: "<y>"}, TOKENS],
            "id 6: base '<x>', expert '<y>', anti no token",
        ),
        ([TOKENS, GAP], "first id 3: base 'd', expert no token"),
        ([TOKENS, dict(enumerate("xyz"))], "id 0: base 'a', expert 'x'"),
    ],
)
def test_ids_of_two_meanings_are_refused_by_name(vocabularies, message):
    with pytest.raises(VocabularyError, match=message):
        agree(roles(*[RoleVocabulary(tokens, 8) for tokens in vocabularies]))


def test_only_the_first_ids_are_shown():
    shifted = dict(enumerate("bcdefa"))
    with pytest.raises(VocabularyError) as caught:
        agree(roles(RoleVocabulary(TOKENS, 6), RoleVocabulary(shifted, 6)))
    assert str(caught.value).count("id ") == 5
