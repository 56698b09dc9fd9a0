"""workspace."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels.common import log_mass
from proxytune_kernels.kernels.selection import MAX_TILES, SHORT


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


TILES_PER_PROGRAM = 8


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

    keys, short = KEYS_WIDTH.value, SHORT.value
    return State(
        empty(16, torch.float32), empty(MASSES_WIDTH.value, torch.int64),
        empty(4, torch.int32), empty(keys, torch.int64), empty(short, torch.int32),
        empty(short, torch.int64), empty(MAX_TILES.value, torch.int32),
    )  # fmt: skip
