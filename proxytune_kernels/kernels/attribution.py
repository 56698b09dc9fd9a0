"""What steering did to each row; two launches after sample's, only if asked.

The first spreads a row over programs, which read each logit once more and leave what they sum up;
the second merges that. A program's sums are relative to the highest logit that it has seen:

    sum of exp(v - max) of each role
    sum of exp(x - max x) ((x - max x) - (base - the token's base))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels import workspace as ws
from proxytune_kernels.kernels.common import (
    INF,
    LANES,
    MASS_ONE,
    OPTIONS,
    STATUS_EMPTY,
    Logits,
    block_ids,
    block_x,
    cdiv,
    finite_max,
    key_id,
    line_of,
    log_mass,
    order_key,
    shifted_at,
    splits_of,
)
from proxytune_kernels.kernels.launches import launch
from proxytune_kernels.params import RowParams
from proxytune_kernels.reference import ATTRIBUTION_COLUMNS

PER = tl.constexpr(8)  # tokens a lane: 16 bytes of bf16
_WARPS = 4

# Columns of Parts.sums; a role's maximum, and its sum beside it.
BASE = tl.constexpr(0)
EXPERT = tl.constexpr(2)
ANTI = tl.constexpr(4)
DIVERGENCE = tl.constexpr(6)
SUMS_WIDTH = tl.constexpr(8)
# Columns of Parts.words
BEFORE = tl.constexpr(0)  # tokens before the row's in the base's order
FINITE = tl.constexpr(1)  # tokens of x whose base is not +inf
BASE_KEY = tl.constexpr(2)  # the highest order key of the base
X_KEY = tl.constexpr(3)  # and of x
WORDS_WIDTH = tl.constexpr(4)
RESULTS = tl.constexpr(ATTRIBUTION_COLUMNS)


class Parts(NamedTuple):
    """What the programs of a row leave, [rows, parts, width]."""

    sums: Any  # fp32
    words: Any  # int64


@triton.jit
def _logits_of(lines, b, t, ids, inside):
    """A role's logits, -inf where not ``inside`` and for NaN."""
    logits = tl.load(line_of(lines, b, t) + ids, mask=inside, other=-INF).to(tl.float32)
    return tl.maximum(logits, -INF)


@triton.jit
def _joined(top, tops, sums):
    """Sums relative to ``tops`` as sums relative to their maximum; where that is +inf, counts."""
    finite = tl.where((top == INF) | (top == -INF), 0.0, top)
    weight = tl.where(top == INF, (tops == INF).to(tl.float32), tl.exp(tops - finite))
    return tl.where(tops == -INF, 0.0, sums * weight)


@triton.jit
def _added(top, total, logits):
    """A role's maximum and sum with those of a block."""
    highest = tl.maximum(top, tl.max(tl.ravel(logits), 0))
    inside = tl.sum(tl.ravel(_joined(highest, logits, 1.0)), 0)
    return highest, _joined(highest, top, total) + inside


@triton.jit
def _token_of(drawn, attributed, row, vocab_size):
    """The token that is attributed, and whether the row has one."""
    given = tl.load(attributed + row)
    token = tl.where(given >= 0, given, tl.load(drawn.token_ids + row))
    known = (token >= 0) & (token < vocab_size) & (tl.load(drawn.status + row) < STATUS_EMPTY)
    return tl.where(known, token, 0).to(tl.int32), known


