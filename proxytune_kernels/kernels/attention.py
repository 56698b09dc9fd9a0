"""Attention of 1 to a few new tokens a row over the keys of a static cache (flash-decoding).

    s[i, j] = scale * query[i] . key[j]                 [soft_cap * tanh(s / soft_cap)]
    out[i]  = sum over the j that i sees of softmax(s[i])[j] * value[j]

A row has ``seq_lens`` keys, its q new tokens' included: query i is at position seq_lens - q + i,
and sees the keys up to there, or the last ``window`` of these. Per key and key-value head
2 D elements in (512 bytes in bf16, D = 128), nothing past a row's length or before its window; per
query and head D elements in and out.

A row's keys are parted among programs: 256 each (512 where a program has more than 16 queries), or
as many times that as leave ``_MOST_SPLITS`` parts. The row's own length decides, so its bits do not
depend on its batch. A part reads its queries again, and leaves D + 2 fp32 numbers for each; both
stay in L2: for 16 queries 1/32 and 1/16 of a part's keys and values in bf16. The last of a row's
programs to arrive joins the parts in their order. Programs past a row's end leave at once.

Why tl.dot. An H200 moves 4.8 TB/s: 36 GB/s a multiprocessor, 20 bytes a cycle at 1.8 GHz, so a key
of 512 bytes may take 25 cycles, 100 issue slots of its four schedulers. In fp32 arithmetic R
queries (those of all heads that share the key) take 2 D R / 128 = 2 R cycles, and 256 conversions 2
to 4 more: too much from R = 8. On tensor cores 16 queries take 2 D 16 / 1024 = 4 cycles, whether
they are there or not. The PTX executes 28 warp instructions a key for 1 to 16 queries, 36 for 32
and 80 for 48 (docs/gpu.md): one way serves all. No tensor core multiplies fp32 exactly; there
tl.dot is that arithmetic, 53 instructions a key for one query and 192 for 16, of 200 slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels.common import INF, LOG2E, OPTIONS
from proxytune_kernels.kernels.sample_hidden import tanh

_MOST_SPLITS = tl.constexpr(64)
_FP32_CHUNK = 32
_JOINED = tl.constexpr(16)  # queries that are joined at once
_AT_ONCE = tl.constexpr(4)  # parts whose loads are under way together


class Cache(NamedTuple):
    """Keys or values [B, kv_heads, L, D]; the last dimension is contiguous."""

    start: Any
    row: int  # strides, in elements
    head: int
    token: int


class Parts(NamedTuple):
    """What programs leave for the last of them, by row, key-value head, part and query."""

    maximum: Any  # fp32 [B, kv_heads, parts, R], of scores times log2(e)
    total: Any  # fp32, likewise: sum of exp2(score - maximum)
    weighted: Any  # fp32 [B, kv_heads, parts, R, D]: the values' sum with these weights
    arrivals: Any  # int32: 0 before a launch and after it


@triton.jit
def _write(out, at, weighted, total, present, D: tl.constexpr, SIZE: tl.constexpr):
    """Divides by the weights' sum; a query that sees no key gets zeros."""
    d = tl.arange(0, D)
    result = weighted / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(
        out + at[:, None] + d[None, :], result.to(out.dtype.element_ty),
        mask=present[:, None] & (d < SIZE)[None, :],
    )  # fmt: skip


@triton.jit
def _joined(parts, first, stride, number, present, D: tl.constexpr, SIZE: tl.constexpr):
    """Sums of ``number`` parts of some queries, in order; ``first`` is where the first's are."""
    d, split = tl.arange(0, D), tl.arange(0, _MOST_SPLITS)
    tops = tl.load(
        parts.maximum + (first[None, :] + split[:, None] * stride),
        mask=(split < number)[:, None] & present[None, :], other=-INF,
    )  # fmt: skip
    top = tl.max(tops, 0)
    top = tl.where(top == -INF, 0.0, top)
    total = tl.zeros(top.shape, tl.float32)
    weighted = tl.zeros([top.shape[0], D], tl.float32)
    for start in range(0, number, _AT_ONCE):
        for j in tl.static_range(_AT_ONCE):
            given = present & (start + j < number)
            at = first + (start + j) * stride
            weight = tl.exp2(tl.load(parts.maximum + at, mask=given, other=-INF) - top)
            total += weight * tl.load(parts.total + at, mask=given, other=0.0)
            part = tl.load(
                parts.weighted + at[:, None] * SIZE + d[None, :],
                mask=given[:, None] & (d < SIZE)[None, :], other=0.0,
            )  # fmt: skip
            weighted += weight[:, None] * part
    return weighted, total


