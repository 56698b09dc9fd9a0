"""Sampling: up to four launches whose number and sizes the shapes alone decide.

scan reads the logits once; select finishes greedy, unfiltered and peaked rows; narrow and finish
find nothing to do unless rows are flat. Nothing is decided on the host, so the launches can be
captured in a CUDA graph. docs/gpu.md has the derivations.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from proxytune_kernels.kernels import _row
from proxytune_kernels.kernels._common import OPTIONS, Logits, Strides
from proxytune_kernels.kernels._row import Outputs, State, Tiles
from proxytune_kernels.kernels.finish import _finish_kernel
from proxytune_kernels.kernels.narrow import _narrow_kernel
from proxytune_kernels.kernels.scan import (
    SCAN_REGISTERS,
    SCAN_WARPS,
    TILES_PER_PROGRAM,
    _scan_kernel,
)
from proxytune_kernels.kernels.select import _select_kernel
from proxytune_kernels.params import RowParams

SELECT_WARPS = 8  # 16 where a row has over 2,048 tiles
SPREAD_WARPS = 4
_BLOCK = 1024  # tokens a program of narrow and finish reads at once


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the device; 2 where the interpreter stands in for one."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits_of(rows: int, vocab_size: int, device: torch.device) -> int:
    """Programs a row for narrow and finish: two waves over the device, no more than blocks.

    Results do not depend on it: programs exchange integer sums and maxima.
    """
    return max(1, min(triton.cdiv(2 * _processors(device), rows), triton.cdiv(vocab_size, _BLOCK)))


def tiles_of(rows: int, vocab_size: int, device: torch.device) -> Tiles:
    """Unwritten summaries, whole programs of scan."""
    width = triton.cdiv(vocab_size, 128 * TILES_PER_PROGRAM) * TILES_PER_PROGRAM
    numbers = torch.empty((4, rows, width), dtype=torch.float32, device=device)
    count = torch.empty((rows, width), dtype=torch.int16, device=device)
    maximum, scaled, raw, race = numbers.unbind()
    return Tiles(maximum, scaled, raw, race, count)


def at_once(num_tiles: int) -> int:
    """Summaries that a program of select, score or top holds: a power of two, few kinds of them."""
    return max(256, triton.next_power_of_2(num_tiles))


def state_of(rows: int, device: torch.device) -> State:
    """Unwritten state; select writes what later launches read."""

    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, width), dtype=dtype, device=device)

    keys, short = _row.KEYS_WIDTH.value, _row.SHORT.value
    return State(
        empty(16, torch.float32), empty(_row.MASSES_WIDTH.value, torch.int64),
        empty(4, torch.int32), empty(keys, torch.int64), empty(short, torch.int32),
        empty(short, torch.int64), empty(_row.MAX_TILES.value, torch.int32),
    )  # fmt: skip


def launch_sample(
    logits: Logits, strides: Strides, params: RowParams, out: Outputs, vocab_size: int,
    positions: int, stream: int,
) -> tuple[Tiles, State]:  # fmt: skip
    """Draws one token for each of ``positions`` positions of each request.

    Args:
        logits, strides: [B, T, V] or, at one position, [B, V].
        params: one value per request; ``position`` is that of the first.
        out: tensors of B * T rows.
        vocab_size: agreed width.
        positions: T.
        stream: number of the noise stream (rng.STREAMS).

    Returns:
        The rows' summaries and state: their maxima and kept sets, for verify and top_logprobs.
    """
    device, rows = logits.base.device, out.token_ids.numel()
    tiles = tiles_of(rows, vocab_size, device)
    if rows > 0:
        blocks = tiles.maximum.shape[1] // TILES_PER_PROGRAM
        _scan_kernel[(rows, blocks)](
            logits, strides, params, tiles, vocab_size, positions, blocks, stream, DRAW=True,
            TILES=TILES_PER_PROGRAM, num_warps=SCAN_WARPS, maxnreg=SCAN_REGISTERS, **OPTIONS,
        )  # fmt: skip
    return tiles, launch_selection(
        logits, strides, params, tiles, out, vocab_size, positions, stream
    )


def launch_selection(
    logits: Logits, strides: Strides, params: RowParams, tiles: Tiles, out: Outputs,
    vocab_size: int, positions: int, stream: int,
) -> State:  # fmt: skip
    """What comes after the tiles' summaries, whoever wrote them; arguments as in launch_sample."""
    device, rows = logits.base.device, out.token_ids.numel()
    state, width = state_of(rows, device), tiles.maximum.shape[1]
    if rows == 0:
        return state
    tiles_at_once = at_once(width)
    # 128 registers: two programs a multiprocessor, and nothing is spilled (benchmarks.static).
    _select_kernel[(rows,)](
        logits, strides, params, tiles, state, out, vocab_size, positions, width, stream,
        NT=tiles_at_once, num_warps=SELECT_WARPS if tiles_at_once <= 2048 else 16, maxnreg=128,
        **OPTIONS,
    )  # fmt: skip
    splits = splits_of(rows, vocab_size, device)
    _narrow_kernel[(rows * splits,)](
        logits, strides, params, state, vocab_size, positions, splits,
        num_warps=SPREAD_WARPS, **OPTIONS,
    )  # fmt: skip
    _finish_kernel[(rows * splits,)](
        logits, strides, params, state, out, vocab_size, positions, splits, stream,
        num_warps=SPREAD_WARPS, **OPTIONS,
    )  # fmt: skip
    return state


def inputs(
    base: Tensor, expert: Tensor | None, anti: Tensor | None,
    bias: Tensor | None = None, allowed_mask: Tensor | None = None,
) -> tuple[Logits, Strides]:  # fmt: skip
    """Tensors [B, V] or [B, T, V] as kernel arguments."""
    steps: list[int] = []
    for tensor in (base, expert, anti, bias, allowed_mask):
        if tensor is None:
            steps += [0, 0]
        else:
            steps += [tensor.stride(0), tensor.stride(1) if tensor.dim() == 3 else 0]
    return Logits(base, expert, anti, bias, allowed_mask), Strides(*steps)
