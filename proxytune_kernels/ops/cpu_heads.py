"""``proxytune::sample_hidden`` on the CPU: heads and combination, chunk by chunk.

The weights are read once, in place. Of [B, V] there is one fp32 matrix, x; the three roles' logits
are held for a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.heads import Head
from proxytune_kernels.ops import head_checks
from proxytune_kernels.ops.table import LIBRARY, empty_top

_CHUNK = 2**17  # logits of a role at once: 512 KiB
_FEWEST, _MOST = 1024, 8192  # tokens of a chunk


class _Role:
    """A head, ready to give its logits of a chunk."""

    def __init__(self, head: Head, chunk: int) -> None:
        self._head = head
        self._hidden = head.hidden.float().contiguous()
        self._memory = torch.empty(len(head.hidden) * chunk)

    def logits(self, start: int, stop: int) -> Tensor:
        """fp32 [B, stop - start], valid until the next call."""
        head, count = self._head, len(self._hidden) * (stop - start)
        logits = self._memory[:count].view(-1, stop - start)
        torch.ops.proxytune.head_logits_out(
            self._hidden, head.weight, start, stop, out_logits=logits
        )
        if head.bias is not None:
            logits += head.bias[start:stop]
        if head.logit_scale is not None:
            logits *= head.logit_scale
        if head.soft_cap is not None:
            logits.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
        return logits


def combined(
    heads: tuple[Head, Head | None, Head | None], alpha: Tensor, bias: Tensor | None,
    vocab_size: int,
) -> Tensor:  # fmt: skip
    """Combined logits x with the bias added, fp32 [B, vocab_size]; docs/contracts.md, Combination.

    The pair's heads are not read where no row is steered.
    """
    batch_size = len(alpha)
    x = torch.empty((batch_size, vocab_size))
    if batch_size == 0:
        return x
    chunk = min(max(_CHUNK // batch_size, _FEWEST), _MOST, vocab_size)
    steered = bool((alpha != 0).any())
    base, *pair = (_Role(head, chunk) for head in (heads if steered else heads[:1]) if head)
    memory = torch.empty(batch_size * chunk)
    for start in range(0, vocab_size, chunk):
        stop = min(start + chunk, vocab_size)
        expert, anti = (role.logits(start, stop) for role in pair) if pair else (None, None)
        constraint = None if bias is None else bias[:, start:stop]
        part = memory[: batch_size * (stop - start)].view(batch_size, -1)
        torch.ops.proxytune.combine_out(
            base.logits(start, stop), expert, anti, alpha, constraint, None, stop - start,
            out_x=part,
        )  # fmt: skip
        x[:, start:stop] = part
    return x


def _sample(given: head_checks.Arguments) -> tuple[Tensor, ...]:
    x = combined(given.heads, given.params.alpha, given.bias, given.vocab_size)
    rest = (*given.params, None, given.allowed_mask, given.vocab_size, given.stream)
    return tuple(torch.ops.proxytune.sample(x, None, None, *rest, given.num_top))


def sample_hidden(*arguments: Any) -> tuple[Tensor, ...]:
    """``proxytune::sample_hidden``."""
    return _sample(head_checks.sample_hidden(*arguments))


def sample_hidden_out(*arguments: Any, **out: Tensor) -> None:
    """``proxytune::sample_hidden_out``."""
    given = head_checks.sample_hidden(*arguments)
    head_checks.outputs(given, out)
    for written, value in zip(out.values(), _sample(given), strict=True):
        written.copy_(value)


LIBRARY.impl("sample_hidden", sample_hidden, "CPU")
LIBRARY.impl("sample_hidden_out", sample_hidden_out, "CPU")
