"""What all kernels share: their inputs, the contract's arithmetic, order keys and blocks of a row.

The arithmetic is docs/contracts.md's, operation by operation: kernels are compiled without
contraction (``OPTIONS``), and a fused multiply-add is written as one.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"enable_fp_fusion": False}
"""Compile options of every kernel.

Nothing is compiled while serving: what changes from call to call is marked do_not_specialize, and
is no field of a tuple, where Triton does not look for the mark. So is vocab_size where no wide
access depends on it. The number of positions is 1 (sample) or any other (verify).
"""
TILE = tl.constexpr(128)  # tokens a summary
LANES = tl.constexpr(128)  # threads a block of tokens is spread over

STATUS_NAN = tl.constexpr(1)
STATUS_POSITIVE_INF = tl.constexpr(2)
STATUS_EMPTY = tl.constexpr(4)
STATUS_BAD_PARAMS = tl.constexpr(8)
ORDER_VLLM = tl.constexpr(0)
ORDER_HF = tl.constexpr(1)
ORDER_JOINT = tl.constexpr(2)

INF = tl.constexpr(float("inf"))
FLT_MAX = tl.constexpr(3.4028234663852886e38)
FLT_MIN = tl.constexpr(1.1754943508222875e-38)  # below it a temperature is greedy
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer in the low bits
ROUNDER_BITS = tl.constexpr(0x4B400000)
DIGIT = tl.constexpr(4194304.0)  # 2^22: masses are sums of two digits of 22 bits
MASS_ONE = tl.constexpr(17592186044416.0)  # 2^44, the mass of the likeliest token
NO_TARGET = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # no mass reaches it
TOP_K_OFF = tl.constexpr(0x7FFFFFFF)
TOP_P_OFF = tl.constexpr(1 << 32)
LOWEST = tl.constexpr(-0x8000000000000000)
ID_BITS = tl.constexpr(19)  # vocab_size is at most 2^19
LAST_ID = tl.constexpr((1 << 19) - 1)
NO_CUTOFF = tl.constexpr(0x00800000 << 19)  # the lowest order key of a token that is not masked
_BLOCK = 1024  # tokens that a program reads at once where a row is spread over several


class Lines(NamedTuple):
    """Rows of a matrix [B, V] or [B, T, V], :func:`lines_of`.

    Where all begin at multiples of 16 elements and 16 bytes, the steps stand here as they are, and
    Triton makes wide accesses of it. Where not, n stands as 4 n + 3, and ``first`` begins at no
    multiple of 16 bytes: Triton compiles the same kernel for all of these.
    """

    first: Any  # of the row, ``skipped`` elements from its beginning
    b: Any  # elements from one request to the next
    t: Any  # and from one position
    skipped: Any
    aligned: Any


class EditLines(NamedTuple):
    """Penalties and biases of some tokens of each row: :mod:`proxytune_kernels.kernels.edits`."""

    entries: Lines  # int32 [B, T, 4 M]: id, count, in prompt, bits of the bias
    table: Lines  # int32 [B, T, 2 W + M]: words, entries before each, entries by token
    penalties: Any  # fp32 [B, 3]
    words: Any  # W, as 4 W + 3


class Logits(NamedTuple):
    """What makes x: logits of each role, and the optional constraints."""

    base: Lines
    expert: Lines | None  # None with anti: base alone
    anti: Lines | None
    bias: Lines | None  # fp32
    allowed: Lines | None  # int32 [B, T, ceil(V / 32)]
    edits: EditLines | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """All that kernels are compiled for."""
        kinds = (
            None if lines is None else (lines.first.dtype, lines.aligned is _ALIGNED)
            for lines in self[:-1]
        )
        return (*kinds, self.edits is not None)


class Exponent(NamedTuple):
    """log2(e) / T as the sum hi + lo; floor is the difference whose exponent is -100. All fp32."""

    hi: Any
    lo: Any
    floor: Any


def packed(tensor: Tensor) -> Tensor:
    """The same numbers, contiguous, at a multiple of 16 bytes: Triton compiles anew for others."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


