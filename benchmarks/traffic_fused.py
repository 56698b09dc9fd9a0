"""What fused kernels move: ours, FlashInfer's, torch.compile's, and what nothing goes below.

Ours are read from proxytune_kernels/kernels, FlashInfer's from the sources of flashinfer-python
0.7.2.post1 (sampling.py, sampling.cuh, topk.cuh). torch.compile's are assumed: each fused stage
reads its inputs once and writes its results once. ``--count`` counts what data decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil

from benchmarks.op_cases import FILTERS
from benchmarks.traffic import Algorithm, Case, Kernel, Op
from benchmarks.traffic_torch import (
    FP32,
    combine_ops,
    eager,
    one_kernel,
    small,
    softmax,
    sort,
    topk,
    torch_combine,
    torch_score,
    transformers,
)

TILE, BLOCK = 128, 1024
"""Tokens of ours that share a summary, and that one program of the scan reads."""

SUMMARY_BYTES = {"none": 18, "top_p": 14, "top_k+top_p": 10}
"""A tile's summary in ``sample``: maximum, mass at temperature 1, count (10 bytes); without top_k
mass at T too; without filters also the bound of the tile's race."""

SCORE_SUMMARY_BYTES = 8  # maximum, mass at temperature 1

TILES_AGAIN = {"none": 1, "top_p": 4, "top_k+top_p": 50}
"""Tiles of a row that ours reads again, of 1,002 at V = 128,256: the race's favourite; the fewest
that can hold the kept set, mean of what ``--count`` counts on peaked rows; one per token of k."""

SAMPLED = 1024  # tokens by which a flat row's cutoff is guessed
SECTOR = 32  # bytes that memory hands out at once

DRAW_PASSES = (1.03, 1.7, 4.3)
"""Reads of a row in one top_p draw of FlashInfer's: fewest possible, mean and most of what
``--count`` counts. A round is a search that stops at the token drawn and a read of all to check it;
a token outside the kept set costs another round, at most one in ten at p = 0.9."""

RADIX_BLOCKS = 3  # of FlashInfer's radix select a row: 57,000 values each in Hopper's shared memory


def inputs_once(case: Case) -> Algorithm:
    """What no algorithm goes below: the logits once, one launch."""
    size = 3 * case.dtype_bytes
    op = one_kernel("read", size, 0, "base, expert and anti, once each")
    return Algorithm("inputs once", (op,), size, "The inputs")


def _scan(case: Case, summary_bytes: int) -> Kernel:
    blocks = ceil(case.vocab_size / BLOCK)
    why = "the logits once; a summary a tile"
    return Kernel("scan", 3 * case.dtype_bytes, summary_bytes / TILE, why, blocks=blocks)


def ours(case: Case) -> Algorithm:
    """``ptk.sample``: scan, select, narrow, finish. A row's state, under 1 KB, is left out."""
    size = 3 * case.dtype_bytes
    if case.kind == "flat" and case.filters == "top_p":
        again = 3 * SECTOR * SAMPLED / case.vocab_size
        why, later, rest = "summaries; a sample of the row", "reads the row once more", size
    else:
        again = size * TILE * TILES_AGAIN[case.filters] / case.vocab_size
        why, later, rest = "summaries; the tiles that can matter", "nothing left: exits at once", 0
    summary = SUMMARY_BYTES[case.filters]
    kernels = (
        _scan(case, summary),
        Kernel("select", summary / TILE + again, 0, why, blocks=1, trips=2),
        Kernel("narrow", rest, 0, later),
        Kernel("finish", rest, 0, later),
    )
    return Algorithm("ours", (Op("sample", size, 0, kernels),), size, "Our kernels")


def ours_combine(case: Case) -> Algorithm:
    """``ptk.combine``."""
    size = 3 * case.dtype_bytes
    op = one_kernel("combine", size, FP32, "three logits in, x out")
    return Algorithm("ours", (op,), size + FP32, "Our kernels")


