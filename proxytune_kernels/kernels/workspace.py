"""What the launches of a draw hand on: summaries of tiles, a row's workspace, results.

Per row 18 bytes of summaries for every 128 tokens, and 68 KB of workspace (V up to 131,072).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels.common import TILE, cdiv, log_mass
from proxytune_kernels.kernels.selection import CHUNK, MAX_TILES, NUM_PIVOTS

TILES_PER_PROGRAM = 8  # of scan

# Columns of Workspace.words
CUTOFF = tl.constexpr(0)  # order key that the kept set reaches to
KEPT = tl.constexpr(1)  # mass of the kept set
RAW = tl.constexpr(2)  # mass of the row at temperature 1
BEST = tl.constexpr(3)  # packed score
PIVOTS = tl.constexpr(4)  # their keys, counts and masses
WORDS_WIDTH = tl.constexpr(4 + 3 * NUM_PIVOTS.value)
# Columns of Workspace.counters
MODE = tl.constexpr(0)
DRAWS_DONE = tl.constexpr(1)  # programs that have drawn
NUM_CANDIDATES = tl.constexpr(2)
COUNTERS_WIDTH = tl.constexpr(4)
# Modes
DONE = tl.constexpr(0)
SPREAD = tl.constexpr(1)  # pivots and draw go on, spread over the vocabulary
SEARCHED = tl.constexpr(2)  # one program of draw searched through the row
# Of the pivots
BOTTOM = tl.constexpr(0)  # no token below this pivot is kept, or counts
LIKELY = tl.constexpr(1)  # min_p's cutoff
MIN_CANDIDATES = tl.constexpr(8192)


class Tiles(NamedTuple):
    """Summaries of 128 tokens each, [rows, tiles]."""

    maximum: Any  # fp32: highest x, -inf where all are masked
    scaled: Any  # fp32: sum of exp((x - maximum) / T), where a filter or the logprob needs it
    raw: Any  # fp32: sum of exp(x - maximum)
    score_bound: Any  # fp32: upper bound of (x - maximum) / T + g; unfiltered rows only
    count: Any  # int16: tokens not masked, + 256 where there was a NaN


class Workspace(NamedTuple):
    """What one launch leaves for the next, and scratch; one line per row."""

    maximum: Any  # fp32 [rows]
    words: Any  # int64 [rows, WORDS_WIDTH]: CUTOFF, ...
    counters: Any  # int32 [rows, 4]: MODE, ...
    keys: Any  # int64 [rows, candidates + CHUNK]: a list of order keys, and scratch
    tiles: Any  # int32 [rows, MAX_TILES]: tiles to read again


class Outputs(NamedTuple):
    """Results, [rows]."""

    token_ids: Any  # int64
    logprobs: Any  # fp32
    raw_logprobs: Any  # fp32
    num_kept: Any  # int32
    status: Any  # int32


@triton.jit
def write_nothing(out, row, status):
    """Results of a row with nothing to draw from."""
    tl.store(out.token_ids + row, tl.full([], -1, tl.int64))
    tl.store(out.logprobs + row, float("nan"))
    tl.store(out.raw_logprobs + row, float("nan"))
    tl.store(out.num_kept + row, 0)
    tl.store(out.status + row, status)


@triton.jit
def logprob_of(shifted, inv_t, greedy, log_kept):
    """Log of the probability that a kept token is drawn with, fp32; 0 in greedy rows."""
    scaled = shifted.to(tl.float64) * inv_t.to(tl.float64)
    return tl.where(greedy, 0.0, (scaled - log_kept).to(tl.float32))


@triton.jit
def raw_logprob_of(shifted, raw_mass):
    """Log of a token's probability at temperature 1 without filters, fp32."""
    return (shifted.to(tl.float64) - log_mass(raw_mass)).to(tl.float32)


@triton.jit
def write_drawn(out, row, token, shifted, inv_t, greedy, count, kept_mass, raw_mass):
    """Results of a row that drew ``token``, whose x - max is ``shifted``; all but the status."""
    logprob = logprob_of(shifted, inv_t, greedy, log_mass(kept_mass))
    tl.store(out.token_ids + row, token)
    tl.store(out.logprobs + row, logprob)
    tl.store(out.raw_logprobs + row, raw_logprob_of(shifted, raw_mass))
    tl.store(out.num_kept + row, count.to(tl.int32))


def tiles_of(rows: int, vocab_size: int, device: torch.device) -> Tiles:
    """Unwritten summaries, whole programs of scan."""
    width = cdiv(vocab_size, TILE.value * TILES_PER_PROGRAM) * TILES_PER_PROGRAM
    numbers = torch.empty((4, rows, width), dtype=torch.float32, device=device).unbind()
    count = torch.empty((rows, width), dtype=torch.int16, device=device)
    return Tiles._make((*numbers, count))


def at_once(num_tiles: int) -> int:
    """Summaries that one program holds of a whole row: a power of two, few kinds of them."""
    return max(256, 1 << (num_tiles - 1).bit_length())


@triton.jit
def max_candidates(vocab_size):
    """Tokens between two pivots that a row has room for: twice as many as are likely there."""
    return tl.maximum(MIN_CANDIDATES, vocab_size // 16)


@triton.jit
def list_of(workspace, row, vocab_size):
    """Where a row's list of order keys begins, and its scratch."""
    room = max_candidates(vocab_size)
    keys = workspace.keys + row * (room + CHUNK)
    return keys, keys + room


@triton.jit
def pivots_of(workspace, row):
    """Where a row's pivots begin."""
    return workspace.words + (row * WORDS_WIDTH + PIVOTS)


def workspace_of(rows: int, vocab_size: int, device: torch.device) -> Workspace:
    """An unwritten workspace; select writes what later launches read."""

    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, width), dtype=dtype, device=device)

    room = max(MIN_CANDIDATES.value, vocab_size // 16)
    return Workspace(
        empty(1, torch.float32), empty(WORDS_WIDTH.value, torch.int64),
        empty(COUNTERS_WIDTH.value, torch.int32), empty(room + CHUNK.value, torch.int64),
        empty(MAX_TILES.value, torch.int32),
    )  # fmt: skip


def outputs_of(rows: int, device: torch.device) -> Outputs:
    """Unwritten results."""

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=device)

    return Outputs(
        empty(torch.int64), empty(torch.float32), empty(torch.float32), empty(torch.int32),
        empty(torch.int32),
    )  # fmt: skip
