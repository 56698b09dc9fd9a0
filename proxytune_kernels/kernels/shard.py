"""Summaries, order keys and histograms of a rank's part of the vocabulary (docs/sharded.md).

Scan reads 4 bytes a token and writes one word a row; keys writes 8 bytes a token, for rows with
top_k or top_p; the histogram reads them, for rows whose cut lies past the candidates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels._blocks import LANES
from proxytune_kernels.kernels._common import (
    INF,
    OPTIONS,
    exponent,
    key_value,
    mass,
    order_key,
)
from proxytune_kernels.kernels._row import finite_max
from proxytune_kernels.kernels._shard import (
    COUNT_BITS,
    INFINITE,
    MASKED,
    MAX_SHIFT,
    Part,
    first_block,
    head_of,
    last_block,
    shard_x,
)
from proxytune_kernels.kernels.sample import splits_of

PER = tl.constexpr(4)  # fp32: 16 bytes a lane
_WARPS = 4
_KEYS = 1024  # keys a program of the histogram takes at once


@triton.jit(do_not_specialize=["splits"])
def _shard_scan_kernel(part, state, out, splits):
    """Grid [B * splits]; state int64 [B, 5], zeroed. The last program of a row writes its word."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    top, nan = tl.full([], MASKED, tl.int64), tl.full([], 0, tl.int64)
    live, infinite = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for block in range(first_block(part, PER) + split, last_block(part, PER), splits):
        ids = block * (LANES * PER) + tl.arange(0, LANES * PER)
        local = ids - part.start
        inside = (local >= 0) & (local < part.size)
        x = tl.load(part.x + row * part.size + local, mask=inside, other=-INF)
        nan += tl.sum((x != x).to(tl.int64), 0)
        x = tl.maximum(x, -INF)  # of NaN and a number it is the number
        live += tl.sum((x > -INF).to(tl.int64), 0)
        infinite += tl.sum((x == INF).to(tl.int64), 0)
        top = tl.maximum(top, order_key(tl.max(x, 0), tl.full([], 0, tl.int32)) >> 19)
    at = state + row * 5
    tl.atomic_max(at, top)
    tl.atomic_add(at + 1, nan)
    tl.atomic_add(at + 2, live)
    tl.atomic_add(at + 3, infinite)
    tl.debug_barrier()  # this program's numbers before its arrival
    if tl.atomic_add(at + 4, 1) == splits - 1:
        top = tl.load(at, cache_modifier=".cg")
        nan = tl.load(at + 1, cache_modifier=".cg")
        live = tl.load(at + 2, cache_modifier=".cg")
        infinite = tl.load(at + 3, cache_modifier=".cg")
        count = tl.where(top == INFINITE, infinite, live)
        word = (top << MAX_SHIFT) | ((nan != 0).to(tl.int64) << COUNT_BITS) | count
        tl.store(out + row, word)


@triton.jit(do_not_specialize=["blocks"])
def _shard_keys_kernel(part, out, blocks):
    """Grid [B * blocks]: order keys, 0 where masked."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row_max, _, _ = head_of(part.summaries, row, part.rows, part.world)
    ids, x = shard_x(part, row, first_block(part, PER) + block, row_max, PER)
    local = ids - part.start
    key = tl.where(x > -INF, order_key(x, ids), 0)
    tl.store(out + row * part.size + local, key, mask=(local >= 0) & (local < part.size))


@triton.jit(do_not_specialize=["size", "rows", "world", "blocks"])
def _shard_histogram_kernel(
    keys, summaries, temperature, edges, out, size, rows, world, blocks,
    EDGES: tl.constexpr, STEPS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid [B * blocks]; out int64 [B, 2 EDGES], zeroed: numbers, then masses."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row_max, _, _ = head_of(summaries, row, rows, world)
    hi, lo, floor = exponent(tl.load(temperature + row))
    i = block * KEYS + tl.arange(0, KEYS)
    key = tl.load(keys + row * size + i, mask=i < size, other=0)
    # The first edge that is not above the key, by halving: edges descend.
    low = tl.zeros([KEYS], tl.int32)
    high = tl.zeros([KEYS], tl.int32) + EDGES
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        edge = tl.load(edges + row * EDGES + middle, mask=open_, other=0)
        low = tl.where(open_ & (edge > key), middle + 1, low)
        high = tl.where(open_ & (edge <= key), middle, high)
    taken = (key > 0) & (low < EDGES)
    # No key of the row lies above its maximum.
    x = tl.minimum(key_value(key), finite_max(row_max))
    q = mass(x, finite_max(row_max), hi, lo, floor)
    at = out + row * 2 * EDGES
    tl.atomic_add(at + low, tl.full([KEYS], 1, tl.int64), mask=taken)
    tl.atomic_add(at + EDGES + low, q, mask=taken)


def _blocks(part: Part) -> int:
    """Blocks that a part touches."""
    width = LANES.value * PER.value
    return triton.cdiv(part.start + part.size, width) - part.start // width


def launch_shard_scan(part: Part, out: Tensor) -> None:
    """Writes one word a row, int64 [B]; the part's summaries are not read."""
    if len(out) == 0:
        return
    state = torch.zeros((len(out), 5), dtype=torch.int64, device=out.device)
    splits = splits_of(len(out), max(part.size, 1), out.device)
    _shard_scan_kernel[(len(out) * splits,)](part, state, out, splits, num_warps=_WARPS, **OPTIONS)


def launch_shard_keys(part: Part, out: Tensor) -> None:
    """Writes order keys, int64 [B, n]."""
    if out.numel() == 0:
        return
    blocks = _blocks(part)
    _shard_keys_kernel[(len(out) * blocks,)](part, out, blocks, num_warps=_WARPS, **OPTIONS)


def launch_shard_histogram(
    keys: Tensor, summaries: Tensor, temperature: Tensor, edges: Tensor, out: Tensor
) -> None:
    """Adds numbers and masses of keys between edges to out, int64 [B, 2 E]."""
    if keys.numel() == 0:
        return
    (rows, size), num_edges = keys.shape, edges.shape[1]
    blocks = triton.cdiv(size, _KEYS)
    _shard_histogram_kernel[(rows * blocks,)](
        keys, summaries, temperature, edges, out, size, rows, len(summaries), blocks,
        EDGES=num_edges, STEPS=num_edges.bit_length(), KEYS=_KEYS, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
