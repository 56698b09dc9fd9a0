"""What the tiles' summaries say of a row's cutoff: a bound that is sure, and a guess that is not.

docs/gpu.md derives both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.kernels._common import INF, TILE, cleaned, combined
from proxytune_kernels.kernels._row import NUM_PIVOTS

STEPS = tl.constexpr(8)  # trial cutoffs at once
SAMPLES = tl.constexpr(1024)  # tokens that tell where a flat row's cutoff may lie


@triton.jit
def cutoff_bound(d, live, sums, hi, need_count, need_share, use_mass):
    """A value that the last token needed is not below, as x - max: -inf where none is found.

    Of a tile whose maximum is at least the bound, that maximum is above it, and all of its mass but
    what 127 tokens below the bound can hold. When these meet the need, the tokens do.
    """
    weight = tl.exp2(d * hi)
    inner = tl.where(live, sums * weight, 0.0)
    # fp32 sums of thousands of terms and approximate exponentials: 1e-4 covers both many times.
    need_mass = need_share * tl.sum(inner, 0) * 1.0001
    step = tl.arange(0, STEPS)
    upper = tl.full([], 0.0, tl.float32)
    lower = tl.min(tl.where(live, d, 0.0), 0)
    bound = tl.full([], -INF, tl.float32)
    for trial in tl.static_range(4):
        part = (step + 1).to(tl.float32) / STEPS
        if trial == 0:
            part = part * part * part  # close to the maximum first: outliers lie far below
        pivots = upper + (lower - upper) * part
        above = live[None, :] & (d[None, :] >= pivots[:, None])
        count = tl.sum(above.to(tl.int32), 1)
        rest = inner[None, :] - 127.0 * tl.exp2(pivots * hi)[:, None]
        held = tl.sum(tl.where(above, tl.maximum(weight[None, :], rest), 0.0), 1)
        met = (count >= need_count) | (use_mass & (held >= need_mass))
        first = tl.min(tl.where(met, step, STEPS), 0)
        passed = tl.max(tl.where(step == first - 1, pivots, -INF), 0)
        upper = tl.where(first > 0, passed, upper)
        found = tl.max(tl.where(step == first, pivots, -INF), 0)
        lower = tl.where(first < STEPS, found, lower)
        bound = tl.where(first < STEPS, found, bound)
    return bound


@triton.jit
def guess_pivots(
    logits, strides, tiles, alpha, b, t, first_tile, row_max, d, weight, whole, share, hi, of_mass,
    vocab_size,
):  # fmt: skip
    """Eight values around where a flat row's cutoff may lie, as x - max, descending: fp32 [8].

    The tiles' maxima (d, of weight ``weight``) are known, each the largest of 128; evenly spaced
    tokens stand for the others, whose weights together are known too. The pivots reach four
    standard deviations of that estimate to each side of where the weights above make up ``share``
    of ``whole``. A wrong guess costs time alone.
    """
    ids = ((tl.arange(0, SAMPLES).to(tl.int64) * vocab_size) // SAMPLES).to(tl.int32)
    x = cleaned(combined(logits, strides, alpha, b, t, ids, ids < vocab_size), row_max)
    sampled = x - row_max
    other = (x > -INF) & (x < tl.load(tiles.maximum + first_tile + ids // TILE))
    stands = tl.where(other, tl.where(of_mass, tl.exp2(sampled * hi), 1.0), 0.0)
    rest = tl.maximum(whole - tl.sum(weight, 0), 0.0)
    stands = stands * (rest / tl.maximum(tl.sum(stands, 0), 1e-30))
    lowest = tl.min(tl.where(other, sampled, 0.0), 0)
    side = tl.where(tl.arange(0, 2) == 0, -1.0, 1.0)
    error = tl.full([], 0.0, tl.float32)
    upper, lower = error, error
    for _ in range(2):  # the cutoff itself, then both ends
        wanted = share * whole + 4.0 * side * error
        below, above = tl.zeros([2], tl.float32) + lowest, tl.zeros([2], tl.float32)
        for _step in range(16):
            middle = 0.5 * (below + above)
            held = tl.sum(tl.where(d[None, :] >= middle[:, None], weight[None, :], 0.0), 1)
            reached = sampled[None, :] >= middle[:, None]
            held += tl.sum(tl.where(reached, stands[None, :], 0.0), 1)
            below = tl.where(held >= wanted, middle, below)
            above = tl.where(held >= wanted, above, middle)
        upper = tl.max(tl.where(side < 0, below, -INF), 0)
        lower = tl.min(tl.where(side > 0, below, INF), 0)
        # The share of the others that lies above is estimated from SAMPLES of them.
        taken = (sampled >= upper).to(tl.float32)
        inner = tl.sum(stands * taken, 0) / tl.maximum(rest, 1e-30)
        off = stands * (taken - inner)
        error = tl.sqrt(tl.sum(off * off, 0))
    part = tl.arange(0, NUM_PIVOTS).to(tl.float32) / (NUM_PIVOTS - 1)
    return upper + (lower - upper) * part
