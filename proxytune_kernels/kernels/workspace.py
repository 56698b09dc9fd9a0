"""What the launches of a draw hand on: summaries of tiles, a row's workspace, results.

Per row 18 bytes of summaries for every 128 tokens, and 78 KB of workspace.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels.common import TILE, log_mass
from proxytune_kernels.kernels.selection import MAX_SHORT, MAX_TILES

TILES_PER_PROGRAM = 8  # of scan

# Columns of Workspace.numbers
MAX = tl.constexpr(0)
HIGH = tl.constexpr(1)  # tokens with x - max >= this are kept
LOW = tl.constexpr(2)  # tokens below this are not
PIVOTS = tl.constexpr(8)
NUMBERS_WIDTH = tl.constexpr(16)
# Columns of Workspace.masses
CUTOFF = tl.constexpr(0)  # order key of the last kept token
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
# Columns of Workspace.counters
MODE = tl.constexpr(0)
PIVOTS_DONE = tl.constexpr(1)  # programs that have counted
DRAWS_DONE = tl.constexpr(2)  # programs that have drawn
NUM_CANDIDATES = tl.constexpr(3)
COUNTERS_WIDTH = tl.constexpr(4)
# Modes
DONE = tl.constexpr(0)
FLAT = tl.constexpr(1)  # pivots and draw go on, spread over the vocabulary
SEARCHED = tl.constexpr(2)  # one program of draw searches through the row
# Columns of Workspace.keys
MAX_CANDIDATES = tl.constexpr(8192)
KEYS_WIDTH = tl.constexpr(8192 + 512)  # behind the candidates a short list of them


class Tiles(NamedTuple):
    """Summaries of 128 tokens each, [rows, tiles]."""

    maximum: Any  # fp32: highest x, -inf where all are masked
    scaled: Any  # fp32: sum of exp((x - maximum) / T), where a filter or the logprob needs it
    raw: Any  # fp32: sum of exp(x - maximum)
    score_bound: Any  # fp32: upper bound of (x - maximum) / T + g; unfiltered rows only
    count: Any  # int16: tokens not masked, + 256 where there was a NaN


class Workspace(NamedTuple):
    """What one launch leaves for the next, and scratch; one line per row."""

    numbers: Any  # fp32 [rows, 16]: MAX, HIGH, LOW, and from PIVOTS
    masses: Any  # int64 [rows, 32]: CUTOFF, ...
    counters: Any  # int32 [rows, 4]: MODE, ...
    keys: Any  # int64 [rows, MAX_CANDIDATES + MAX_SHORT]: order keys
    rank: Any  # int32 [rows, MAX_SHORT]: of each of a short list, the tokens before it
    before: Any  # int64 [rows, MAX_SHORT]: and their mass
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
    width = triton.cdiv(vocab_size, TILE.value * TILES_PER_PROGRAM) * TILES_PER_PROGRAM
    numbers = torch.empty((4, rows, width), dtype=torch.float32, device=device).unbind()
    count = torch.empty((rows, width), dtype=torch.int16, device=device)
    return Tiles._make((*numbers, count))


def at_once(num_tiles: int) -> int:
    """Summaries that one program holds of a whole row: a power of two, few kinds of them."""
    return max(256, triton.next_power_of_2(num_tiles))


def workspace_of(rows: int, device: torch.device) -> Workspace:
    """An unwritten workspace; select writes what later launches read."""

    def empty(width: tl.constexpr, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, width.value), dtype=dtype, device=device)

    return Workspace(
        empty(NUMBERS_WIDTH, torch.float32), empty(MASSES_WIDTH, torch.int64),
        empty(COUNTERS_WIDTH, torch.int32), empty(KEYS_WIDTH, torch.int64),
        empty(MAX_SHORT, torch.int32), empty(MAX_SHORT, torch.int64),
        empty(MAX_TILES, torch.int32),
    )  # fmt: skip


def outputs_of(rows: int, device: torch.device) -> Outputs:
    """Unwritten results."""

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=device)

    return Outputs(
        empty(torch.int64), empty(torch.float32), empty(torch.float32), empty(torch.int32),
        empty(torch.int32),
    )  # fmt: skip