def ours_score(case: Case) -> Algorithm:
    """``ptk.score``."""
    size, summary = 3 * case.dtype_bytes, SCORE_SUMMARY_BYTES
    finish = Kernel("finish", summary / TILE, 0, "summaries; the token scored", blocks=1, trips=2)
    op = Op("score", size, 0, (_scan(case, summary), finish))
    return Algorithm("ours", (op,), size, "Our kernels")


def _reduction(case: Case, read: float, why: str) -> Op:
    """A reduction of rows as Inductor writes it: split where rows are fewer than about the SMs."""
    if case.rows < 128:
        joined = Kernel("fused", 0, 0, "parts of a row joined")
        return Op("fused", read, 0, (Kernel("fused", read, 0, why), joined))
    return Op("fused", read, 0, (Kernel("fused", read, 0, why, blocks=1),))


def compiled(case: Case) -> Algorithm:
    """``torch.compile`` of the eager chain."""
    filters, size = FILTERS[case.filters], 3 * case.dtype_bytes
    combined = one_kernel("fused", size, FP32, "combination, temperature")
    if filters.top_k:
        ops = [
            combined,
            topk(filters.top_k, case.vocab_size),
            small("fused", "softmax, prefix and race of the k"),
            small("fused", "gather"),
        ]
    elif filters.top_p < 1:
        ops = [
            combined,
            sort(case.rows),
            _reduction(case, FP32, "maximum and sum of the sorted values"),
            one_kernel("fused", FP32, FP32, "softmax and its running sum"),
            _reduction(case, 2 * FP32, "softmax and running sum: kept, noise, argmax"),
            small("fused", "gather"),
        ]
    else:
        ops = [
            _reduction(case, size, "combination: maximum and sum"),
            _reduction(case, size, "combination: softmax, noise, argmax"),
        ]
    basis = "Assumed: what is pointwise fused, a reduction one read; sort and topk as they are"
    return Algorithm("torch.compile", tuple(ops), size, basis)


def compiled_combine(case: Case) -> Algorithm:
    """``torch.compile`` of the combination."""
    size = 3 * case.dtype_bytes
    op = one_kernel("fused", size, FP32, "all of it")
    return Algorithm("torch.compile", (op,), size + FP32, "Assumed: one kernel")


def compiled_score(case: Case) -> Algorithm:
    """``torch.compile`` of combination, log-softmax and gather."""
    size = 3 * case.dtype_bytes
    ops = (_reduction(case, size, "combination: maximum and sum"), small("fused", "gather"))
    basis = "Assumed: one read, [B, T, V] never written"
    return Algorithm("torch.compile", ops, size, basis)


def _draw(passes: float) -> Op:
    """``top_p_sampling_from_probs``: dual-pivot rejection, all rounds in one kernel."""
    name, rounds = "TopPSamplingFromProb", "rounds of a search and a check, each reads the row"
    again = FP32 * (passes - 1)
    kernel = Kernel(name, FP32, 0, rounds, reread=again, blocks=1, trips=2)
    return Op("top_p_sampling_from_probs", FP32, 0, (kernel,))


def _flashinfer_softmax(rows: int) -> Op:
    """``flashinfer.sampling.softmax``, temperature included."""
    if rows <= 128:
        kernels: tuple[Kernel, ...] = (
            Kernel("OnlineSoftmaxMap", FP32, 0, "maximum and sum of slices of 8,192"),
            Kernel("OnlineSoftmaxReduce", FP32, FP32, "again to write", blocks=1),
        )
    else:
        why = "maximum and sum; again to write"
        fused = Kernel("OnlineSoftmaxFused", FP32, FP32, why, reread=FP32, blocks=1, trips=2)
        kernels = (fused,)
    return Op("softmax", FP32, FP32, kernels)


