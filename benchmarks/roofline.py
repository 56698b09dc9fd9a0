"""What the operators and their peers have to move on a GPU, and the least time it takes: a model.

``python -m benchmarks.roofline --help``; docs/roofline.md derives it. Nothing is measured. Each
algorithm below is a list of kernels with the bytes that they move per vocabulary entry of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Annotated, NamedTuple

import typer

from benchmarks.harness.options import parse_choices, parse_integers
from benchmarks.harness.report import fixed, print_table, significant

SM_BYTES_PER_CLOCK = 64  # that one SM takes from L2 at most; an assumption


@dataclass(frozen=True)
class Gpu:
    """What the model needs of a GPU, as published: memory in TB/s, L2 in MiB, clock in GHz."""

    name: str
    compute_capability: str
    sms: int
    bandwidth: float
    l2_mib: float
    clock: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", "9.0", 132, 3.35, 50, 1.98),  # SXM5, 80 GB HBM3
        Gpu("h200", "9.0", 132, 4.8, 50, 1.98),  # SXM, 141 GB HBM3e
        Gpu("a100-80", "8.0", 108, 2.039, 40, 1.41),  # SXM4, 80 GB HBM2e
        Gpu("b200", "10.0", 148, 8.0, 126, 1.98),  # SXM, "up to 8 TB/s" HBM3e
        Gpu("l40s", "8.9", 142, 0.864, 96, 2.52),  # 48 GB GDDR6
        Gpu("rtx-4090", "8.9", 128, 1.008, 72, 2.52),  # 24 GB GDDR6X
        Gpu("rtx-5090", "12.0", 170, 1.792, 96, 2.41),  # 32 GB GDDR7
    )
}


ROW = 6  # bytes per entry of a row: three roles in bf16


class Case(NamedTuple):
    """``rows`` rows of ``vocab_size`` logits of each role."""

    rows: int = 1
    vocab_size: int = 128_256
    filters: str = "top_p"
    kind: str = "peaked"


class Kernel(NamedTuple):
    """One kernel, or ``launches`` alike (memory sets too: each is a node of a CUDA graph)."""

    name: str
    moved: float
    """Bytes per entry and launch, read and written, each counted once."""
    launches: int = 1
    again: float = 0.0
    """Bytes per entry and launch that it reads again itself; a cache may hold them."""
    blocks: int | None = None
    """That work on a row; few leave most SMs idle. None: enough for all SMs."""
    trips: float = 1.0
    """Loads per launch, one after the other, that wait for what was loaded before."""


Kernels = list[Kernel]

# Ours: tokens of a tile, which share a summary, and of a program of the scan; bytes of a summary;
# and tiles read again of a row (1,002 at V = 128,256): the favourite of the noise, the fewest that
# can hold the kept set (mean of peaked rows), one per token of k.
TILE, BLOCK = 128, 1024
SUMMARY_BYTES = {"none": 18, "top_p": 14, "top_k+top_p": 10}
TILES_AGAIN = {"none": 1, "top_p": 4, "top_k+top_p": 50}
TOP_K = 50
SAMPLED, SECTOR = 1024, 32  # a flat row's cutoff is guessed by so many tokens, of a sector each

DRAW = "TopPSamplingFromProb"
DRAW_PASSES = (1.03, 1.7, 4.3)
"""Reads of a row in one top_p draw of FlashInfer's: least possible, mean and most of 64 draws."""


def inputs_once(case: Case) -> Kernels:
    """What no algorithm goes below: the logits once, one launch."""
    return [Kernel("read", ROW)]


def ours(case: Case) -> Kernels:
    """``ptk.sample``. The last two exit at once where few tiles can matter."""
    row, summary = ROW, SUMMARY_BYTES[case.filters]
    again, rest = row * TILE * TILES_AGAIN[case.filters] / case.vocab_size, 0
    if case.kind == "flat" and case.filters == "top_p":
        again, rest = 3 * SECTOR * SAMPLED / case.vocab_size, row
    return [
        Kernel("scan", row + summary / TILE, blocks=ceil(case.vocab_size / BLOCK)),
        Kernel("select", summary / TILE + again, blocks=1, trips=2),
        Kernel("pivots", rest),
        Kernel("draw", rest),
    ]


