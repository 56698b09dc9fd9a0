"""A row's parameters, workspace and results, as the sampling kernels see them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from proxytune_kernels.kernels._common import (
    ALL,
    FLT_MAX,
    FLT_MIN,
    INF,
    MASS_ONE,
    TILE,
    cleaned,
    combined,
    exponential,
)
from proxytune_kernels.kernels._noise import best_of, gumbel, tile_words, uniform


class Tiles(NamedTuple):
    """Summaries of 128 tokens each, [rows, tiles]."""

    maximum: Any  # fp32: highest x, -inf where all are masked
    scaled: Any  # fp32: sum of exp((x - maximum) / T), where a filter or the logprob needs it
    raw: Any  # fp32: sum of exp(x - maximum)
    race: Any  # fp32: upper bound of (x - maximum) / T + g; unfiltered rows only
    count: Any  # int16: tokens not masked, + 256 where there was a NaN


class State(NamedTuple):
    """What one launch leaves for the next, and scratch; one line per row."""

    numbers: Any  # fp32 [rows, 16]: MAX, HIGH, LOW, and from PIVOTS
    masses: Any  # int64 [rows, 32]: CUT, ...
    counters: Any  # int32 [rows, 4]: MODE, ...
    keys: Any  # int64 [rows, LIST + SHORT]: order keys of the tokens in question; a part of them
    rank: Any  # int32 [rows, SHORT]: of each of a short list, the tokens before it
    before: Any  # int64 [rows, SHORT]: and their mass
    tiles: Any  # int32 [rows, MAX_TILES]: tiles to read again


class Outputs(NamedTuple):
    """Results, [rows]."""

    token_ids: Any  # int64
    logprobs: Any  # fp32
    raw_logprobs: Any  # fp32
    num_kept: Any  # int32
    status: Any  # int32


# Columns of State.numbers
MAX = tl.constexpr(0)
HIGH = tl.constexpr(1)  # tokens with x - max >= this are kept
LOW = tl.constexpr(2)  # tokens below this are not
PIVOTS = tl.constexpr(8)
NUM_PIVOTS = tl.constexpr(8)
# Columns of State.masses
CUT = tl.constexpr(0)  # order key of the last kept token
KEPT = tl.constexpr(1)  # mass of the kept set
RAW = tl.constexpr(2)  # mass of the row at temperature 1
ABOVE_COUNT = tl.constexpr(3)  # of the tokens from HIGH up
ABOVE_MASS = tl.constexpr(4)
TARGET = tl.constexpr(5)  # mass that top_p asks for
TOTAL = tl.constexpr(6)  # mass of the row at its temperature
BEST = tl.constexpr(7)  # packed score
COUNTS = tl.constexpr(8)  # tokens from each pivot up
MASSES = tl.constexpr(16)  # and their mass
MASSES_WIDTH = tl.constexpr(32)
# Columns of State.counters
MODE = tl.constexpr(0)
NARROWED = tl.constexpr(1)  # programs that are done with narrow
FINISHED = tl.constexpr(2)
LISTED = tl.constexpr(3)  # length of State.keys
# Modes
DONE = tl.constexpr(0)
FLAT = tl.constexpr(1)  # narrow and finish go on, spread over the vocabulary
ALONE = tl.constexpr(2)  # one program of finish does it all

LIST = tl.constexpr(8192)
KEYS_WIDTH = tl.constexpr(8192 + 512)
SHORT = tl.constexpr(512)
MAX_TILES = tl.constexpr(64)
LOWEST = tl.constexpr(-0x8000000000000000)


@triton.jit
def is_valid(row_params, b, t):
    """Whether request b's parameters are in range at position t."""
    alpha, temperature = tl.load(row_params.alpha + b), tl.load(row_params.temperature + b)
    top_k, top_p = tl.load(row_params.top_k + b), tl.load(row_params.top_p + b)
    min_p, order = tl.load(row_params.min_p + b), tl.load(row_params.filter_order + b)
    # Comparisons are false for NaN.
    valid = (alpha >= -FLT_MAX) & (alpha <= FLT_MAX) & (temperature >= 0)
    valid = valid & (temperature <= FLT_MAX) & (top_k >= -1) & (top_p > 0) & (top_p <= 1)
    valid = valid & (min_p >= 0) & (min_p <= 1) & (order >= 0) & (order <= 2)
    return valid & (tl.load(row_params.position + b) + t >= 0)


@triton.jit
def noise_key(row_params, b, t):
    """Seed and position, int64, of request b at position t."""
    return tl.load(row_params.seed + b), tl.load(row_params.position + b) + t


