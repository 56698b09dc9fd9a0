"""Combined logits for engines with a sampler of their own.

    x = fma(alpha, expert - anti, base)

Per token 3 logits in (6 bytes in bf16), 4 bytes out; one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels.common import OPTIONS, Logits, cdiv, combined
from proxytune_kernels.kernels.launches import launch

_BLOCK = 1024
_WARPS = 4


@triton.jit(do_not_specialize=["blocks"])
def _combine_kernel(logits, alpha, out, vocab_size, blocks, BLOCK: tl.constexpr):
    """Grid [rows * blocks]."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    ids = block * BLOCK + tl.arange(0, BLOCK)
    steering, first = tl.load(alpha + row), tl.full([], 0, tl.int64)
    if (block + 1) * BLOCK <= vocab_size:  # no mask: accesses stay wide whatever the vocabulary
        inside = tl.full([BLOCK], True, tl.int1)
        x = combined(logits, steering, row, first, ids, inside)
        tl.store(out + row * vocab_size + ids, x + 0.0)  # -0 becomes +0
    else:
        x = combined(logits, steering, row, first, ids, ids < vocab_size)
        tl.store(out + row * vocab_size + ids, x + 0.0, mask=ids < vocab_size)


def launch_combine(logits: Logits, alpha: Tensor, out: Tensor, vocab_size: int) -> None:
    """Writes x, fp32 [B, vocab_size] contiguous; alpha fp32 [B]."""
    blocks = cdiv(vocab_size, _BLOCK)
    if len(out) == 0:
        return
    launch(
        _combine_kernel, (logits.kind, vocab_size, out.data_ptr() % 16 == 0), out.device,
        (len(out) * blocks,), logits, alpha, out, vocab_size, blocks, _BLOCK, num_warps=_WARPS,
        **OPTIONS,
    )  # fmt: skip