@triton.jit(do_not_specialize=["queries", "capacity", "tiles"])
def _decode_attention_kernel(
    query, query_row, query_head, query_token, keys, values, seq_lens, out, parts, scale, window,
    soft_cap, queries, capacity, tiles, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid [parts, kv_heads * tiles, B]; D and VALUE_D are the sizes as powers of two.

    A score is summed up by CHUNK numbers of D at a time.
    """
    split = tl.program_id(0)
    head, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    b = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + b).to(tl.int32)
    end = tl.minimum(length, capacity)
    first = 0
    if window is not None:
        first = tl.maximum(length - queries + 1 - window, 0)
    size = tl.cdiv(tl.cdiv(end - first, _MOST_SPLITS), SPLIT) * SPLIT
    size = tl.maximum(size, SPLIT)
    number = tl.maximum(tl.cdiv(end - first, size), 1)
    if split >= number:
        return
    begin = first + split * size
    end = tl.minimum(begin + size, end)

    # Row r of the tile is query r % queries of head r // queries of those that share the key.
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    present = r < GROUPS * queries
    i, q_head = r % queries, head * GROUPS + r // queries
    position = length - queries + i
    d, value_d = tl.arange(0, CHUNK), tl.arange(0, VALUE_D)
    query_at = query + (b * query_row + q_head * query_head + i * query_token)[:, None]
    q = tl.load(query_at + d[None, :], mask=present[:, None] & (d < SIZE)[None, :], other=0.0)
    key_at = keys.start + b * keys.row + head.to(tl.int64) * keys.head
    value_at = values.start + b * values.row + head.to(tl.int64) * values.head
    maximum = tl.full([BLOCK_M], -INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, VALUE_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        ids = start + tl.arange(0, BLOCK_N)
        inside, token = ids < end, ids.to(tl.int64)
        score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for chunk in tl.static_range(0, D, CHUNK):
            e = chunk + d
            if CHUNK < D:
                given = present[:, None] & (e < SIZE)[None, :]
                q = tl.load(query_at + e[None, :], mask=given, other=0.0)
            key = tl.load(
                key_at + token[None, :] * keys.token + e[:, None],
                mask=inside[None, :] & (e < SIZE)[:, None], other=0.0,
            )  # fmt: skip
            score = tl.dot(q, key, score, input_precision="ieee")
        score = score * scale
        if soft_cap is not None:
            score = soft_cap * tanh(score / soft_cap)
        seen = ids[None, :] <= position[:, None]
        if window is not None:
            seen = seen & (ids[None, :] > position[:, None] - window)
        score = tl.where(seen, score * LOG2E, -INF)
        top = tl.maximum(maximum, tl.max(score, 1))
        # A query that sees none of these keys has no maximum: -inf - -inf would be NaN.
        against = tl.where(top == -INF, 0.0, top)
        weight = tl.exp2(score - against[:, None])
        shrunk = tl.exp2(maximum - against)
        total = total * shrunk + tl.sum(weight, 1)
        value = tl.load(
            value_at + token[:, None] * values.token + value_d[None, :],
            mask=inside[:, None] & (value_d < VALUE_SIZE)[None, :], other=0.0,
        )  # fmt: skip
        weighted = tl.dot(
            weight.to(value.dtype), value, weighted * shrunk[:, None], input_precision="ieee"
        )
        maximum = top

    # out is [B, q, heads, D]
    heads = tl.num_programs(1) // tiles * GROUPS
    out_at = ((b * queries + i) * heads + q_head) * VALUE_SIZE
    if parts.arrivals is None or number == 1:
        _write(out, out_at, weighted, total, present, VALUE_D, VALUE_SIZE)
    if parts.arrivals is not None:
        if number > 1:
            line = GROUPS * queries  # of one part
            row = b * (tl.num_programs(1) // tiles) + head
            first_part = row * tl.num_programs(0) * line
            part = first_part + split * line + r
            tl.store(parts.maximum + part, maximum, mask=present)
            tl.store(parts.total + part, total, mask=present)
            tl.store(
                parts.weighted + part[:, None] * VALUE_SIZE + value_d[None, :], weighted,
                mask=present[:, None] & (value_d < VALUE_SIZE)[None, :],
            )  # fmt: skip
            tl.debug_barrier()  # all of this program's part before its arrival
            arrivals = parts.arrivals + row * tiles + tile
            if tl.atomic_add(arrivals, 1) == number - 1:
                for start in range(0, BLOCK_M, _JOINED):
                    some = tile * BLOCK_M + start + tl.arange(0, _JOINED)
                    place = b * queries + some % queries
                    place = (place * heads + head * GROUPS + some // queries) * VALUE_SIZE
                    sums = _joined(
                        parts, first_part + some, line, number, some < line, VALUE_D, VALUE_SIZE
                    )
                    _write(out, place, sums[0], sums[1], some < line, VALUE_D, VALUE_SIZE)
                tl.store(arrivals, 0)


def _cache(tensor: Tensor) -> Cache:
    return Cache(tensor, *tensor.stride()[:3])


def launch_decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor, out: Tensor,
    scale: float, window: int | None, soft_cap: float | None, arrivals: Tensor | None,
) -> None:  # fmt: skip
    """Writes attention of the last q tokens of each row over its keys.

    Args:
        query: [B, heads, q, D], D at most 256.
        keys, values: [B, kv_heads, L, D] and [B, kv_heads, L, VALUE_D], of query's dtype.
        seq_lens: int32 [B], each row's keys.
        out: [B, q, heads, VALUE_D], contiguous.
        scale, window, soft_cap: of the scores; see above.
        arrivals: int32 zeros, at least B * heads * ceil(q / 16), and zeros again afterwards; None
            makes them, with a launch more.
    """
    rows, heads, queries, size = query.shape
    kv_heads, capacity, value_size = values.shape[1:]
    if out.numel() == 0:
        return
    groups = heads // kv_heads
    wide = query.dtype == torch.float32
    # A tensor core takes 16 queries, there or not; fp32 has registers for 16.
    block = max(1 if wide else 16, triton.next_power_of_2(groups * queries))
    block = min(block, 16 if wide else 64)
    tiles = triton.cdiv(groups * queries, block)
    reach = capacity if window is None else min(capacity, window + queries - 1)
    split = 512 if block > 16 else 256
    splits = max(1, min(triton.cdiv(reach, split), _MOST_SPLITS.value))
    parts = Parts(None, None, None, None)
    if splits > 1:
        if arrivals is None:
            arrivals = seq_lens.new_zeros(rows * kv_heads * tiles)
        shape = (rows * kv_heads * splits * groups * queries,)
        maximum, total = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
        weighted = query.new_empty((*shape, value_size), dtype=torch.float32)
        parts = Parts(maximum, total, weighted, arrivals)
    widths = [max(16, triton.next_power_of_2(n)) for n in (size, value_size)]
    # 16 KiB of keys, and as much of values, at a time.
    keys_at_once = min(max(16384 // (max(widths) * query.itemsize), 16), 64)
    _decode_attention_kernel[(splits, kv_heads * tiles, rows)](
        query, *query.stride()[:3], _cache(keys), _cache(values), seq_lens, out, parts, scale,
        window, soft_cap, queries, capacity, tiles, GROUPS=groups, SIZE=size,
        VALUE_SIZE=value_size, D=widths[0], VALUE_D=widths[1], BLOCK_M=block,
        BLOCK_N=keys_at_once, CHUNK=min(_FP32_CHUNK, widths[0]) if wide else widths[0], SPLIT=split,
        num_warps=8 if block > 32 else 4, num_stages=2, **OPTIONS,
    )  # fmt: skip