@triton.jit(do_not_specialize=["vocab_size", "parts", "blocks"])
def _attribution_scan_kernel(
    logits, row_params, workspace, drawn, attributed, out, vocab_size, parts, blocks
):
    """Grid [rows, parts]; a part is ``blocks`` blocks of tokens."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = row, row * 0
    token, known = _token_of(drawn, attributed, row, vocab_size)
    if known:
        row_max = tl.load(workspace.maximum + row)
        alpha = tl.load(row_params.alpha + b)
        top_x = finite_max(row_max)
        lowest, zero = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float32)
        base_top, base_sum = lowest, zero
        expert_top, expert_sum = lowest, zero
        anti_top, anti_sum = lowest, zero
        divergence = zero
        before, finite = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
        base_key, x_key = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
        own = _logits_of(logits.base, b, t, token, token >= 0)
        centre = tl.where((own == INF) | (own == -INF), 0.0, own)
        total = tl.cdiv(vocab_size, LANES * PER)
        for block in range(part * blocks, tl.minimum((part + 1) * blocks, total)):
            ids = block_ids(block, PER)
            inside = ids < vocab_size
            x = block_x(logits, alpha, b, t, block, row_max, vocab_size, PER)
            base = _logits_of(logits.base, b, t, ids, inside)
            base_top, base_sum = _added(base_top, base_sum, base)
            if logits.expert is not None:
                steered = inside & (alpha != 0)
                expert = _logits_of(logits.expert, b, t, ids, steered)
                expert_top, expert_sum = _added(expert_top, expert_sum, expert)
                anti = _logits_of(logits.anti, b, t, ids, steered)
                anti_top, anti_sum = _added(anti_top, anti_sum, anti)
            live = (x > -INF) & (base < INF)
            p = tl.exp(tl.where(live, x - top_x, -INF))
            # Where p is 0 the difference may be infinite.
            moved = tl.where(p > 0, (x - top_x) - (base - centre), 0.0)
            divergence += tl.sum(tl.ravel(p * moved), 0)
            finite += tl.sum(tl.ravel(live.to(tl.int32)), 0)
            ahead = inside & ((base > own) | ((base == own) & (ids < token)))
            before += tl.sum(tl.ravel(ahead.to(tl.int32)), 0)
            keys = tl.where(inside, order_key(base, ids), 0)
            base_key = tl.maximum(base_key, tl.max(tl.ravel(keys), 0))
            keys = tl.where(inside, order_key(x, ids), 0)
            x_key = tl.maximum(x_key, tl.max(tl.ravel(keys), 0))
        sums = out.sums + (row * parts + part) * SUMS_WIDTH
        tl.store(sums + BASE, base_top)
        tl.store(sums + BASE + 1, base_sum)
        tl.store(sums + EXPERT, expert_top)
        tl.store(sums + EXPERT + 1, expert_sum)
        tl.store(sums + ANTI, anti_top)
        tl.store(sums + ANTI + 1, anti_sum)
        tl.store(sums + DIVERGENCE, divergence)
        words = out.words + (row * parts + part) * WORDS_WIDTH
        tl.store(words + BEFORE, before.to(tl.int64))
        tl.store(words + FINITE, finite.to(tl.int64))
        tl.store(words + BASE_KEY, base_key)
        tl.store(words + X_KEY, x_key)


@triton.jit
def _merged(sums, part, there):
    """A role's maximum and sum from those of the parts."""
    tops = tl.load(sums + part * SUMS_WIDTH, mask=there, other=-INF)
    totals = tl.load(sums + part * SUMS_WIDTH + 1, mask=there, other=0.0)
    top = tl.max(tops, 0)
    return top, tl.sum(_joined(top, tops, totals), 0)


@triton.jit
def _probability(logit, top, total):
    """exp(logit - top) / total, NaN where all logits are -inf."""
    share = tl.where(top == INF, (logit == INF).to(tl.float32), tl.exp(logit - top))
    return tl.where(top == -INF, float("nan"), tl.div_rn(share, total))


