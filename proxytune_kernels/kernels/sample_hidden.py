"""The three heads as one grouped product, from final hidden states to x and its summaries.

    x = fma(alpha, expert - anti, base),    role = hidden @ weight.T [+ bias], scaled and capped

A program owns one tile of 128 tokens for up to 128 rows: it goes through the expert's hidden
dimension, the anti-expert's and the base's, in fp32 accumulators, and combines them in registers.
Per token the three weight rows in (2 (H_base + H_expert + H_anti) bytes in bf16, shared by all rows
of a program), per token and row 4 bytes of x out and 18 / 128 bytes of the summaries that scan
would write. Three [B, V] matrices of logits are never written, and scan's read is not needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.heads import Head
from proxytune_kernels.kernels.common import (
    INF,
    LN2,
    LOG2E,
    OPTIONS,
    TILE,
    Lines,
    Logits,
    cdiv,
    inputs,
    line_of,
    lines_of,
)
from proxytune_kernels.kernels.noise import NoiseKey, noise_bound, noise_key, tile_words
from proxytune_kernels.kernels.sample import launch_selection, tile_sums
from proxytune_kernels.kernels.selection import is_unfiltered, may_need_mass
from proxytune_kernels.kernels.workspace import Outputs, Tiles, Workspace, tiles_of
from proxytune_kernels.params import RowParams

SUMMED = tl.constexpr(16)  # rows whose summaries a program writes at once


class Block(NamedTuple):
    """What a program takes at once."""

    block_b: int  # rows
    block_k: int  # of the hidden dimension
    warps: int
    stages: int  # loads under way


def _tile_of(batch_size: int, wide: bool, plain: bool) -> Block:
    """The program's size for a batch; ``wide`` where a role is fp32.

    Unless ``plain``, 128 rows take more registers than there are: with a bias, a mask, a soft cap.
    """
    if wide:  # no tensor core multiplies fp32 exactly
        return Block(16, 32, 4, 3)
    if batch_size <= 16:
        return Block(16, 64, 4, 4)
    if batch_size <= 32:
        return Block(32, 64, 8, 4)
    if batch_size <= 64 or not plain:
        return Block(64, 64, 8, 4)
    return Block(128, 64, 8, 3)


class Role(NamedTuple):
    """One role's head as the kernel sees it; all None but the sizes where there is no such role."""

    hidden: Any  # [B, H]
    weight: Any  # [V, H]
    bias: Any  # None, or [V]
    hidden_stride: int
    weight_stride: int
    size: int  # H
    scale: Any  # None, or what the product is multiplied by
    cap: Any  # None, or the soft cap, after the scale


class Constraints(NamedTuple):
    """Optional bias and mask of the combined logits."""

    bias: Lines | None  # fp32 [B, V]
    allowed: Lines | None  # int32 [B, ceil(V / 32)]


