"""The C++ extension, ``torch.ops.proxytune`` on CPU tensors.

``sample_hidden`` is heads and combination, chunk by chunk, then ``sample``: the weights are read
once, in place. Of [B, V] there is one fp32 matrix, x; the three roles' logits are held for a chunk.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from proxytune_kernels.heads import Head
from proxytune_kernels.ops.backends.backend import (
    Backend,
    Implementation,
    from_writer,
    registered,
)
from proxytune_kernels.ops.table import LIBRARY, OPERATORS


def _load() -> str | None:
    try:
        import_module("proxytune_kernels._cpu")  # registers the kernels
    except ModuleNotFoundError:
        return (
            "the C++ extension is not built: install a C++20 compiler, then run "
            "`pip install --no-build-isolation .` without PROXYTUNE_SKIP_EXT"
        )
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


# At import, so that exported and compiled graphs find torch.ops.proxytune's kernels.
_MISSING = _load()
_IMPLEMENTATIONS = registered("proxytune", list(OPERATORS))


class Cpu(Backend):
    """The C++ extension."""

    name = device_type = "cpu"

    @override
    def missing(self) -> str | None:
        return _MISSING

    @override
    def implementation(self, name: str, device: torch.device) -> Implementation:
        return _IMPLEMENTATIONS[name]


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
            base.logits(start, stop), expert, anti, alpha, constraint, None, None, None,
            stop - start, out_x=part,
        )  # fmt: skip
        x[:, start:stop] = part
    return x


def _sample_hidden(
    base: Head, expert: Head | None, anti: Head | None, params: Any, bias: Any, allowed_mask: Any,
    vocab_size: int, noise_stream: int, top_logprobs: int, out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    x = combined((base, expert, anti), params.alpha, bias, vocab_size)
    given = (
        x, None, None, *params, None, allowed_mask, None, None, vocab_size, noise_stream,
        top_logprobs, None,
    )  # fmt: skip
    outputs = dict(zip(OPERATORS["sample"].out_names, out, strict=True))
    torch.ops.proxytune.sample_out(*given, **outputs)


for _name, _implementation in from_writer("sample_hidden", _sample_hidden).items():
    LIBRARY.impl(_name, _implementation, "CPU")