_ALIGNED, _UNALIGNED = tl.constexpr(True), tl.constexpr(False)


def lines_of(tensor: Tensor | None, wide: bool = True) -> Lines | None:
    """A matrix as a kernel gets it; without ``wide`` accesses to it are never wide."""
    if tensor is None:
        return None
    b, t = tensor.stride(0), tensor.stride(1) if tensor.dim() == 3 else 0
    place = tensor.data_ptr() % 16
    if wide and ((b | t | place) & 15) == 0:
        return Lines(tensor, b, t, 0, _ALIGNED)
    skipped = (tensor.itemsize - place) % 16 // tensor.itemsize
    if skipped >= tensor.shape[-1]:  # the kernel adds what it does not know: no wide access
        skipped = 0
    if skipped:
        tensor = tensor[..., skipped:]
    return Lines(tensor, 4 * b + 3, 4 * t + 3, 4 * skipped + 3, _UNALIGNED)


def inputs(
    base: Tensor, expert: Tensor | None, anti: Tensor | None,
    bias: Tensor | None = None, allowed_mask: Tensor | None = None,
) -> Logits:  # fmt: skip
    """Tensors [B, V] or [B, T, V] as kernel arguments."""
    first = lines_of(base)
    assert first is not None
    return Logits(
        first, lines_of(expert), lines_of(anti), lines_of(bias), lines_of(allowed_mask, wide=False)
    )


@triton.jit
def line_of(lines, b, t):
    """Where request b's row at position t begins: int64, as rows may lie 2^31 elements apart."""
    if lines.aligned:
        at = lines.first + (b * lines.b + t * lines.t)
    else:
        at = lines.first + (b * (lines.b >> 2) + t * (lines.t >> 2) - (lines.skipped >> 2))
    return at


@triton.jit
def combined(logits, alpha, b, t, ids, inside):
    """x of tokens ``ids``, fp32, -inf where not ``inside``; NaN, +inf and -0 as they come.

    docs/contracts.md, Combination. alpha = 0 reads base alone.
    """
    at = line_of(logits.base, b, t)
    base = tl.load(at + ids, mask=inside, other=-INF).to(tl.float32)
    x = base
    if logits.expert is not None:
        # A mask, not a branch: all three loads are under way at once. Where alpha is 0 both are 0,
        # and the sum is base exactly.
        steered = inside & (alpha != 0)
        at = line_of(logits.expert, b, t)
        expert = tl.load(at + ids, mask=steered, other=0).to(tl.float32)
        at = line_of(logits.anti, b, t)
        anti = tl.load(at + ids, mask=steered, other=0).to(tl.float32)
        x = tl.fma(alpha, expert - anti, base)
    if logits.bias is not None:
        at = line_of(logits.bias, b, t)
        x = x + tl.load(at + ids, mask=inside, other=0)
    # -inf in base masks the token whatever the others hold (an inf there would make NaN).
    x = tl.where(base == -INF, -INF, x)
    if logits.allowed is not None:
        at = line_of(logits.allowed, b, t)
        words = tl.load(at + (ids >> 5), mask=inside, other=0)
        x = tl.where((words >> (ids & 31)) & 1 != 0, x, -INF)
    if logits.edits is not None:
        x = edited_x(logits.edits, b, t, ids, inside, x)
    return x


