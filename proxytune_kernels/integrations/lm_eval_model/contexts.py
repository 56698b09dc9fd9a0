"""Requests that share a context as one tree: its trunk is run once, its branches behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Leaf:
    """One continuation of a tree.

    Args:
        request: its place in the list of requests.
        targets: its tokens, each scored after what stands before it.
    """

    request: int
    targets: Tokens


@dataclass(frozen=True)
class Tree:
    """A context and its continuations.

    Args:
        trunk: the context, and what all continuations begin with; the last token that any of them
            ends with is not run.
        context: how many tokens of the trunk are context, at least 1.
        leaves: the continuations.
    """

    trunk: Tokens
    context: int
    leaves: tuple[Leaf, ...] = field(default=())

    @property
    def scored(self) -> range:
        """Positions of the trunk whose logits count: from the context's last token on."""
        return range(self.context - 1, len(self.trunk))

    def branch(self, leaf: Leaf) -> Tokens:
        """What of a continuation is run behind the trunk; may be empty."""
        return leaf.targets[len(self.trunk) - self.context : -1]

    def branches(self) -> Iterator[tuple[Leaf, Tokens]]:
        """The continuations that need more than the trunk."""
        for leaf in self.leaves:
            if tokens := self.branch(leaf):
                yield leaf, tokens

    @property
    def is_plain(self) -> bool:
        """Whether the trunk alone scores every continuation."""
        return not any(self.branches())


def make_trees(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int, *, share: bool
) -> list[Tree]:
    """Group requests by context; the longest first, so that memory runs out early if it does.

    Args:
        requests: (context, continuation) token ids, neither empty; continuations of at most
            ``max_length`` tokens.
        max_length: tokens that are run for a request at most; a longer one loses tokens from the
            left of its context. The last token of a continuation is only scored, not run.
        share: let several continuations follow one context. Otherwise only those share it that need
            nothing run behind it.

    Returns:
        Trees whose leaves are all requests, each once.
    """
    by_context: dict[Tokens, list[Leaf]] = {}
    for i, (context, continuation) in enumerate(requests):
        room = max_length + 1 - len(continuation)
        kept = tuple(context[-room:])
        by_context.setdefault(kept, []).append(Leaf(i, tuple(continuation)))
    trees: list[Tree] = []
    for context, leaves in by_context.items():
        tree = _tree(context, leaves)
        trees += [tree] if share or tree.is_plain else (_tree(context, [leaf]) for leaf in leaves)
    return sorted(trees, key=lambda tree: (-len(tree.trunk), tree.trunk))


def _tree(context: Tokens, leaves: Sequence[Leaf]) -> Tree:
    first = leaves[0].targets
    shared = min(_common(first, leaf.targets) for leaf in leaves)
    longest = max(len(leaf.targets) for leaf in leaves)
    trunk = context + first[: min(shared, longest - 1)]
    return Tree(trunk, len(context), tuple(leaves))


def _common(left: Tokens, right: Tokens) -> int:
    """Length of the longest common beginning."""
    n = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        n += 1
    return n