@triton.jit
def tanh(x):
    """Hyperbolic tangent, fp32: Cephes tanhf below 0.625; within 3e-7 (docs/heads.md)."""
    z = x * x
    p = tl.fma(z, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(p, z, -5.37397155531e-2)
    p = tl.fma(p, z, 1.33314422036e-1)
    p = tl.fma(p, z, -3.33332819422e-1)
    near = tl.fma(p * z, x, x)
    # exp2 overflows to +inf where tanh is 1 to the last bit.
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _logits(
    role, rows, ids, size, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr
):
    """A role's logits of a tile, fp32 [BLOCK_B, 128]; ``size`` is H, or 0 to skip the product."""
    step = tl.arange(0, BLOCK_K)
    hidden = role.hidden + rows.to(tl.int64)[:, None] * role.hidden_stride + step[None, :]
    weight = role.weight + ids.to(tl.int64)[None, :] * role.weight_stride + step[:, None]
    acc = tl.zeros([BLOCK_B, TILE], tl.float32)
    for k in range(0, size, BLOCK_K):
        if EVEN:
            h, w = tl.load(hidden), tl.load(weight)
        else:
            left = step < size - k
            h = tl.load(hidden, mask=left[None, :], other=0.0)
            w = tl.load(weight, mask=left[:, None], other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")
        hidden += BLOCK_K
        weight += BLOCK_K
    if role.bias is not None:
        acc += tl.load(role.bias + ids).to(tl.float32)[None, :]
    if role.scale is not None:
        acc *= role.scale
    if role.cap is not None:
        acc = role.cap * tanh(acc / role.cap)
    return acc


@triton.jit
def _summarise(
    x, x_stride, tiles, row_params, first, tile, batch_size, vocab_size, width, stream
):  # fmt: skip
    """Writes what scan would of one tile of the SUMMED rows from ``first`` on, from written x.

    A few rows at a time: those of the accumulators at once would take more registers than there
    are. What this program has just written is still in a cache.
    """
    rows = first + tl.arange(0, SUMMED)
    present = rows < batch_size
    rows = tl.minimum(rows, batch_size - 1)
    ids = tile * TILE + tl.arange(0, TILE)
    line = rows.to(tl.int64)
    given = tl.load(x + line[:, None] * x_stride + ids[None, :], mask=(ids < vocab_size)[None, :],
                    other=-INF)  # fmt: skip
    at = line * width + tile
    x = tl.maximum(given, -INF)  # of NaN and a number it is the number
    top = tl.max(x, 1)
    tl.store(tiles.maximum + at, top, mask=present)
    # Whole tiles of -inf (or +inf) have no difference to their maximum.
    shifted = x - tl.where(tl.abs(top) == INF, 0.0, top)[:, None]
    tl.store(tiles.raw + at, tile_sums(tl.exp2(shifted * LOG2E)), mask=present)
    count = tl.sum((x > -INF).to(tl.int32), 1) + (tl.max((given != given).to(tl.int32), 1) << 8)
    tl.store(tiles.count + at, count.to(tl.int16), mask=present)
    temperature = tl.load(row_params.temperature + rows)
    whole = present & may_need_mass(row_params, rows, vocab_size)
    unfiltered = whole & is_unfiltered(row_params, rows, vocab_size)
    at_temperature = whole & (temperature != 1.0)
    log2e = tl.full(temperature.shape, LOG2E, tl.float32)
    scaled = shifted * tl.div_rn(log2e, tl.minimum(temperature, 2.0**120))[:, None]
    if tl.max(at_temperature.to(tl.int32), 0) != 0:
        tl.store(tiles.scaled + at, tile_sums(tl.exp2(scaled)), mask=at_temperature)
    if tl.max(unfiltered.to(tl.int32), 0) != 0:
        noise = noise_key(row_params, rows, 0, stream)
        noise = NoiseKey(noise.seed[:, None], noise.position[:, None], stream)
        words = tile_words(tl.zeros_like(rows) + tile * TILE, noise, SUMMED)
        bound = tl.max(scaled + noise_bound(words), 1) * LN2
        tl.store(tiles.score_bound + at, bound, mask=unfiltered)


@triton.jit(do_not_specialize=["batch_size", "vocab_size", "blocks", "stream"])
def _sample_hidden_kernel(
    base, expert, anti, constraints, row_params, x_out, x_stride, tiles, batch_size, vocab_size,
    width, blocks, stream, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Grid [width * blocks]: the blocks of rows of a tile follow each other, its weights in L2."""
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = block * BLOCK_B + tl.arange(0, BLOCK_B)
    ids = tile * TILE + tl.arange(0, TILE)
    present = rows < batch_size
    inside = ids < vocab_size
    # Rows and tokens past the end read the last one's memory: loads in the loop stay unmasked.
    rows = tl.minimum(rows, batch_size - 1)
    held = tl.minimum(ids, vocab_size - 1)
    some = tile * TILE < vocab_size  # summaries are padded to whole programs of scan
    alpha = tl.load(row_params.alpha + rows)
    if expert.hidden is not None:
        # Where no row is steered the pair's weights are not read; NaN is not 0.
        steered = tl.max((alpha != 0).to(tl.int32), 0)
        size = tl.where(some, expert.size * steered, 0)
        pair = _logits(expert, rows, held, size, BLOCK_B, BLOCK_K, EVEN)
        size = tl.where(some, anti.size * steered, 0)
        pair -= _logits(anti, rows, held, size, BLOCK_B, BLOCK_K, EVEN)
    size = tl.where(some, base.size, 0)
    logits = _logits(base, rows, held, size, BLOCK_B, BLOCK_K, EVEN)
    x = logits
    if expert.hidden is not None:
        steering = alpha[:, None] + tl.zeros_like(pair)
        x = tl.where(steering == 0, logits, tl.fma(steering, pair, logits))
    line = rows.to(tl.int64)[:, None]
    if constraints.bias is not None:
        x += tl.load(line_of(constraints.bias, line, 0) + held[None, :])
    x = tl.where(logits == -INF, -INF, x)
    if constraints.allowed is not None:
        at = line_of(constraints.allowed, line, 0)
        x = tl.where((tl.load(at + (held >> 5)[None, :]) >> (held & 31)[None, :]) & 1 != 0, x, -INF)
    x = tl.where(inside[None, :], x, -INF)
    # Offsets of 32 bits from the block's first row: pointers take twice the registers.
    first = x_out + (block * BLOCK_B).to(tl.int64) * x_stride
    written = first + (tl.arange(0, BLOCK_B)[:, None] * x_stride + ids[None, :])
    tl.store(written, x, mask=present[:, None] & inside[None, :])
    tl.debug_barrier()  # read by other threads than wrote them
    for start in range(0, BLOCK_B, SUMMED):
        _summarise(
            x_out, x_stride, tiles, row_params, block * BLOCK_B + start, tile, batch_size,
            vocab_size, width, stream,
        )  # fmt: skip


def _role(head: Head | None) -> Role:
    if head is None:
        return Role(None, None, None, 0, 0, 0, None, None)
    weight, bias = head.weight, head.bias
    size, scale, cap = weight.shape[1], head.logit_scale, head.soft_cap
    hidden_stride, weight_stride = head.hidden.stride(0), weight.stride(0)
    return Role(head.hidden, weight, bias, hidden_stride, weight_stride, size, scale, cap)


def launch_sample_hidden(
    heads: tuple[Head, Head | None, Head | None], constraints: tuple[Tensor | None, Tensor | None],
    params: RowParams, out: Outputs, vocab_size: int, noise_stream: int,
) -> tuple[Logits, Tiles, Workspace]:  # fmt: skip
    """Draws one token a row from the roles' hidden states and lm_head weights.

    Args:
        heads: base, and expert and anti or neither.
        constraints: bias fp32 [B, V] and allowed mask int32 [B, ceil(V / 32)], or None each.
        params: one value per row.
        out: tensors of B rows.
        vocab_size: agreed width; weight rows past it are not read.
        noise_stream: its number (rng.STREAMS).

    Returns:
        The combined logits x, fp32, as `base` alone; their summaries and the rows' workspace.
    """
    device, batch_size = heads[0].hidden.device, len(out.token_ids)
    tiles = tiles_of(batch_size, vocab_size, device)
    width = tiles.maximum.shape[1]
    # Whole tiles: rows start at multiples of 16 bytes, for the launches that read them again.
    shape = (batch_size, cdiv(vocab_size, 128) * 128)
    x = torch.empty(shape, dtype=torch.float32, device=device)
    logits = inputs(x, None, None)
    if batch_size > 0:
        roles = [_role(head) for head in heads]
        bias, allowed = constraints
        given = Constraints(lines_of(bias), lines_of(allowed, wide=False))
        wide = any(h is not None and h.hidden.itemsize > 2 for h in heads)
        plain = bias is allowed is None and all(
            role.bias is role.cap is None and role.size % 64 == 0 for role in roles
        )
        tile = _tile_of(batch_size, wide, plain)
        even = all(role.size % tile.block_k == 0 for role in roles)
        blocks = cdiv(batch_size, tile.block_b)
        _sample_hidden_kernel[(width * blocks,)](
            *roles, given, params, x, x.stride(0), tiles, batch_size,
            vocab_size, width, blocks, noise_stream, BLOCK_B=tile.block_b, BLOCK_K=tile.block_k,
            EVEN=even, num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    workspace = launch_selection(logits, params, tiles, out, vocab_size, 1, noise_stream)
    return logits, tiles, workspace
