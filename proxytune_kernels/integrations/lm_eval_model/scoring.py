"""Log-likelihoods of continuations under the combined logits, for several alphas at once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels import ops
from proxytune_kernels.integrations.lm_eval_model.contexts import Tree, make_trees
from proxytune_kernels.integrations.lm_eval_model.states import Batch, RoleStates
from proxytune_kernels.trio import Trio

LOGITS_BYTES = 64 * 2**20
"""Logits of all roles that exist at the same time, about; at least one row of each."""

Score = tuple[float, bool]
"""Sum of a continuation's raw logprobs in nats, and whether greedy decoding would give it."""

_log = logging.getLogger(__name__)


class Scorer:
    """Runs a trio's models over contexts and continuations.

    Args:
        trio: the models; they are not changed.
        backend: of the ops; None is the fastest usable one.
    """

    def __init__(self, trio: Trio, backend: str | None = None) -> None:
        self.vocab_size = trio.vocab_size
        self._backend = backend
        self._roles = {
            role: RoleStates(role, model, trio.vocab_size) for role, model in trio.models.items()
        }
        for role, states in self._roles.items():
            if states.head_unknown is not None:
                _log.warning(
                    "logits of %s come from its own forward: %s", role, states.head_unknown
                )

    def info(self) -> dict[str, dict[str, str]]:
        """How each role's logits are made and contexts shared, as sentences."""
        return {
            "logits": {
                role: "of scored tokens alone, by the output layer"
                if states.head_unknown is None
                else f"by the model's own forward: {states.head_unknown}"
                for role, states in self._roles.items()
            },
            "contexts": {
                role: "run once for all their continuations"
                if states.contexts_apart is None
                else f"run with each continuation: {states.contexts_apart}"
                for role, states in self._roles.items()
            },
        }

    def score(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        alphas: Sequence[float],
        *,
        batch_size: int,
        max_length: int,
        scored: Callable[[int, tuple[Score, ...]], None],
    ) -> None:
        """Score continuations; each result goes to ``scored`` as soon as it is there.

        Args:
            requests: (context, continuation) token ids, neither empty.
            alphas: strengths of the steering; all share the forwards. Where all are 0 the small
                models do not run.
            batch_size: contexts, and continuations behind them, that run at the same time.
            max_length: tokens that are run for a request at most (:func:`make_trees`).
            scored: takes a request's place in the list, and its score for each alpha.
        """
        roles = self._running(alphas)
        share = all(states.contexts_apart is None for states in roles.values())
        trees = make_trees(requests, max_length, share=share)
        windows = [states.window for states in roles.values() if states.window is not None]
        for batch in _batches(trees, batch_size, min(windows, default=None)):
            rows = {role: states.rows(batch, batch_size) for role, states in roles.items()}
            self._finish(batch, rows, alphas, scored)

    def _running(self, alphas: Sequence[float]) -> dict[str, RoleStates]:
        """The roles that any alpha needs."""
        if any(alphas):
            return self._roles
        return {"base": self._roles["base"]}

    def _finish(
        self,
        batch: Batch,
        rows: dict[str, Tensor],
        alphas: Sequence[float],
        scored: Callable[[int, tuple[Score, ...]], None],
    ) -> None:
        """From states to the batch's scores."""
        sums = {leaf.request: [0.0] * len(alphas) for tree in batch.trees for leaf in tree.leaves}
        greedy = {request: [True] * len(alphas) for request in sums}
        targets: list[list[int]] = [[] for _ in range(len(rows["base"]))]
        requests: list[list[int]] = [[] for _ in targets]
        for row, target, request in batch.pairs():
            targets[row].append(target)
            requests[row].append(request)
        for first, found in self._chunks(rows, targets, alphas):
            for a, (logprobs, argmax) in enumerate(found):
                for i, (values, best) in enumerate(zip(logprobs, argmax, strict=True), first):
                    for value, target, request in zip(values, targets[i], requests[i], strict=True):
                        sums[request][a] += value
                        greedy[request][a] &= target == best
        for request, values in sums.items():
            scored(request, tuple(zip(values, greedy[request], strict=True)))

    def _chunks(
        self, rows: dict[str, Tensor], targets: Sequence[Sequence[int]], alphas: Sequence[float]
    ) -> Iterator[tuple[int, list[tuple[list[list[float]], list[int]]]]]:
        """(first row, per alpha the targets' logprobs and the argmax of each row)."""
        row_bytes = sum(self._roles[role].logits_bytes for role in rows)
        step = max(1, LOGITS_BYTES // row_bytes)
        for first in range(0, len(targets), step):
            chunk = slice(first, first + step)
            logits = {
                role: self._roles[role].logits(states[chunk]) for role, states in rows.items()
            }
            device = logits["base"].device
            logits = {role: x.to(device) for role, x in logits.items()}
            yield first, [self._at(logits, targets[chunk], alpha) for alpha in alphas]

    def _at(
        self, logits: dict[str, Tensor], targets: Sequence[Sequence[int]], alpha: float
    ) -> tuple[list[list[float]], list[int]]:
        """Raw logprobs of each row's targets, and each row's argmax (lowest id on ties)."""
        base, expert, anti = logits["base"], logits.get("expert"), logits.get("anti")
        settings: Any = {"vocab_size": self.vocab_size, "backend": self._backend}
        drawn = ops.sample(base, expert, anti, alpha=alpha, temperature=0.0, **settings)
        logprobs: list[list[float]] = [[] for _ in targets]
        by_count: dict[int, list[int]] = {}
        for i, row in enumerate(targets):
            by_count.setdefault(len(row), []).append(i)
        for count, places in by_count.items():
            ids = torch.tensor([targets[i] for i in places], device=base.device)
            found = ops.score(
                _repeated(base, places, count),
                None if expert is None else _repeated(expert, places, count),
                None if anti is None else _repeated(anti, places, count),
                ids,
                alpha,
                **settings,
            )
            # Tokens that not every role has are never produced.
            found = found.masked_fill(ids.ge(self.vocab_size), -math.inf)
            for i, values in zip(places, found.tolist(), strict=True):
                logprobs[i] = values
        return logprobs, drawn.token_ids.tolist()


def _repeated(x: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Chosen rows of logits [B, V] for several targets each, [n, count, V], read in place."""
    return x[rows][:, None].expand(-1, count, -1)


def _batches(trees: Sequence[Tree], size: int, window: int | None) -> Iterator[Batch]:
    """Trees in batches of one kind, in their order: those with branches, and those without.

    Those with branches are of one length where padding could push what a branch sees out of the
    window.
    """
    for plain in (False, True):
        batch: list[Tree] = []
        for tree in (tree for tree in trees if tree.is_plain == plain):
            if len(batch) == size or not (plain or _together(batch, tree, window)):
                yield Batch(batch)
                batch = []
            batch.append(tree)
        if batch:
            yield Batch(batch)


def _together(batch: Sequence[Tree], tree: Tree, window: int | None) -> bool:
    """Whether a tree's branches can run in one batch with those of longer ones."""
    if not batch or window is None or len(tree.trunk) == len(batch[0].trunk):
        return True
    longest = max(len(tokens) for each in (*batch, tree) for _, tokens in each.branches())
    return len(batch[0].trunk) + longest <= window
