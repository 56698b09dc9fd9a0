"""Numbers from the host to a device: many in one copy, which nobody waits for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def to_device(make: Callable[[], Sequence[Tensor]], device: torch.device) -> list[Tensor]:
    """The tensors that ``make`` makes on the host, on a device.

    For a GPU they go into one piece of pinned memory, which one copy reads while the host goes on;
    torch keeps that memory until it has been read.
    """
    made = make()
    if device.type != "cuda":
        return [tensor.to(device) for tensor in made]
    ends, end = [], 0
    for tensor in made:
        end += -(-tensor.nbytes // 16) * 16
        ends.append(end)
    staged = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    starts = [0, *ends[:-1]]
    for start, tensor in zip(starts, made, strict=True):
        staged[start : start + tensor.nbytes] = tensor.contiguous().flatten().view(torch.uint8)
    sent = staged.to(device, non_blocking=True)
    return [
        sent[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, made, strict=True)
    ]
