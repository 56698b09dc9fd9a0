from __future__ import annotations

import pytest

from proxytune_kernels.trio.vocabulary import RoleVocabulary, VocabularyError, agree

TOKENS = dict(enumerate("abcdef"))


def roles(*vocabularies: RoleVocabulary) -> dict[str, RoleVocabulary]:
    return dict(zip(("base", "expert", "anti"), vocabularies, strict=False))


def test_equal_vocabularies():
    agreement = agree(roles(*[RoleVocabulary(TOKENS, 6)] * 3))
    assert (agreement.vocab_size, agreement.notes) == (6, ())


def test_padding_is_cut_and_named():
    agreement = agree(roles(RoleVocabulary(TOKENS, 6), RoleVocabulary(TOKENS, 64)))
    assert agreement.vocab_size == 6
    assert agreement.notes == ("expert: 58 padding ids from 6 on are never read",)


def test_padding_of_all_is_cut_too():
    assert agree(roles(*[RoleVocabulary(TOKENS, 8)] * 3)).vocab_size == 6


def test_tokens_that_a_role_lacks_are_never_produced():
    more = {**TOKENS, 6: "<x>", 7: "<y>"}
    agreement = agree(roles(RoleVocabulary(TOKENS, 16), RoleVocabulary(more, 16)))
    assert agreement.vocab_size == 6
    assert agreement.notes[-1] == (
        "expert: 2 tokens from id 6 on are never produced, since not every role has them "
        "('<x>', '<y>')"
    )


def test_a_gap_that_all_share_stays():
    gap = {i: t for i, t in TOKENS.items() if i != 3}
    assert agree(roles(*[RoleVocabulary(gap, 6)] * 3)).vocab_size == 6


def test_two_meanings_are_refused_with_the_first_ids():
    other = {**TOKENS, 2: "C", 4: "E"}
    wanted = "got 2 ids that differ, first id 2: base 'c', expert 'C'; id 4: base 'e', expert 'E'$"
    with pytest.raises(VocabularyError, match=wanted):
        agree(roles(RoleVocabulary(TOKENS, 6), RoleVocabulary(other, 6)))


def test_two_meanings_past_the_prefix_are_refused():
    one, two = {**TOKENS, 6: "<x>"}, {**TOKENS, 6: "<y>"}
    with pytest.raises(VocabularyError, match="id 6: base '<x>', expert '<y>', anti no token"):
        agree(roles(RoleVocabulary(one, 8), RoleVocabulary(two, 8), RoleVocabulary(TOKENS, 8)))


def test_a_token_missing_in_the_middle_is_refused():
    gap = {i: t for i, t in TOKENS.items() if i != 3}
    with pytest.raises(VocabularyError, match="first id 3: base 'd', expert no token"):
        agree(roles(RoleVocabulary(TOKENS, 6), RoleVocabulary(gap, 6)))


def test_no_common_token_is_refused():
    with pytest.raises(VocabularyError, match="id 0: base 'a', expert 'x'"):
        agree(roles(RoleVocabulary(TOKENS, 6), RoleVocabulary(dict(enumerate("xyz")), 6)))


def test_only_the_first_ids_are_shown():
    shifted = dict(enumerate("bcdefa"))
    with pytest.raises(VocabularyError) as caught:
        agree(roles(RoleVocabulary(TOKENS, 6), RoleVocabulary(shifted, 6)))
    assert str(caught.value).count("id ") == 5