# torch's operations, from ATen's CUDA sources (about torch 2.13) and CUB's (CUDA 13.0), for rows of
# at least LEAST_VOCAB_SIZE entries: from there on topk takes many blocks a row, sort is a radix
# sort and softmax reads three times. fp32 is 4 bytes, an index 8, a mask 1.
LEAST_VOCAB_SIZE, MOST_VOCAB_SIZE = 20_000, 2**19
SOFTMAX = Kernel("softmax", 8, again=8, blocks=1, trips=3)
MASKED_FILL = [Kernel("clone", 8), Kernel("masked_fill", 9)]
SCATTER = [Kernel("clone", 2), Kernel("scatter", 10)]
MULTINOMIAL = [
    Kernel("aminmax", 4), Kernel("verdict", 0, 4), Kernel("sum", 4), Kernel("verdict", 0, 4),
    Kernel("exponential", 4), Kernel("div", 12), Kernel("argmax", 4),
]  # fmt: skip


def _cumsum(rows: int) -> Kernels:
    one_row = [Kernel("scan init", 0), Kernel("cumsum", 8)]
    return one_row if rows == 1 else [Kernel("cumsum", 8, blocks=1)]


def _radix_sort(passes: int, key: int, value: int) -> Kernels:
    sweep = Kernel("sweep of a digit", 2 * (key + value), passes)
    return [Kernel("memset", 0, 2 + passes), Kernel("digits", key), Kernel("bins", 0), sweep]


def _sort(rows: int) -> Kernels:
    """Values with indices: one row; all rows by value, then by row; or a block for each row."""
    fill = Kernel("indices", 8)
    if rows == 1:
        return [fill, *_radix_sort(4, 4, 8)]
    if rows < 128:
        return [fill, *_radix_sort(4, 4, 8), *_radix_sort(1, 8, 0), Kernel("gather", 24)]
    return [fill, Kernel("segmented sort", 24, 6, again=4, blocks=1, trips=2)]


def _topk(case: Case) -> Kernels:
    out = 12 * TOP_K / case.vocab_size
    select = [Kernel("memset", 0, 3), Kernel("digits", 4, 4), Kernel("sums, scans", 0, 13)]
    return [*select, Kernel("gather", 4 + out), Kernel("sort the k", 2 * out)]


def transformers(case: Case) -> Kernels:
    """Combination, transformers' warpers, softmax, multinomial."""
    kernels = [Kernel("to fp32", ROW)] * 3
    kernels += [Kernel("sub", 12), Kernel("mul", 8), Kernel("add", 12), Kernel("div", 8)]
    if "top_k" in case.filters:
        kernels += [*_topk(case), Kernel("lt", 5), *MASKED_FILL]
    if "top_p" in case.filters:
        kernels += [*_sort(case.rows), SOFTMAX, *_cumsum(case.rows), Kernel("le", 5)]
        kernels += [Kernel("fill", 0), *SCATTER, *MASKED_FILL]
    return [*kernels, SOFTMAX, *MULTINOMIAL]


COMBINATION = [Kernel("to fp32", 6), Kernel("sub", 10), Kernel("add", 10)]
"""torch widens mixed operands as it reads them."""


def eager(case: Case) -> Kernels:
    """The fewest torch operations: a topk or a sort, softmax, Gumbel-max by exponential noise."""
    top_k, top_p = "top_k" in case.filters, "top_p" in case.filters
    share = TOP_K / case.vocab_size if top_k else 1.0
    kernels = [*COMBINATION, Kernel("div", 8)]
    if top_k:
        kernels += [*_topk(case), Kernel("softmax of the k", 8 * share)]
    else:
        kernels += [*(_sort(case.rows) if top_p else []), SOFTMAX]
    if top_p:
        kernels += [Kernel("cumsum of the k", 8 * share)] if top_k else _cumsum(case.rows)
        kernels += [Kernel("sub", 12 * share), Kernel("lt", 5 * share)]
        kernels += [Kernel("scalar", 0), Kernel("where", 9 * share)]
    kernels += [Kernel("exponential", 4 * share), Kernel("div", 12 * share)]
    kernels += [Kernel("argmax", 4 * share)]
    return [*kernels, *([Kernel("gather", 0)] if top_p else [])]


def _reduction(case: Case, read: float) -> Kernels:
    """As Inductor writes it: split where rows are fewer than about the SMs."""
    if case.rows < 128:
        return [Kernel("fused", read), Kernel("parts joined", 0)]
    return [Kernel("fused", read, blocks=1)]