@triton.jit
def ones_below(word, bit):
    """How many of the bits of an int32 below ``bit``, at most 32, are set."""
    low = (word.to(tl.uint32).to(tl.int64) & ((1 << bit.to(tl.int64)) - 1)).to(tl.uint32)
    low = low - ((low >> 1) & 0x55555555)
    low = (low & 0x33333333) + ((low >> 2) & 0x33333333)
    low = (low + (low >> 4)) & 0x0F0F0F0F
    low = low + (low >> 8)
    return ((low + (low >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def edited_x(edits, b, t, ids, inside, x):
    """x of tokens after what their entries do; docs/contracts.md, Edits."""
    table, words = line_of(edits.table, b, t), edits.words >> 2
    word = tl.load(table + (ids >> 5), mask=inside, other=0)
    # A token that is masked stays so.
    hit = ((word >> (ids & 31)) & 1 != 0) & (x > -INF)
    rank = tl.load(table + words + (ids >> 5), mask=hit, other=0) + ones_below(word, ids & 31)
    entry = tl.load(table + 2 * words + rank, mask=hit, other=0)
    at = line_of(edits.entries, b, t) + 4 * entry
    count = tl.load(at + 1, mask=hit, other=0)
    in_prompt = tl.load(at + 2, mask=hit, other=0)
    y = x + tl.load(at + 3, mask=hit, other=0).to(tl.float32, bitcast=True)
    repetition, presence = tl.load(edits.penalties + 3 * b), tl.load(edits.penalties + 3 * b + 1)
    frequency = tl.load(edits.penalties + 3 * b + 2)
    factor = repetition + tl.zeros_like(y)
    repeated = tl.where(y > 0, tl.div_rn(y, factor), y * factor)
    y = tl.where((count > 0) | (in_prompt != 0), repeated, y)
    y = tl.where(count > 0, y - frequency * count.to(tl.float32) - presence, y)
    return tl.where(hit, y, x)


@triton.jit
def cleaned(x, row_max):
    """x with NaN masked; where the row's maximum is +inf, 0 for its tokens and -inf for others."""
    x = tl.maximum(x, -INF)  # of NaN and a number it is the number
    if row_max == INF:
        x = tl.where(x == INF, 0.0, -INF)
    return x


@triton.jit
def exponent(temperature):
    """The exponent of a temperature; greedy rows have that of T = 1."""
    t = tl.where(temperature < FLT_MIN, 1.0, temperature).to(tl.float64)
    value = 1.4426950408889634 / tl.minimum(t, 1.329227995784916e36)  # 2^120, for the floor's sake
    hi = value.to(tl.float32)
    lo = (value - hi.to(tl.float64)).to(tl.float32)
    return Exponent(hi, lo, (-100.0 / value).to(tl.float32))


@triton.jit
def exponential(shifted, e):
    """exp2(shifted * (hi + lo)) for shifted <= 0, exactly 1 at 0: Cephes exp2f, as the contract."""
    clamped = tl.maximum(shifted, e.floor)  # -inf becomes finite, where the mass is 0
    n = tl.fma(clamped, e.hi, ROUNDER)
    f = tl.fma(clamped, e.lo, tl.fma(clamped, e.hi, ROUNDER - n))
    p = tl.fma(f, 1.535336188319500e-4, 1.339887440266574e-3)
    p = tl.fma(p, f, 9.618437357674640e-3)
    p = tl.fma(p, f, 5.550332471162809e-2)
    p = tl.fma(p, f, 2.402264791363012e-1)
    p = tl.fma(p, f, 6.931472028550421e-1)
    p = tl.fma(p, f, 1.0)
    scaled = p.to(tl.int32, bitcast=True) + (n.to(tl.int32, bitcast=True) << 23)
    return scaled.to(tl.float32, bitcast=True)


@triton.jit
def digits(p):
    """round(2^44 p) as two digits of 22 bits, (high, low) int32; docs/contracts.md, Selection."""
    first = tl.fma(p, DIGIT, ROUNDER)
    rest = tl.fma(p, DIGIT, ROUNDER - first)
    second = tl.fma(rest, DIGIT, ROUNDER)
    high = first.to(tl.int32, bitcast=True) - ROUNDER_BITS
    return high, second.to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def mass(x, row_max, e):
    """round(2^44 exp((x - max) / T)), int64; 0 for masked tokens."""
    high, low = digits(exponential(x - row_max, e))
    return (high.to(tl.int64) << 22) + low.to(tl.int64)


@triton.jit
def mass_target(top_p, total):
    """ceil(p * total), at least 1: top_p int64 with 32 fractional bits, total int64; exact."""
    p, q = top_p.to(tl.uint64), total.to(tl.uint64)
    low = p * (q & 0xFFFFFFFF)
    high = p * (q >> 32)
    target = (high + (low >> 32)).to(tl.int64) + ((low & 0xFFFFFFFF) != 0).to(tl.int64)
    return tl.where(top_p >= TOP_P_OFF, NO_TARGET, tl.maximum(target, 1))


@triton.jit
def order_key(x, ids):
    """51 bits that descend as the contract orders tokens: x descending, then id ascending.

    No two tokens share a key.
    """
    # -0 + 0 = +0: equal logits must have equal bits for the order by id.
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    ordered = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return (ordered.to(tl.int64) << ID_BITS) | (LAST_ID - ids).to(tl.int64)


@triton.jit
def key_value(key):
    """x of an order key."""
    ordered = (key >> ID_BITS).to(tl.uint32)
    bits = tl.where(ordered >= 0x80000000, ordered & 0x7FFFFFFF, ordered ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def key_id(key):
    """Token id of an order key, int32."""
    return LAST_ID - (key & LAST_ID).to(tl.int32)


@triton.jit
def block_ids(block, PER: tl.constexpr):
    """Token ids of a block, int32 [128, PER]."""
    lane = tl.arange(0, LANES)[:, None] * PER + tl.arange(0, PER)[None, :]
    return block * (LANES * PER) + lane


@triton.jit
def block_x(logits, alpha, b, t, block, row_max, vocab_size, PER: tl.constexpr):
    """Cleaned x of a block, fp32 [128, PER]; -inf past the vocabulary."""
    ids = block_ids(block, PER)
    if (block + 1) * (LANES * PER) <= vocab_size:
        inside = tl.full([LANES, PER], True, tl.int1)
        x = combined(logits, alpha, b, t, ids, inside)
    else:
        x = combined(logits, alpha, b, t, ids, ids < vocab_size)
    return cleaned(x, row_max)


@triton.jit
def temperature_of(row_params, b):
    """(greedy, 1 / T); 1 where greedy."""
    temperature = tl.load(row_params.temperature + b)
    greedy = temperature < FLT_MIN
    return greedy, tl.div_rn(1.0, tl.where(greedy, 1.0, temperature))


@triton.jit
def log_mass(mass):
    """log(mass / 2^44), fp64."""
    return tl.log(mass.to(tl.float64) / MASS_ONE)


@triton.jit
def finite_max(row_max):
    """The maximum of what `cleaned` returns: +inf has become 0."""
    return tl.where(row_max == INF, 0.0, row_max)


@triton.jit
def shifted_from(x, top):
    """x - top, -inf where x is and nowhere else: a difference past fp32 becomes -FLT_MAX."""
    return tl.where(x > -INF, tl.maximum(x - top, -FLT_MAX), -INF)


@triton.jit
def x_at(logits, alpha, b, t, token, row_max):
    """Cleaned x of one token of the row, int32."""
    return cleaned(combined(logits, alpha, b, t, token, token >= 0), row_max)


@triton.jit
def shifted_at(logits, alpha, b, t, token, row_max):
    """x - max of one token of the row."""
    return x_at(logits, alpha, b, t, token, row_max) - finite_max(row_max)


@triton.jit
def row_mass(sums, shifted, e):
    """2^44 times the row's mass from its tiles' (relative to their maxima), int64.

    ``shifted`` is the tiles' maxima less the row's. Within 4.2e-6 of the exact mass, relatively
    (docs/gpu.md), and the same in any order: integers are added.
    """
    weight = exponential(shifted, e).to(tl.float64)
    return tl.sum((sums.to(tl.float64) * weight * MASS_ONE).to(tl.int64), 0)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes 2 us on the host."""
    return -(-a // b)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 2 where the interpreter stands in for one."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits_of(rows: int, vocab_size: int, device: torch.device) -> int:
    """Programs that a row is spread over: two waves over the device, no more than blocks.

    At least 20: few rows of a large batch may be left to be spread. Results do not depend on it:
    programs exchange integer sums and maxima.
    """
    waves = max(20, cdiv(2 * processors(device), rows))
    return max(1, min(waves, cdiv(vocab_size, _BLOCK)))
