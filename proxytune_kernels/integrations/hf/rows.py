"""The engine's rows as a transformers cache: no padding, and the decoder's own forwards.

:class:`Rows` keeps a row of the batch in a slot of the decoder's caches, and runs the models as
:class:`~proxytune_kernels.Decoder` does: modules without the cost of ``nn.Module`` calls, expert
and anti as one batch where they can be. A role's row holds its tokens alone: padding on the left is
dropped as it comes in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.integrations.hf.inputs import Prompts, unpadded
from proxytune_kernels.trio.roles import ROLES


class Rows(Cache):
    """B rows of each role's tokens: ``past_key_values`` of a :class:`ProxyTunedForCausalLM`.

    To ``generate()`` it is as long as the columns of ``input_ids`` that went in, padding included.

    Args:
        runner: over empty slots, which are this cache's own.
    """

    def __init__(self, runner: Runner) -> None:
        super().__init__(layers=[])
        self._runner = runner
        self._active: tuple[str, ...] = ()
        # Columns of each role, and the most tokens that any row can have.
        self._columns = dict.fromkeys(ROLES, 0)
        self._longest = 0

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles whose tokens it holds; none while it is empty."""
        return self._active

    def awaits(self, own: Prompts) -> bool:
        """Whether any of these prompts goes beyond what its role has read."""
        return any(ids.shape[1] > self._columns[role] for role, (ids, _) in own.items())

    @property
    def max_batch_size(self) -> int:
        """B."""
        return len(self._runner.active["base"])

    @property
    def batch_size(self) -> int:
        """B."""
        return self.max_batch_size

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the base's tokens so far, padding included."""
        return self._columns["base"]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows as it must."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns that a mask over the new and the seen ones has, and the first of them."""
        return self._columns["base"] + query_length, 0

    def __repr__(self) -> str:
        return f"Rows({self.max_batch_size} rows of {', '.join(self._active) or 'no role yet'})"

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: only the model that made this cache can write into it."""
        raise TypeError(
            "this cache is its model's own; for one that other code can write into, "
            "generate with cache_implementation='dynamic'"
        )

    @property
    def is_croppable(self) -> bool:
        """True: what lies behind a row's length does not exist."""
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of every row; the number is negative or 0."""
        if tokens_to_remove > 0 or self._shortest() + tokens_to_remove < 0:
            raise ValueError(
                f"crop: tokens_to_remove must be in [-{self._shortest()}, 0], "
                f"got {tokens_to_remove}"
            )
        if tokens_to_remove:
            self._move(tokens_to_remove)

    def reset(self) -> None:
        """Empty the rows."""
        for slot in range(self.max_batch_size):
            self._runner.release(slot)
        self._columns = dict.fromkeys(ROLES, 0)
        self._active, self._longest = (), 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let row i of every role hold what row ``beam_idx[i]`` held."""
        order = beam_idx.tolist()
        if order != list(range(self.max_batch_size)):
            self._runner.take(self._runner, order)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._become([row for row in range(self.max_batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, by index or by a mask."""
        self._become(torch.arange(self.max_batch_size)[indices.cpu()].tolist())

    def reserve(self, length: int) -> None:
        """Make room for so many tokens a row."""
        if length > self._runner.capacity:
            grown = self._runner.resized(self.max_batch_size, length)
            grown.take(self._runner, range(self.max_batch_size))
            self._runner = grown

    def step(self, token_ids: Tensor) -> dict[str, Tensor]:
        """One more token in every row, int64 [B, 1]; per role logits [B, 1, V_role]."""
        if self._longest >= self._runner.capacity:
            self.reserve(2 * self._longest)
        logits = self._runner.forward(self._active, token_ids)
        self._move(1)
        return logits

    @torch.inference_mode()
    def extend(
        self,
        roles: Sequence[str],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        keep: int,
        own: Prompts,
        length: int,
    ) -> dict[str, Tensor]:
        """Run new columns; per role the logits [B, keep, V_role] of the last ones.

        Args:
            roles: those to run, all or the base alone; always those of the first call.
            input_ids: int64 [B, q].
            attention_mask: int64 [B, columns + q], 0 where a column is padding, or None.
            position_ids: must be what the mask says, if given.
            keep: columns whose logits are wanted, 0 for all; with ``own`` from the last token of
                the prompts on. Those of padding are 0.
            own: prompts of single roles, as far as they go beyond what the role has read.
            length: how many of the first ``input_ids`` the own prompts stand for.

        Raises:
            ValueError: the cache can't take this; says why.
        """
        self._start(roles, input_ids.shape[0])
        width = input_ids.shape[1]
        mask = None if attention_mask is None else attention_mask[:, -width:]
        rows = unpadded(input_ids, mask)
        if position_ids is not None:
            self._check_positions(position_ids, rows, mask)
        new = dict.fromkeys(self._active, rows)
        columns = dict.fromkeys(self._active, width)
        for role in self._active:
            seen = self._columns[role]
            if role in own and own[role][0].shape[1] > seen:
                prompt = unpadded(*(t[:, seen:] for t in own[role]))
                drafts = input_ids[:, length:].tolist()
                new[role] = [[*p, *d] for p, d in zip(prompt, drafts, strict=True)]
                columns[role] = own[role][0].shape[1] - seen + width - length
                keep = min(keep or width, width - length + 1)
        if not all(row for each in new.values() for row in each):
            raise ValueError("attention_mask must leave each row one new token at least")
        self.reserve(self._longest + max(columns.values()))
        logits = self._run(new, min(keep or width, width))
        for role, count in columns.items():
            self._columns[role] += count
        self._longest += max(columns.values())
        return logits

    def _start(self, roles: Sequence[str], rows: int) -> None:
        if rows != self.max_batch_size:
            raise ValueError(
                f"past_key_values must have a row per row of input_ids, got {self.max_batch_size} "
                f"and {rows}"
            )
        if not self._active:
            self._active = tuple(roles)
            for slot in range(rows):
                self._runner.start(slot, self._active)

    def _check_positions(
        self, position_ids: Tensor, rows: list[list[int]], mask: Tensor | None
    ) -> None:
        given = unpadded(position_ids.expand(len(rows), -1), mask)
        starts = self._runner.lengths("base")
        wanted = [list(range(n, n + len(row))) for n, row in zip(starts, rows, strict=True)]
        if given != wanted:
            raise ValueError(
                "position_ids must count each row's tokens from 0, padding left out; for others "
                "generate with cache_implementation='dynamic'"
            )

    def _run(self, new: Mapping[str, list[list[int]]], keep: int) -> dict[str, Tensor]:
        """Run each role's new tokens, row by row as long as they are; lengths move on."""
        if keep == 1:
            return {role: x[:, None] for role, x in self._last(new).items()}
        head = {role: [row[:-keep] for row in rows] for role, rows in new.items()}
        tail = {role: [row[-keep:] for row in rows] for role, rows in new.items()}
        if any(map(any, head.values())):
            self._last(head)
        logits: dict[str, Tensor] = {}
        same = all(rows == tail["base"] for rows in tail.values())
        for roles in [tuple(tail)] if same else [(role,) for role in tail]:
            logits |= self._all(roles, tail[roles[0]], keep)
        counts = [len(row) for row in tail["base"]]
        self._runner.advance(len(counts), torch.tensor(counts, device=self._runner.device))
        for slot, count in enumerate(counts):
            self._runner.advance_host(slot, self._active, count)
        return logits

    def _last(self, new: Mapping[str, list[list[int]]]) -> dict[str, Tensor]:
        """Run new tokens, any number a row; per role the logits [B, V] after each row's last."""
        slots = range(self.max_batch_size)
        if not any(any(self._runner.lengths(role)) for role in new) and _all_filled(new):
            return self._runner.prefill(slots, new)
        # One row after another: rows that go on by different numbers of tokens are no batch.
        rows: list[dict[str, Tensor]] = []
        for slot in slots:
            parts = {role: each[slot] for role, each in new.items() if each[slot]}
            if parts:
                rows.append(self._runner.extend(slot, parts))
        return {r: torch.cat([x[r] for x in rows if r in x]) for r in new if r in rows[0]}

    def _all(
        self, roles: tuple[str, ...], rows: Sequence[Sequence[int]], keep: int
    ) -> dict[str, Tensor]:
        """Run up to ``keep`` tokens a row; per role their logits [B, keep, V] at the right end."""
        # Padded behind the rows' ends, where nothing exists.
        padded = [[*row, *[0] * (keep - len(row))] for row in rows]
        token_ids = torch.tensor(padded, device=self._runner.device)
        logits = self._runner.forward(roles, token_ids)
        for i, row in enumerate(rows):
            if len(row) < keep:
                for x in logits.values():
                    x[i] = torch.cat([torch.zeros_like(x[i, len(row) :]), x[i, : len(row)]])
        return logits

    def _move(self, count: int) -> None:
        self._runner.shift(self._active, count)
        for role in self._active:
            self._columns[role] += count
        self._longest += count

    def _shortest(self) -> int:
        return min((min(self._runner.lengths(role)) for role in self._active), default=0)

    def _become(self, rows: Sequence[int]) -> None:
        other = self._runner.resized(len(rows), self._runner.capacity)
        other.take(self._runner, rows)
        self._runner = other


def _all_filled(new: Mapping[str, list[list[int]]]) -> bool:
    return all(row for rows in new.values() for row in rows)