@triton.jit(do_not_specialize=["vocab_size", "parts"])
def _attribution_kernel(
    logits, row_params, workspace, drawn, attributed, given, result, vocab_size, parts,
    NP: tl.constexpr,
):  # fmt: skip
    """Grid [rows]; NP is the most parts there are, a power of two."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row, row * 0
    token, known = _token_of(drawn, attributed, row, vocab_size)
    nan = tl.full([], float("nan"), tl.float32)
    base, expert, anti, proxy, kl = nan, nan, nan, nan, nan
    rank, changed = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    if known:
        part = tl.arange(0, NP)
        there = part < parts
        sums = given.sums + row * parts * SUMS_WIDTH
        words = given.words + row * parts * WORDS_WIDTH + part * WORDS_WIDTH
        row_max = tl.load(workspace.maximum + row)
        alpha = tl.load(row_params.alpha + b)
        raw = tl.load(workspace.words + row * ws.WORDS_WIDTH + ws.RAW)
        own = _logits_of(logits.base, b, t, token, token >= 0)
        base_top, base_sum = _merged(sums + BASE, part, there)
        base = _probability(own, base_top, base_sum)
        if logits.expert is not None:
            steered = (token >= 0) & (alpha != 0)
            top, total = _merged(sums + EXPERT, part, there)
            expert = _probability(_logits_of(logits.expert, b, t, token, steered), top, total)
            top, total = _merged(sums + ANTI, part, there)
            anti = _probability(_logits_of(logits.anti, b, t, token, steered), top, total)
        shifted = shifted_at(logits, alpha, b, t, token, row_max)
        proxy = tl.exp(ws.raw_logprob_of(shifted, raw))
        rank = 1.0 + tl.sum(tl.load(words + BEFORE, mask=there, other=0), 0).to(tl.float32)
        base_key = tl.max(tl.load(words + BASE_KEY, mask=there, other=0), 0)
        x_key = tl.max(tl.load(words + X_KEY, mask=there, other=0), 0)
        changed = (key_id(base_key) != key_id(x_key)).to(tl.float32)
        log_x = log_mass(raw)
        if base_top == INF:
            outside = tl.sum(tl.load(words + FINITE, mask=there, other=0), 0) > 0
            exact = tl.where(outside, INF, tl.log(base_sum.to(tl.float64)) - log_x)
        else:
            moved = tl.load(sums + part * SUMS_WIDTH + DIVERGENCE, mask=there, other=0.0)
            centre = tl.where(own == -INF, 0.0, own)
            mass = raw.to(tl.float64) / MASS_ONE
            exact = tl.sum(moved.to(tl.float64), 0) / mass - log_x
            exact += tl.log(base_sum.to(tl.float64)) + (base_top - centre).to(tl.float64)
        kl = tl.where(exact < 0, 0.0, exact).to(tl.float32)
    at = result + row * RESULTS
    tl.store(at, base)
    tl.store(at + 1, expert)
    tl.store(at + 2, anti)
    tl.store(at + 3, proxy)
    tl.store(at + 4, rank)
    tl.store(at + 5, changed)
    tl.store(at + 6, kl)


def launch_attribution(
    logits: Logits, params: RowParams, workspace: ws.Workspace, drawn: ws.Outputs,
    attributed: Tensor, result: Tensor, vocab_size: int,
) -> None:  # fmt: skip
    """Writes fp32 [B, 7] for [B, V] rows; workspace and drawn are sample's.

    ``attributed``: int64 [B], contiguous, -1 for the token drawn.
    """
    rows, device = len(result), result.device
    if rows == 0:
        return
    total = cdiv(vocab_size, LANES.value * PER.value)
    parts = min(splits_of(rows, vocab_size, device), total)
    blocks = cdiv(total, parts)
    parts = cdiv(total, blocks)
    left = Parts(
        torch.empty((rows, parts, SUMS_WIDTH.value), dtype=torch.float32, device=device),
        torch.empty((rows, parts, WORDS_WIDTH.value), dtype=torch.int64, device=device),
    )
    kind = (logits.kind, vocab_size)
    launch(
        _attribution_scan_kernel, kind, device, (rows, parts),
        logits, params, workspace, drawn, attributed, left, vocab_size, parts, blocks,
        num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
    launch(
        _attribution_kernel, kind, device, (rows,),
        logits, params, workspace, drawn, attributed, left, result, vocab_size, parts,
        triton.next_power_of_2(total), num_warps=1, **OPTIONS,
    )  # fmt: skip