def compiled(case: Case) -> Kernels:
    """``torch.compile`` of the eager chain, assumed: each fused stage reads once, writes once."""
    size = ROW
    if "top_k" in case.filters:
        return [Kernel("fused", size + 4), *_topk(case), Kernel("fused", 0, 2)]
    if case.filters == "none":
        return _reduction(case, size) * 2
    fused = [Kernel("fused", size + 4), *_sort(case.rows), *_reduction(case, 4)]
    return [*fused, Kernel("fused", 8), *_reduction(case, 8), Kernel("gather", 0)]


# FlashInfer, from the sources of flashinfer-python 0.7.2.post1 (sampling.py, sampling.cuh,
# topk.cuh). A draw is rounds of a search and a check, each of which reads the row.
_DRAW = Kernel(DRAW, 4, again=4 * (DRAW_PASSES[1] - 1), blocks=1, trips=2)
_GUMBEL = Kernel("SamplingFromLogits", 4, blocks=1)


def _flashinfer_softmax(rows: int) -> Kernels:
    if rows <= 128:
        return [Kernel("OnlineSoftmaxMap", 4), Kernel("OnlineSoftmaxReduce", 8, blocks=1)]
    return [Kernel("OnlineSoftmaxFused", 8, again=4, blocks=1, trips=2)]


