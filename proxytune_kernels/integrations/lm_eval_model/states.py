"""One role's model over a batch of trees: the final states of the tokens that are scored.

A role's logits are made from them later, a few rows at a time.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.decoder.model import check_model
from proxytune_kernels.heads import Head
from proxytune_kernels.integrations.lm_eval_model.contexts import Tokens, Tree

_PROBE = 8
"""Tokens that a head is tried on before it is trusted."""

_SHORT = 256
"""Trunks of fewer tokens have more branches run at the same time: as many keys as of this many."""


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
    """A causal LM that gives final states, and logits of them.

    Args:
        role: its name, for messages.
        model: a transformers causal LM; it is not changed.
        vocab_size: the agreed width; the head is tried on tokens below it.
    """

    def __init__(self, role: str, model: Any, vocab_size: int) -> None:
        self.role = role
        self.model = model
        self.device: torch.device = model.get_input_embeddings().weight.device
        if self.device.type == "meta":  # brought in by accelerate as it is needed
            self.device = torch.device(model.get_input_embeddings()._hf_hook.execution_device)
        self._accepted = inspect.signature(model.forward).parameters
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
            self._head = Head.of(self.model, torch.empty(0))
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
        try:
            check_model(self.role, self.model)
        except ValueError as error:
            return str(error)
        body = inspect.signature(self.model.base_model.forward).parameters
        missing = [
            n for n in ("attention_mask", "position_ids", "past_key_values") if n not in body
        ]
        return f"its body's forward takes no {missing[0]}" if missing else None

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
        output = self._body(ids, past_key_values=cache, use_cache=cache is not None)
        found = [_scored(output.last_hidden_state, batch.trees)]
        del output
        lengths = torch.tensor([len(tree.trunk) for tree in batch.trees])
        at_once = batch_size * max(1, _SHORT // ids.shape[1])
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
            past_key_values=_selected(cache, trunks),
            use_cache=True,
        ).last_hidden_state
        return hidden[places < counts[:, None]]

    def _own_logits(self, batch: Batch) -> Tensor:
        """Logits [N, V] by the model's own forward, of as few positions as it takes."""
        trees = batch.trees
        ids = _padded([tree.trunk for tree in trees], self.device)
        first = min(tree.scored.start for tree in trees)
        if "logits_to_keep" in self._accepted:
            keep = torch.arange(first, ids.shape[1], device=self.device)
            logits = self.model(ids, use_cache=False, logits_to_keep=keep).logits
        else:
            logits = self.model(ids, use_cache=False).logits[:, first:]
        return _scored(logits, trees, first)

    @torch.inference_mode()
    def logits(self, rows: Tensor) -> Tensor:
        """Logits [n, V] of rows that :meth:`rows` gave; fp32 or narrower, as the ops take them."""
        logits = rows if self.head_unknown is not None else self._from_head(rows)
        return logits.float() if logits.dtype == torch.float64 else logits

    def _from_head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        if self._head.logit_scale is not None:
            logits = logits * self._head.logit_scale
        if self._head.soft_cap is not None:
            logits = torch.tanh(logits / self._head.soft_cap) * self._head.soft_cap
        return logits

    def _body(self, ids: Tensor, **keywords: Any) -> Any:
        return self.model.base_model(input_ids=ids, **{"use_cache": False, **keywords})


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