@triton.jit
def temperature_of(row_params, b):
    """(greedy, 1 / T); 1 where greedy."""
    temperature = tl.load(row_params.temperature + b)
    greedy = temperature < FLT_MIN
    return greedy, tl.div_rn(1.0, tl.where(greedy, 1.0, temperature))


@triton.jit
def filters_of(row_params, b, vocab_size):
    """Valid filters: (top_k, top_p, min_p's shift, order); docs/contracts.md, Selection.

    top_k is ALL where it is off, top_p has 32 fractional bits, the shift is the least x - max that
    min_p keeps, -inf where it is off.
    """
    temperature, top_k = tl.load(row_params.temperature + b), tl.load(row_params.top_k + b)
    top_p, min_p = tl.load(row_params.top_p + b), tl.load(row_params.min_p + b)
    divisor = tl.where(temperature < FLT_MIN, 1.0, temperature)
    shift = (divisor.to(tl.float64) * tl.log(min_p.to(tl.float64))).to(tl.float32)
    shift = tl.where(min_p > 0, shift, -INF)
    top_k = tl.where((top_k > 0) & (top_k < vocab_size), top_k, ALL)
    share = (top_p.to(tl.float64) * 4294967296.0).to(tl.int64)
    return top_k, share, shift, tl.load(row_params.filter_order + b)


@triton.jit
def is_unfiltered(greedy, top_k, top_p, min_p):
    """Whether the row draws from all its tokens: the first pass then bounds every tile's race."""
    return (greedy == 0) & (top_k == ALL) & (top_p >= 1.0) & (min_p <= 0.0)


@triton.jit
def log_mass(mass):
    """log(mass / 2^44), fp64."""
    return tl.log(mass.to(tl.float64) / MASS_ONE)


@triton.jit
def write_nothing(out, row, status):
    """Results of a row with nothing to draw from."""
    tl.store(out.token_ids + row, tl.full([], -1, tl.int64))
    tl.store(out.logprobs + row, float("nan"))
    tl.store(out.raw_logprobs + row, float("nan"))
    tl.store(out.num_kept + row, 0)
    tl.store(out.status + row, status)


@triton.jit
def write_drawn(out, row, token, d, inv_t, greedy, count, kept_mass, raw_mass):
    """Results of a row that drew ``token``, whose x - max is d; the status is written elsewhere."""
    scaled = d.to(tl.float64) * inv_t.to(tl.float64)
    logprob = tl.where(greedy, 0.0, (scaled - log_mass(kept_mass)).to(tl.float32))
    tl.store(out.token_ids + row, token)
    tl.store(out.logprobs + row, logprob)
    tl.store(out.raw_logprobs + row, (d.to(tl.float64) - log_mass(raw_mass)).to(tl.float32))
    tl.store(out.num_kept + row, count.to(tl.int32))


@triton.jit
def finite_max(row_max):
    """The maximum after `cleaned`: +inf tokens have become 0."""
    return tl.where(row_max == INF, 0.0, row_max)


@triton.jit
def x_at(logits, strides, alpha, b, t, token, row_max):
    """Cleaned x of one token of the row, int32."""
    return cleaned(combined(logits, strides, alpha, b, t, token, token >= 0), row_max)


@triton.jit
def difference_at(logits, strides, alpha, b, t, token, row_max):
    """x - max of one token of the row."""
    return x_at(logits, strides, alpha, b, t, token, row_max) - finite_max(row_max)


@triton.jit
def row_mass(sums, d, hi, lo, floor):
    """2^44 times the row's mass from its tiles' (relative to their maxima), int64.

    d is the tiles' maxima less the row's. Within 4.2e-6 of the exact mass, relatively
    (docs/gpu.md), and the same in any order: integers are added.
    """
    weight = exponential(d, hi, lo, floor).to(tl.float64)
    return tl.sum((sums.to(tl.float64) * weight * MASS_ONE).to(tl.int64), 0)


@triton.jit
def race_tile(
    logits, strides, alpha, b, t, tile, row_max, inv_t, greedy, seed, position, stream, vocab_size
):
    """Packed score of the best token of one whole tile; greedy rows go by x alone."""
    ids = tile * TILE + tl.arange(0, TILE)
    x = combined(logits, strides, alpha, b, t, ids, ids < vocab_size)
    x = cleaned(x, row_max)
    score = x - row_max
    if greedy == 0:
        first = tl.full([1], 0, tl.int32) + tile * TILE
        words = tl.reshape(tile_words(first, seed, position, stream, 1), [TILE])
        score = score * inv_t + gumbel(uniform(words, ids, seed, position, stream))
    return best_of(tl.where(x > -INF, score, -INF), ids)