def flashinfer(case: Case) -> Kernels:
    """Combination in one kernel; filters the same for all rows, so that the k come first."""
    combination = Kernel("fused", ROW + 4)
    if case.filters == "none":
        return [combination, _GUMBEL]
    if case.filters == "top_p":
        return [combination, *_flashinfer_softmax(case.rows), _DRAW]
    if case.rows < min(64, max(16, case.vocab_size // 4096)):
        select = [Kernel("RadixTopK", 4, blocks=3, trips=5)]
    else:
        select = [Kernel("FilteredTopK", 4, again=4, blocks=1, trips=2), Kernel("Finalize", 0)]
    return [combination, *select, Kernel("sort the k", 0), Kernel("among the k", 0, 6)]


def eager_flashinfer(case: Case) -> Kernels:
    """Combination operation by operation; filters that differ by row, as in an engine."""
    kernels = list(COMBINATION)
    if case.filters == "top_p":
        return [*kernels, *_flashinfer_softmax(case.rows), _DRAW]
    kernels.append(Kernel("div", 8))
    if case.filters == "none":
        return [*kernels, _GUMBEL]
    return [*kernels, Kernel("RadixTopKMask", 8, again=4, blocks=3, trips=6), SOFTMAX, _DRAW]


ALGORITHMS: dict[str, Callable[[Case], Kernels]] = {
    "inputs once": inputs_once,
    "ours": ours,
    "flashinfer": flashinfer,
    "eager + flashinfer": eager_flashinfer,
    "torch.compile": compiled,
    "eager": eager,
    "transformers": transformers,
}
"""Of ``sample``, in the order of tables."""


class Floor(NamedTuple):
    """Bytes per entry, launches, and microseconds: the roofline is the larger of two times."""

    bytes_per_entry: float
    launches: int
    bytes_us: float
    """Every byte from device memory, at the rate that the kernel's blocks can draw."""
    latency_us: float
    """Launches and trips to memory, one after the other."""
    floor_us: float
    cached_floor_us: float
    """The floor if L2 kept all it could: between two kernels it saves at most twice its size."""


def floor(kernels: Kernels, case: Case, gpu: Gpu, launch_us: float, trip_us: float) -> Floor:
    """The model of docs/roofline.md."""
    entries, memory = case.rows * case.vocab_size, gpu.bandwidth * 1e6  # bytes a microsecond
    bytes_us = drawn_us = 0.0
    for kernel in kernels:
        moved = entries * kernel.launches * (kernel.moved + kernel.again)
        sms = gpu.sms if kernel.blocks is None else min(gpu.sms, case.rows * kernel.blocks)
        drawn = sms * SM_BYTES_PER_CLOCK * gpu.clock * 1e3
        bytes_us += moved / min(memory, drawn)
        drawn_us += moved / drawn
    once = [(k.moved, k.launches) for k in kernels if k.moved]
    saved = 2 * gpu.l2_mib * 2**20 * (sum(launches for _, launches in once) - 1)
    left = entries * sum(moved * launches for moved, launches in once) - saved
    cached_us = max(max(entries * ROW, left) / memory, drawn_us)
    latency_us = sum(k.launches * (launch_us + k.trips * trip_us) for k in kernels)
    return Floor(
        sum(k.launches * (k.moved + k.again) for k in kernels),
        sum(k.launches for k in kernels),
        bytes_us,
        latency_us,
        max(bytes_us, latency_us),
        max(cached_us, latency_us),
    )


def draw_range(kernels: Kernels) -> str:
    """Least and most bytes per entry, where a draw of FlashInfer's decides."""
    if not any(kernel.name == DRAW for kernel in kernels):
        return ""
    mean = sum(k.launches * (k.moved + k.again) for k in kernels)
    least, most = (mean + 4 * (passes - DRAW_PASSES[1]) for passes in DRAW_PASSES[::2])
    return f"{least:.0f}-{most:.0f}"


def main(
    gpu: Annotated[str, typer.Option(help=f"Of {','.join(GPUS)}.")] = "h100",
    batch: Annotated[str, typer.Option(help="Rows: batch sizes.")] = "1,8,64,256",
    vocab: Annotated[
        str, typer.Option(help=f"Vocabulary sizes, from {LEAST_VOCAB_SIZE:,}.")
    ] = "128256",
    filters: Annotated[str, typer.Option(help=f"Of {','.join(SUMMARY_BYTES)}.")] = "top_p",
    kinds: Annotated[str, typer.Option(help="Of peaked,flat.")] = "peaked",
    bandwidth: Annotated[
        float | None,
        typer.Option(min=0.001, help="TB/s of device memory, in place of the data sheet's."),
    ] = None,
    launch_us: Annotated[
        float, typer.Option(min=0, help="From one kernel to the next in a CUDA graph; assumed.")
    ] = 1.0,
    trip_us: Annotated[
        float, typer.Option(min=0, help="Of a load that others wait for; assumed.")
    ] = 0.5,
    terms: Annotated[bool, typer.Option("--terms", help="Also each kernel.")] = False,
) -> None:
    """Bytes, launches and least time of ours and of the peers' algorithms. Nothing is measured.

    Logits are bf16. Options take several values, separated by commas.
    """
    cases = [
        Case(*values)
        for values in product(
            parse_integers("--batch", batch, 1, 2**20),
            parse_integers("--vocab", vocab, LEAST_VOCAB_SIZE, MOST_VOCAB_SIZE),
            parse_choices("--filters", filters, SUMMARY_BYTES, None),
            parse_choices("--kinds", kinds, ("peaked", "flat"), None),
        )
    ]
    for name in parse_choices("--gpu", gpu, GPUS, None):
        source = "data sheet" if bandwidth is None else "--bandwidth"
        one = replace(GPUS[name], bandwidth=bandwidth or GPUS[name].bandwidth)
        rows: list[tuple[str, Sequence[str]]] = []
        for case, (algorithm, make) in product(cases, ALGORITHMS.items()):
            what = f"{case.kind} {case.filters}"
            section = f"{what}\nbf16 V={case.vocab_size:,} B={case.rows}"
            kernels = make(case)
            f = floor(kernels, case, one, launch_us, trip_us)
            count = fixed(f.bytes_per_entry, 1), draw_range(kernels), str(f.launches)
            rows.append((section, (algorithm, *count, *map(significant, f[2:]))))
            for k in kernels if terms else ():
                moved = fixed(k.moved + k.again, 1)
                rows.append((section, (f"  {k.name}", moved, "", str(k.launches))))
        caption = (
            f"A model: nothing here is measured. {one.bandwidth:g} TB/s ({source}), {one.sms} SMs, "
            f"L2 {one.l2_mib:g} MiB. Microseconds. bytes: all of them from device memory. latency: "
            f"{launch_us:g} us a launch, {trip_us:g} us a dependent trip to memory (assumed). "
            "floor: the larger of the two. in L2: the floor if L2 kept all it could. range: of "
            "B/entry, by what is drawn."
        )
        columns = ("", "B/entry", "range", "launches", "bytes", "latency", "floor", "in L2")
        print_table(f"sample on {name}", columns, caption, rows)


if __name__ == "__main__":
    typer.run(main)
