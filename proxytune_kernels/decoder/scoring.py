"""Given texts under the combined logits: their log-likelihoods, or what steering does to them.

Requests that share a context are one tree: its trunk is run once, and its branches behind it. Each
role's model gives the final states of the tokens that are scored (:class:`RoleStates`); logits are
made from them later, a few rows at a time (:class:`Scorer`).
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune_kernels import ops
from proxytune_kernels.decoder.cache import cache_keyword
from proxytune_kernels.decoder.check import Text, check_causal, compare, own_logits
from proxytune_kernels.decoder.model import Forward, check_model, input_device
from proxytune_kernels.decoder.remote import complete
from proxytune_kernels.decoder.states import is_recurrent
from proxytune_kernels.heads import logit_transform
from proxytune_kernels.trio import Trio
from proxytune_kernels.trio.remote import RemoteModel

LOGITS_BYTES = 64 * 2**20
"""Logits of all roles that exist at the same time, about; at least one row of each."""

SHORT = 256
"""Tokens of a trunk. Behind a shorter one more branches run at once: they read as many keys."""

_PROBE = 8
"""Tokens that a head is tried on before it is trusted."""

_TRIED = 64
"""Tokens at most on which shared contexts are tried."""

Tokens = tuple[int, ...]

Score = tuple[float, bool]
"""Sum of a continuation's raw logprobs in nats, and whether greedy decoding would give it."""

_log = logging.getLogger(__name__)


class Attributed(NamedTuple):
    """What steering does at each token of a text, one entry a token."""

    steering: list[list[float]]
    """The fields of :class:`~proxytune_kernels.reference.Attribution`."""
    top_token_ids: list[list[int]]
    top_logprobs: list[list[float]]
    """The likeliest tokens of the combined logits, and their raw logprobs."""


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
    leaves: tuple[Leaf, ...]

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
    longest = max(len(leaf.targets) for leaf in leaves)
    columns = zip(*(leaf.targets for leaf in leaves), strict=False)
    shared = tuple(column[0] for column in takewhile(lambda c: len(set(c)) == 1, columns))
    return Tree(context + shared[: longest - 1], len(context), tuple(leaves))


@dataclass(frozen=True)
class Batch:
    """Trees that run together, and the order of their scored rows.

    Rows are first those of the trunks (:attr:`Tree.scored`), tree by tree, then those of the
    branches (every token), branch by branch.
    """

    trees: Sequence[Tree]

    @property
    def branches(self) -> list[tuple[int, Tokens]]:
        """(index of the tree, tokens) of each branch."""
        return [(i, tokens) for i, tree in enumerate(self.trees) for _, tokens in tree.branches()]

    def pairs(self) -> list[tuple[int, int, int]]:
        """(row, target token, request) of every token that is scored."""
        found = []
        start = 0
        behind = sum(len(tree.scored) for tree in self.trees)
        for tree in self.trees:
            own = len(tree.scored)
            for leaf in tree.leaves:
                more = len(tree.branch(leaf))
                rows = [*range(start, start + own), *range(behind, behind + more)]
                # A continuation that ends within the trunk has fewer targets than rows.
                for row, target in zip(rows, leaf.targets, strict=False):
                    found.append((row, target, leaf.request))
                behind += more
            start += own
        return found