def _top_k_first(case: Case) -> list[Op]:
    """FlashInfer's way for one k for all rows, 256 at most: top-k, then all else among the k."""
    if case.rows < min(64, max(16, case.vocab_size // 4096)):
        why = "the row staged in shared memory; four rounds of digits"
        ops = [Kernel("RadixTopK", FP32, 0, why, blocks=RADIX_BLOCKS, trips=5)]
    else:
        why = "coarse digits; again to filter"
        ops = [
            Kernel("FilteredTopK", FP32, 0, why, reread=FP32, blocks=1, trips=2),
            Kernel("FinalizeTopKIndices", 0, 0, "the k in a fixed order"),
        ]
    ops.append(Kernel("StableSortTopKByValue", 0, 0, "the k by value"))
    tail = [
        ("long", "int64 indices"),
        ("softmax", "of the k"),
        ("top_p_sampling_from_probs", "among the k"),
        ("long", "the column drawn"),
        ("gather", "its token id"),
        ("to", "int32"),
    ]
    return [Op("top_k", FP32, 0, tuple(ops)), *(small(name, why) for name, why in tail)]


def _flashinfer(name: str, case: Case, ops: Sequence[Op], draws: bool) -> Algorithm:
    """``ops``, and a draw from probabilities where ``draws``."""
    basis = "FlashInfer's sources; reads of a draw counted"
    size = 3 * case.dtype_bytes
    least, mean, most = ((*ops, _draw(passes)) if draws else tuple(ops) for passes in DRAW_PASSES)
    ends = [Algorithm(name, some, size, basis).bytes_moved for some in (least, most)]
    return Algorithm(name, mean, size, basis, (ends[0], ends[1]) if draws else None)


def flashinfer(case: Case) -> Algorithm:
    """``gpu.flashinfer_peer``: combination in one kernel; filters the same for all rows."""
    filters = FILTERS[case.filters]
    combined = one_kernel("fused", 3 * case.dtype_bytes, FP32, "combination, temperature")
    if filters.top_k:
        return _flashinfer("flashinfer", case, [combined, *_top_k_first(case)], draws=False)
    if filters.top_p < 1:
        ops = [combined, _flashinfer_softmax(case.rows)]
        return _flashinfer("flashinfer", case, ops, draws=True)
    gumbel = Kernel("SamplingFromLogits", FP32, 0, "argmax of x / T + noise", blocks=1)
    ops = [combined, Op("sampling_from_logits", FP32, 0, (gumbel,))]
    return _flashinfer("flashinfer", case, ops, draws=False)


def eager_flashinfer(case: Case) -> Algorithm:
    """Combination operation by operation; filters that differ by row, as in an engine."""
    filters, name = FILTERS[case.filters], "eager + flashinfer"
    ops = combine_ops(case.dtype_bytes)
    divide = one_kernel("div_", FP32, FP32, "temperature")
    if filters.top_k:
        why = "the row staged in shared memory; again to write"
        mask = Kernel(
            "RadixTopKMaskLogits", FP32, FP32, why, reread=FP32, blocks=RADIX_BLOCKS, trips=6
        )
        masked = Op("top_k_mask_logits", FP32, FP32, (mask,))
        return _flashinfer(name, case, [*ops, divide, masked, softmax("of the k")], draws=True)
    if filters.top_p < 1:
        return _flashinfer(name, case, [*ops, _flashinfer_softmax(case.rows)], draws=True)
    gumbel = Kernel("SamplingFromLogits", FP32, 0, "argmax of x / T + noise", blocks=1)
    draw = Op("sampling_from_logits", FP32, 0, (gumbel,))
    return _flashinfer(name, case, [*ops, divide, draw], draws=False)


ALGORITHMS: Mapping[str, tuple[Callable[[Case], Algorithm], ...]] = {
    "sample": (inputs_once, ours, flashinfer, eager_flashinfer, compiled, eager, transformers),
    "combine": (ours_combine, compiled_combine, torch_combine),
    "score": (inputs_once, ours_score, compiled_score, torch_score),
}
"""Algorithms of each operator, in the order of tables."""
