"""The combined logits of a forward, with or without gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from proxytune_kernels import ops


def combined(roles: Mapping[str, Tensor], alpha: float | Tensor, vocab_size: int) -> Tensor:
    """Combined logits, fp32 [B, q, vocab_size], of each role's [B, q, V_role].

    One fused pass where no gradient is wanted; else torch's own operators, which can be
    differentiated (also by alpha).
    """
    tensors = [*roles.values(), *([alpha] if isinstance(alpha, Tensor) else [])]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        base, *pair = (x[..., :vocab_size].float() for x in roles.values())
        if not pair:
            return base
        each = alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha
        return base + each * (pair[0] - pair[1])
    rows, width = roles["base"].shape[:2]
    flat = {role: x.flatten(0, 1) for role, x in roles.items()}
    if isinstance(alpha, Tensor):
        alpha = alpha.to(flat["base"].device, torch.float32)
        alpha = alpha.repeat_interleave(width) if width > 1 else alpha
    x = ops.combine(
        flat["base"], flat.get("expert"), flat.get("anti"), alpha, vocab_size=vocab_size
    )
    return x.view(rows, width, vocab_size)
