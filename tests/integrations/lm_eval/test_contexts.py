"""Requests by context: every token is scored after exactly what stands before it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune_kernels.decoder.scoring import Batch, make_trees

MAX_LENGTH = 5
# Few tokens and short texts: many contexts and beginnings are the same.
tokens = st.integers(0, 1)
requests = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=7).map(tuple),
        st.lists(tokens, min_size=1, max_size=MAX_LENGTH).map(tuple),
    ),
    max_size=8,
)


def row_texts(batch: Batch) -> list[tuple[int, ...]]:
    """What stands before each row's prediction, in the order that Batch describes."""
    trunks = [tree.trunk[: i + 1] for tree in batch.trees for i in tree.scored]
    branches = [
        (*batch.trees[tree].trunk, *own[: i + 1])
        for tree, own in batch.branches
        for i in range(len(own))
    ]
    return trunks + branches


@settings(max_examples=300, deadline=None)
@given(requests, st.booleans())
def test_every_token_is_predicted_from_its_own_text(listed, share):
    trees = make_trees(listed, MAX_LENGTH, share=share)
    assert share or all(tree.is_plain for tree in trees)
    batch = Batch(trees)
    texts = row_texts(batch)
    found: dict[int, list[tuple[tuple[int, ...], int]]] = {i: [] for i in range(len(listed))}
    for row, target, request in batch.pairs():
        found[request].append((texts[row], target))
    for i, (context, continuation) in enumerate(listed):
        # What lm_eval runs: the last max_length + 1 tokens, without the very last.
        whole = (context + continuation)[-(MAX_LENGTH + 1) :]
        start = len(whole) - len(continuation)
        wanted = [(whole[: start + n], token) for n, token in enumerate(continuation)]
        assert found[i] == wanted
    # Every row has a token to score: nothing runs for nothing.
    assert {row for row, _, _ in batch.pairs()} == set(range(len(texts)))


def test_what_is_shared_runs_once():
    context = (7,) * 50
    continuations = [(1, 2, 3), (1, 2, 4, 5), (1, 2), (1, 2, 3)]
    listed = [(context, c) for c in continuations]
    [tree] = make_trees(listed, 100, share=True)
    assert tree.trunk == (*context, 1, 2)
    assert [tokens for _, tokens in tree.branches()] == [(4,)]
    apart = make_trees(listed, 100, share=False)
    assert sorted(len(tree.trunk) for tree in apart) == [51, 52, 52, 53]


def test_one_token_continuations_share_a_context_on_any_model():
    listed = [((5, 6), (token,)) for token in range(4)]
    for share in (True, False):
        [tree] = make_trees(listed, 100, share=share)
        assert tree.trunk == (5, 6) and tree.is_plain


def test_the_longest_run_first():
    listed = [((1,) * n, (2,)) for n in (3, 9, 5)]
    assert [len(tree.trunk) for tree in make_trees(listed, 100, share=True)] == [9, 5, 3]
