"""Penalties and biases of some tokens of a row: where an entry of a token is, and what it does.

    x' = repetition(x + bias) - frequency * count - presence

A row's entries come in any order. One launch makes a table of them: of each 32 tokens a word that
says which have an entry, and how many entries there are before; and the entries by their tokens'
order. A token then finds its own in two loads, most of them of a word that says there is none:
V / 4 bytes a row beside the 6 V of its logits in bf16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from proxytune_kernels.kernels.common import (
    OPTIONS,
    EditLines,
    Logits,
    cdiv,
    lines_of,
    ones_below,
    packed,
)
from proxytune_kernels.kernels.launches import launch
from proxytune_kernels.params import Edits

_BLOCK = tl.constexpr(1024)
_WARPS = 4


@triton.jit(do_not_specialize=["vocab_size", "num_edits", "words"])
def _table_kernel(entries, table, vocab_size, num_edits, words):
    """Grid [rows]: words, entries before each, and the entries by token id."""
    row, step = tl.program_id(0).to(tl.int64), tl.arange(0, _BLOCK)
    entries += row * num_edits * 4
    table += row * (2 * words + num_edits)
    for start in range(0, words, _BLOCK):
        tl.store(table + start + step, tl.zeros_like(step), mask=start + step < words)
    tl.debug_barrier()
    for start in range(0, num_edits, _BLOCK):
        place = start + step
        ids = tl.load(entries + place * 4, mask=place < num_edits, other=-1)
        there = (ids >= 0) & (ids < vocab_size)
        tl.atomic_or(table + (ids >> 5), 1 << (ids & 31), mask=there, sem="relaxed")
    tl.debug_barrier()
    before = tl.zeros([], tl.int32)
    for start in range(0, words, _BLOCK):
        place = start + step
        # Past the first-level cache, which does not see what atomics wrote.
        word = tl.load(table + place, mask=place < words, other=0, cache_modifier=".cg")
        count = ones_below(word, tl.full([_BLOCK], 32, tl.int32))
        tl.store(table + words + place, before + tl.cumsum(count, 0) - count, mask=place < words)
        before += tl.sum(count, 0)
    tl.debug_barrier()
    for start in range(0, num_edits, _BLOCK):
        place = start + step
        ids = tl.load(entries + place * 4, mask=place < num_edits, other=-1)
        there = (ids >= 0) & (ids < vocab_size)
        at = table + (ids >> 5)
        word = tl.load(at, mask=there, other=0, cache_modifier=".cg")
        rank = tl.load(at + words, mask=there, other=0, cache_modifier=".cg")
        rank += ones_below(word, ids & 31)
        tl.store(table + 2 * words + rank, place, mask=there)


def edited(logits: Logits, edits: Edits | None, vocab_size: int) -> Logits:
    """The logits with entries [B, M, 4] or [B, T, M, 4] of their rows, for which this launches."""
    if edits is None or edits.entries.shape[-2] == 0 or edits.entries.numel() == 0:
        return logits
    entries, penalties = packed(edits.entries), packed(edits.penalties)
    *rows, num_edits, _ = entries.shape
    words = cdiv(vocab_size, 32)
    shape = (*rows, 2 * words + num_edits)
    table = torch.empty(shape, dtype=torch.int32, device=entries.device)
    count = table.shape[:-1].numel()
    launch(
        _table_kernel, (), entries.device, (count,),
        entries, table, vocab_size, num_edits, words, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
    flat, listed = lines_of(entries.flatten(-2), wide=False), lines_of(table, wide=False)
    assert flat is not None and listed is not None
    return logits._replace(edits=EditLines(flat, listed, penalties, 4 * words + 3))