class RoleStates:
    """A causal LM that gives final states, and logits of them."""

    def __init__(self, role: str, model: Any, vocab_size: int) -> None:
        self.role = role
        self.model = model
        self.device = input_device(model)
        self._forward = Forward(model)
        self._cache_name = cache_keyword(model.base_model.forward)
        check_causal(role, model)
        self.head_unknown = self._why_head_is_unknown(vocab_size)
        self.contexts_apart = self._why_contexts_run_apart()
        # Padding between a trunk and its branch takes up as much of a sliding window.
        self.window = None if self.contexts_apart is not None else _window(model)

    @property
    def logits_bytes(self) -> int:
        """Bytes of one row of logits."""
        return int(self.model.get_output_embeddings().weight.shape[0]) * self.model.dtype.itemsize

    def _why_head_is_unknown(self, vocab_size: int) -> str | None:
        """None where output layer, scale and soft cap make the model's own logits."""
        try:
            self._transform = logit_transform(self.model.config.get_text_config())
        except ValueError as error:
            return str(error)
        ids = torch.arange(_PROBE, device=self.device)[None] % vocab_size
        with torch.inference_mode():
            own = self.model(ids, use_cache=False).logits.float()
            made = self._from_head(self._body(ids).last_hidden_state).float()
        # The same product on the same states: only a scale's reciprocal and its order may round.
        unit = torch.finfo(self.model.dtype).eps
        if not torch.allclose(own, made.to(own.device), rtol=4 * unit, atol=4 * unit):
            return "its output layer, scale and soft cap do not make the logits of its own forward"
        return None

    def _why_contexts_run_apart(self) -> str | None:
        """None where continuations can follow a context's keys and values."""
        if self.head_unknown is not None:
            return "its logits come from its own forward"
        if is_recurrent(self.model):
            return "padding would enter the states of its layers"
        try:
            check_model(self.role, self.model)
        except ValueError as error:
            return str(error)
        body = inspect.signature(self.model.base_model.forward).parameters
        wanted = ("attention_mask", "position_ids", self._cache_name)
        missing = [name for name in wanted if name not in body]
        return f"its body's forward takes no {missing[0]}" if missing else self._difference()

    def _difference(self) -> str | None:
        """How logits behind a context that was run once differ from the model's own, if they do."""
        text = Text(self.model, _TRIED)
        # What padding takes up of a window is for :func:`_together` to keep out.
        cuts = (text.prompt, text.prompt if text.windows else 2)
        trees = []
        for i, (ids, cut) in enumerate(zip(text.token_ids, cuts, strict=True)):
            trees.append(Tree(tuple(ids[:cut]), 1, (Leaf(i, tuple(ids[1:])),)))
        try:
            found = self.logits(self.rows(Batch(trees), len(trees))).float()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            return f"its forward behind a cache raises {type(error).__name__}: {error}"
        own = own_logits(self.role, self.model, text.token_ids)
        # The last token is not run; trunks come before branches.
        parts = [x[:cut] for x, cut in zip(own, cuts, strict=True)]
        parts += [x[cut:-1] for x, cut in zip(own, cuts, strict=True)]
        difference, bound = compare(self.model, found, torch.cat(parts))
        if difference <= bound:
            return None
        return (
            f"logits behind a cache differ by {difference:.3g} (root mean square) from its own "
            f"forward's, where rounding explains {bound:.3g}"
        )

    @torch.inference_mode()
    def rows(self, batch: Batch, batch_size: int) -> Tensor:
        """States [N, H] of a batch's rows, in its order; logits [N, V] where no head is known.

        Args:
            batch: trees; with branches only where :attr:`contexts_apart` is None, and then of one
                length or within :attr:`window`.
            batch_size: branches that run at the same time; more behind short trunks.
        """
        if self.head_unknown is not None:
            return self._own_logits(batch)
        branches = batch.branches
        cache = _empty_cache(self.model) if branches else None
        # Padding stands behind the tokens, which do not see it: no mask, and no row sees nothing.
        ids = _padded([tree.trunk for tree in batch.trees], self.device)
        keywords = {self._cache_name: cache, "use_cache": True} if branches else {}
        output = self._body(ids, **keywords)
        found = [_scored(output.last_hidden_state, batch.trees)]
        del output
        lengths = torch.tensor([len(tree.trunk) for tree in batch.trees])
        at_once = batch_size * max(1, SHORT // ids.shape[1])
        for first in range(0, len(branches), at_once):
            part = branches[first : first + at_once]
            found.append(self._behind(cache, ids.shape[1], lengths, part))
        return torch.cat(found)

    def _behind(
        self, cache: Any, width: int, lengths: Tensor, part: Sequence[tuple[int, Tokens]]
    ) -> Tensor:
        """States of branches, run behind the trunks that ``cache`` holds in ``width`` places."""
        # Indices stay on the host: layers of one model may be on several devices.
        trunks = torch.tensor([i for i, _ in part])
        ids = _padded([tokens for _, tokens in part], self.device)
        counts = torch.tensor([len(tokens) for _, tokens in part])
        places = torch.arange(ids.shape[1])
        # A trunk's padding lies between it and its branch, and is not seen. A branch's lies behind
        # it, and sees itself: a row that sees nothing would be NaN, and so would what it hides.
        seen = torch.arange(width) < lengths[trunks, None]
        mask = torch.cat([seen, torch.ones_like(ids, dtype=torch.bool, device="cpu")], dim=1)
        hidden = self._body(
            ids,
            attention_mask=mask.long().to(self.device),
            position_ids=(lengths[trunks, None] + places).to(self.device),
            **{self._cache_name: _selected(cache, trunks), "use_cache": True},
        ).last_hidden_state
        return hidden[places < counts[:, None]]

    def _own_logits(self, batch: Batch) -> Tensor:
        """Logits [N, V] by the model's own forward, of as few positions as it takes."""
        trees = batch.trees
        ids = _padded([tree.trunk for tree in trees], self.device)
        first = min(tree.scored.start for tree in trees)
        logits = self._forward(ids, keep=ids.shape[1] - first)
        return _scored(logits, trees, first)

    @torch.inference_mode()
    def logits(self, rows: Tensor) -> Tensor:
        """Logits [n, V] of rows that :meth:`rows` gave; fp32 or narrower, as the ops take them."""
        logits = rows if self.head_unknown is not None else self._from_head(rows)
        return logits.float() if logits.dtype == torch.float64 else logits

    def _from_head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        if (scale := self._transform.get("logit_scale")) is not None:
            logits = logits * scale
        if (cap := self._transform.get("soft_cap")) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _body(self, ids: Tensor, **keywords: Any) -> Any:
        return self.model.base_model(input_ids=ids, **{"use_cache": False, **keywords})


class RemoteStates:
    """The same of a base behind an API: its states are the log-probabilities that it tells."""

    head_unknown = contexts_apart = "it answers from elsewhere"
    window = None

    def __init__(self, model: RemoteModel) -> None:
        self.model = model
        self.logits_bytes = 4 * model.width

    def rows(self, batch: Batch, batch_size: int) -> Tensor:
        """fp32 [N, V] of a batch's rows; a call for each number of scored tokens that there is."""
        by_count: dict[int, list[int]] = {}
        for i, tree in enumerate(batch.trees):
            by_count.setdefault(len(tree.scored), []).append(i)
        found: dict[int, Tensor] = {}
        for count, places in by_count.items():
            logits = self.model.score([batch.trees[i].trunk for i in places], count)
            found |= zip(places, logits, strict=True)
        return torch.cat([found[i] for i in range(len(batch.trees))])

    def logits(self, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows.to(self.model.device)


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [B, longest]; token 0 behind those that are shorter."""
    width = max(map(len, sequences))
    rows = [[*tokens, *[0] * (width - len(tokens))] for tokens in sequences]
    return torch.tensor(rows, device=device)


def _scored(states: Tensor, trees: Sequence[Tree], first: int = 0) -> Tensor:
    """The trunks' scored rows [N, ...], of states [B, width, ...] from position ``first`` on."""
    rows = [i for i, tree in enumerate(trees) for _ in tree.scored]
    columns = [position - first for tree in trees for position in tree.scored]
    return states[torch.tensor(rows), torch.tensor(columns)]


def _empty_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _selected(cache: Any, rows: Tensor) -> Any:
    """A cache of some rows of ``cache``, which stays as it is."""
    chosen = copy.copy(cache)
    # Selecting makes new tensors of a layer's; the copies hold them.
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _window(model: Any) -> int | None:
    """Tokens that the narrowest sliding attention sees; None where all layers see all."""
    layers = _empty_cache(model).layers
    widths = [w for w in (getattr(layer, "sliding_window", None) for layer in layers) if w]
    return min(widths, default=None)


class Scorer:
    """Runs a trio's models over contexts and continuations."""

    def __init__(self, trio: Trio, backend: str | None = None) -> None:
        trio.check_one_pair("scoring texts")
        self.vocab_size = trio.vocab_size
        self._backend = backend
        self._roles = {
            role: RemoteStates(model)
            if isinstance(model, RemoteModel)
            else RoleStates(role, model, trio.vocab_size)
            for role, model in trio.models.items()
        }
        for role, states in self._roles.items():
            if states.head_unknown is not None and isinstance(states, RoleStates):
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
        alphas: Sequence[float | str],
        *,
        batch_size: int,
        max_length: int,
        scored: Callable[[int, tuple[Score, ...]], None],
    ) -> None:
        """Score continuations; each result goes to ``scored`` as soon as it is there.

        Args:
            requests: (context, continuation) token ids, neither empty.
            alphas: strengths of the steering, or the role of a member alone; all share the
                forwards. Where all are 0 or ``"base"`` the small models do not run.
            batch_size: contexts, and continuations behind them, that run at the same time.
            max_length: tokens that are run for a request at most (:func:`make_trees`).
            scored: takes a request's place in the list, and its score for each alpha.
        """
        steered = any(alpha not in (0, "base") for alpha in alphas)
        roles = self._roles if steered else {"base": self._roles["base"]}
        share = all(states.contexts_apart is None for states in roles.values())
        trees = make_trees(requests, max_length, share=share)
        windows = [states.window for states in roles.values() if states.window is not None]
        for batch in _batches(trees, batch_size, min(windows, default=None)):
            rows = {role: states.rows(batch, batch_size) for role, states in roles.items()}
            self._finish(batch, rows, alphas, scored)

    def _finish(
        self,
        batch: Batch,
        rows: dict[str, Tensor],
        alphas: Sequence[float | str],
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
        for chunk, logits in self._chunks(rows):
            proxy = self._complete(logits)
            alone: dict[float | str, dict[str, Tensor]]
            alone = {role: {"base": x} for role, x in logits.items()}
            alone["base"] = self._complete({"base": logits["base"]})
            for a, alpha in enumerate(alphas):
                # At 0 the base is by itself.
                own = alone.get(alpha or "base", proxy)
                strength = 0.0 if isinstance(alpha, str) else alpha
                found = zip(*self._at(own, targets[chunk], strength), strict=True)
                for i, (values, best) in enumerate(found, chunk.start):
                    for value, target, request in zip(values, targets[i], requests[i], strict=True):
                        sums[request][a] += value
                        greedy[request][a] &= target == best
        for request, values in sums.items():
            scored(request, tuple(zip(values, greedy[request], strict=True)))

    def attribute(
        self,
        texts: Sequence[tuple[Mapping[str, Sequence[int]], Sequence[int]]],
        alphas: Sequence[float],
        *,
        batch_size: int,
        top_logprobs: int,
    ) -> Iterator[tuple[int, Attributed]]:
        """Say of each token of given texts what steering does there; one forward of each role.

        Args:
            texts: (role -> token ids of its context, token ids that follow it), none empty; all
                roles read the same ids behind contexts of their own.
            alphas: strength of the steering, one per text.
            batch_size: texts that run at the same time.
            top_logprobs: of the likeliest tokens at each place, how many to give.

        Returns:
            A text's place in the list with what was found, the longest text first.
        """

        def length(i: int) -> int:
            return max(map(len, texts[i][0].values())) + len(texts[i][1])

        order = sorted(range(len(texts)), key=length, reverse=True)
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            yield from self._attributed(part, texts, alphas, top_logprobs)

    def _attributed(
        self,
        part: Sequence[int],
        texts: Sequence[tuple[Mapping[str, Sequence[int]], Sequence[int]]],
        alphas: Sequence[float],
        top_logprobs: int,
    ) -> Iterator[tuple[int, Attributed]]:
        rows = {}
        for role, states in self._roles.items():
            trees = []
            for i in part:
                context, targets = tuple(texts[i][0][role]), tuple(texts[i][1])
                trees.append(Tree(context + targets[:-1], len(context), (Leaf(i, targets),)))
            rows[role] = states.rows(Batch(trees), len(trees))
        ids = torch.tensor([token_id for i in part for token_id in texts[i][1]])
        alpha = torch.tensor([alphas[i] for i in part for _ in texts[i][1]], dtype=torch.float32)
        found: list[Any] = []
        for chunk, logits in self._chunks(rows):
            strength = alpha[chunk].to(logits["base"].device)
            logits = self._complete(logits, strength != 0)
            drawn = ops.sample(
                logits["base"], logits.get("expert"), logits.get("anti"),
                alpha=strength, temperature=0.0, attribution=ids[chunk].to(strength.device),
                top_logprobs=top_logprobs, vocab_size=self.vocab_size, backend=self._backend,
            )  # fmt: skip
            assert drawn.attribution is not None and drawn.top is not None
            fields = drawn.attribution.columns
            found += zip(*(x.tolist() for x in (fields, *drawn.top)), strict=True)
        for i in part:
            own, found = found[: len(texts[i][1])], found[len(texts[i][1]) :]
            yield i, Attributed(*map(list, zip(*own, strict=True)))

    def _chunks(self, rows: Mapping[str, Tensor]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """(which rows, each role's logits of them on the base's device), a few rows at a time."""
        row_bytes = sum(self._roles[role].logits_bytes for role in rows)
        step = max(1, LOGITS_BYTES // row_bytes)
        for first in range(0, len(rows["base"]), step):
            chunk = slice(first, first + step)
            logits = {
                role: self._roles[role].logits(states[chunk]) for role, states in rows.items()
            }
            device = logits["base"].device
            yield chunk, {role: x.to(device) for role, x in logits.items()}

    def _complete(
        self, logits: dict[str, Tensor], steered: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits with what a remote base does not tell; see :func:`complete`."""
        states = self._roles["base"]
        if not isinstance(states, RemoteStates):
            return logits
        known = {role: x[:, : self.vocab_size] for role, x in logits.items()}
        base, _ = complete(known["base"], known.get("anti"), states.model.tail, steered)
        return {**logits, "base": base}

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
            # The rows for several targets each, [n, count, V], read in place.
            base_rows, expert_rows, anti_rows = (
                None if x is None else x[places][:, None].expand(-1, count, -1)
                for x in (base, expert, anti)
            )
            assert base_rows is not None
            found = ops.score(base_rows, expert_rows, anti_rows, ids, alpha, **settings)
            # Tokens that not every role has are never produced.
            found = found.masked_fill(ids.ge(self.vocab_size), -math.inf)
            for i, values in zip(places, found.tolist(), strict=True):
                logprobs[i] = values
        return logprobs, drawn.token_ids.tolist()


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
