"""Vocabulary agreement: which token ids mean the same to every model of a trio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_SHOWN = 5
"""Ids that a message shows; a disagreement usually goes on for thousands."""


@dataclass(frozen=True)
class RoleVocabulary:
    """One role's side of the comparison.

    Args:
        tokens: token by id, as its tokenizer has them.
        width: number of logits the model gives; ids from ``len(tokens)`` on are padding.
    """

    tokens: Mapping[int, str]
    width: int

    @classmethod
    def of(cls, tokenizer: Any, width: int) -> RoleVocabulary:
        """That of a transformers tokenizer and a model of so many logits."""
        tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
        return cls(tokens, width)


@dataclass(frozen=True)
class Agreement:
    """The agreed width, and in words what lies past it in each role."""

    vocab_size: int
    notes: tuple[str, ...]


class VocabularyError(ValueError):
    """The models of a trio do not share a vocabulary."""


def agree(vocabularies: Mapping[str, RoleVocabulary]) -> Agreement:
    """Find the ids that mean the same to all roles, the common prefix of their vocabularies.

    Padding past the prefix (ids with no token), and tokens past it that some role has no token for,
    can't be produced: they are cut off, and named in the notes. A role may still read them in a
    prompt.

    Args:
        vocabularies: role -> its tokens and width.

    Raises:
        VocabularyError: an id within the prefix or past it stands for two tokens, or no id agrees;
            names the first such ids.

    Example:
        >>> short, padded = RoleVocabulary({0: "a", 1: "b"}, 2), RoleVocabulary({0: "a", 1: "b"}, 8)
        >>> agree({"base": short, "expert": padded}).vocab_size
        2

    Source: shared vocabulary of Liu et al. 2024, arXiv 2401.08565, section 2.
    """
    width = min(v.width for v in vocabularies.values())
    shared = [i for i in range(width) if _token(vocabularies, i) is not None]
    vocab_size = shared[-1] + 1 if shared else 0
    differing = [i for i in range(width) if _differs(vocabularies, i, vocab_size)]
    if differing or not shared:
        raise VocabularyError(_disagreement(vocabularies, differing or list(range(width))))
    return Agreement(vocab_size, tuple(_notes(vocabularies, vocab_size)))


def _token(vocabularies: Mapping[str, RoleVocabulary], token_id: int) -> str | None:
    """The token that all roles have at an id, or None."""
    tokens = {v.tokens.get(token_id) for v in vocabularies.values()}
    return tokens.pop() if len(tokens) == 1 else None


def _differs(vocabularies: Mapping[str, RoleVocabulary], token_id: int, vocab_size: int) -> bool:
    tokens = {v.tokens.get(token_id) for v in vocabularies.values()}
    if token_id >= vocab_size:
        # Past the prefix nothing is produced; two meanings there still say that these are not the
        # tokenizers of one family.
        tokens.discard(None)
    return len(tokens) > 1


def _disagreement(vocabularies: Mapping[str, RoleVocabulary], ids: list[int]) -> str:
    def row(token_id: int) -> str:
        tokens = ", ".join(
            f"{role} {v.tokens[token_id]!r}" if token_id in v.tokens else f"{role} no token"
            for role, v in vocabularies.items()
        )
        return f"id {token_id}: {tokens}"

    rows = "; ".join(row(i) for i in ids[:_SHOWN])
    return (
        f"{', '.join(vocabularies)} must share one vocabulary, got {len(ids)} ids that differ, "
        f"first {rows}"
    )


def _notes(vocabularies: Mapping[str, RoleVocabulary], vocab_size: int) -> Iterator[str]:
    for role, vocabulary in vocabularies.items():
        padding = sum(i not in vocabulary.tokens for i in range(vocab_size, vocabulary.width))
        if padding:
            yield f"{role}: {padding} padding ids from {vocab_size} on are never read"
        cut = sorted(i for i in vocabulary.tokens if i >= vocab_size)
        if cut:
            names = ", ".join(repr(vocabulary.tokens[i]) for i in cut[:_SHOWN])
            more = ", ..." if len(cut) > _SHOWN else ""
            yield (
                f"{role}: {len(cut)} tokens from id {vocab_size} on are never produced, since not "
                f"every role has them ({names}{more})"
            )
