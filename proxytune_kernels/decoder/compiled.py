"""Decoding steps through torch.compile: one graph for all lengths, none compiled while decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from proxytune_kernels.decoder.cache import CacheStep

Forward = Callable[[Tensor, CacheStep], Tensor]


class CompiledStep:
    """A role's decoding forward, compiled once for one row and once for several.

    Args:
        forward: token ids [B, 1] and the step -> logits [B, V]; its modules must not change.
        windows: the attention windows of the model's layers; None among them for full attention.
    """

    def __init__(self, forward: Forward, windows: Sequence[int | None]) -> None:
        def step_forward(token_ids: Tensor, step: CacheStep) -> Tensor:
            return forward(token_ids, step)

        # torch.compile files its graphs under the code object. Roles share the code above, and a
        # role must not even look at another's graphs: its modules are not guarded (see below).
        step_forward.__code__ = step_forward.__code__.replace()
        self._windows = windows
        # Checking thousands of module attributes takes as long as a small model's forward, and the
        # modules are the runner's own, which nobody changes.
        guard_filter = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        self._compiled: Forward = torch.compile(
            step_forward, dynamic=False, options={"guard_filter_fn": guard_filter}
        )

    def __call__(self, token_ids: Tensor, step: CacheStep) -> Tensor:
        """Logits [B, V] of one more token in each of the first B slots."""
        # "Maybe": of two slots, several rows are always two.
        torch._dynamo.maybe_mark_dynamic(step.span, 0)
        if token_ids.shape[0] > 1:
            # Rows that are equally long just now take the ragged rows' graph.
            step.ragged = True
            assert step.write_index is not None
            for tensor in (token_ids, step.position_ids, step.positions, step.write_index):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            # The masks are built here, for all layers, rather than in each layer.
            for window in self._windows:
                torch._dynamo.maybe_mark_dynamic(step.mask(window), (0, 3))
        return self._compiled(token_ids, step)

    def warm_up_lengths(
        self, max_batch_size: int, max_seq_len: int, several: bool = False
    ) -> list[tuple[int, ...]]:
        """Lengths of the rows, batch by batch, that meet every graph once.

        ``several``: a slot has several rows, so that there is no batch of one.
        """
        # Unlike the number of rows: dimensions that are equal by chance are compiled as equal.
        short = min(5, max_seq_len - 1)
        if several:
            return [(short,)]
        # One row has another graph where it has outgrown a window.
        past = [w + 1 for w in self._windows if w is not None and w + 1 < max_seq_len]
        batch = [(short, short - 1)] if max_batch_size > 1 else []
        return [*((length,) for length in (short, *past)), *batch]
