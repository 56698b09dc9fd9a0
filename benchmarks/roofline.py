"""What `sample`, its peers and a decoder's step move on a GPU, and the least time: a model.

``python -m benchmarks.roofline --help``; docs/roofline.md derives it. Nothing is measured. Each
algorithm is a list of kernels with the bytes that they move per vocabulary entry of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import ceil
from typing import Annotated, NamedTuple

import typer

from benchmarks.harness.options import parse_choices, parse_integers
from benchmarks.harness.random_models import (
    LLAMA_7B,
    LLAMA_13B,
    LORA_RANK,
    ModelShape,
    empty_model,
    step_bytes,
)
from benchmarks.harness.report import fixed, print_table, significant

LAUNCH_US = 1.0  # from one kernel to the next in a CUDA graph; assumed, like the next two
TRIP_US = 0.5  # of a load that others wait for
SM_BYTES_PER_CLOCK = 64  # that one SM takes from L2 at most


class Gpu(NamedTuple):
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
        Gpu("rtx-5090", "12.0", 170, 1.792, 96, 2.41),  # 32 GB GDDR7
    )
}


class Case(NamedTuple):
    """``rows`` rows of ``vocab_size`` logits of each role, in bf16."""

    rows: int = 1
    vocab_size: int = 128_256
    filters: str = "top_p"
    kind: str = "peaked"


class Kernel(NamedTuple):
    """One kernel, or ``launches`` alike (memory sets too: each is a node of a CUDA graph).

    ``moved`` is bytes per entry and launch, read and written, each counted once; ``again`` those
    that it reads again itself, which a cache may hold. ``blocks`` work on a row: few leave most SMs
    idle; None is enough for all. ``trips`` are loads that wait for what was loaded before.
    """

    name: str
    moved: float
    launches: int = 1
    again: float = 0.0
    blocks: int | None = None
    trips: float = 1.0


Kernels = list[Kernel]
ROW = 6  # bytes per entry of a row: three roles in bf16
TOP_K = 50

# Ours: tokens of a tile, which share a summary, and of a program of the scan; bytes of a summary;
# and tiles read again of a row (1,002 at V = 128,256): the favourite of the noise, the fewest that
# can hold the kept set (mean of peaked rows), one per token of k.
TILE, BLOCK = 128, 1024
SUMMARY_BYTES = {"none": 18, "top_p": 14, "top_k+top_p": 10}
TILES_AGAIN = {"none": 1, "top_p": 4, "top_k+top_p": 50}
SAMPLED, SECTOR = 1024, 32  # a flat row's pivots are chosen from so many tokens, of a sector each


def ours(case: Case) -> Kernels:
    """``ptk.sample``. The last two exit at once where few tiles can matter."""
    summary = SUMMARY_BYTES[case.filters] / TILE
    again, rest = ROW * TILE * TILES_AGAIN[case.filters] / case.vocab_size, 0
    if case.kind == "flat" and case.filters == "top_p":
        again, rest = 3 * SECTOR * SAMPLED / case.vocab_size, ROW
    return [
        Kernel("scan", ROW + summary, blocks=ceil(case.vocab_size / BLOCK)),
        Kernel("select", summary + again, blocks=1, trips=2),
        Kernel("pivots", rest),
        Kernel("draw", rest),
    ]


# torch's operations, from ATen's CUDA sources (about torch 2.13) and CUB's (CUDA 13.0), for rows of
# at least LEAST_VOCAB_SIZE entries: from there on topk takes many blocks a row, sort is a radix
# sort and softmax reads three times. fp32 is 4 bytes, an index 8, a mask 1.
LEAST_VOCAB_SIZE, MOST_VOCAB_SIZE = 20_000, 2**19


def _sort(rows: int) -> Kernels:
    """Values with indices: one row; all rows by value, then by row; or a block for each row."""
    fill, bins = Kernel("indices", 8), Kernel("bins", 0)
    if rows >= 128:
        return [fill, Kernel("segmented sort", 24, 6, again=4, blocks=1, trips=2)]
    by_value = [Kernel("memset", 0, 6), Kernel("digits", 4), bins, Kernel("sweep", 24, 4)]
    by_row = [Kernel("memset", 0, 3), Kernel("digits", 8), bins, Kernel("sweep", 16)]
    return [fill, *by_value, *([] if rows == 1 else [*by_row, Kernel("gather", 24)])]


def _topk(case: Case) -> Kernels:
    out = 12 * TOP_K / case.vocab_size
    select = [Kernel("memset", 0, 3), Kernel("digits", 4, 4), Kernel("sums, scans", 0, 13)]
    return [*select, Kernel("gather", 4 + out), Kernel("sort the k", 2 * out)]


def eager(case: Case) -> Kernels:
    """The fewest torch operations: a topk or a sort, softmax, Gumbel-max by exponential noise."""
    kernels = [Kernel("to fp32", 6), Kernel("sub", 10), Kernel("add", 10), Kernel("div", 8)]
    share, softmax = 1.0, Kernel("softmax", 8, again=8, blocks=1, trips=3)
    cumsum = [Kernel("cumsum", 8, blocks=1)]
    if case.rows == 1:
        cumsum = [Kernel("scan init", 0), Kernel("cumsum", 8)]
    if case.filters == "top_k+top_p":
        share = TOP_K / case.vocab_size
        softmax, cumsum = Kernel("softmax of the k", 8 * share), [Kernel("cumsum", 8 * share)]
        kernels += _topk(case)
    elif case.filters == "top_p":
        kernels += _sort(case.rows)
    kernels.append(softmax)
    if case.filters != "none":
        kernels += [*cumsum, Kernel("sub", 12 * share), Kernel("lt", 5 * share)]
        kernels += [Kernel("scalar", 0), Kernel("where", 9 * share), Kernel("gather", 0)]
    draw = [Kernel("exponential", 4 * share), Kernel("div", 12 * share)]
    return [*kernels, *draw, Kernel("argmax", 4 * share)]


def flashinfer(case: Case) -> Kernels:
    """The sources of flashinfer-python 0.7.2.post1, behind the combination in one kernel.

    Filters are the same for all rows, so that the k come first. A draw is rounds of a search and a
    check, which read the row 1.7 times on average (of 64 draws; the least is 1.03, the most 4.3).
    """
    combination = Kernel("combination", ROW + 4)
    if case.filters == "none":
        return [combination, Kernel("SamplingFromLogits", 4, blocks=1)]
    if case.filters == "top_p":
        softmax = [Kernel("OnlineSoftmaxFused", 8, again=4, blocks=1, trips=2)]
        if case.rows <= 128:
            softmax = [Kernel("OnlineSoftmaxMap", 4), Kernel("OnlineSoftmaxReduce", 8, blocks=1)]
        draw = Kernel("TopPSamplingFromProb", 4, again=4 * 0.7, blocks=1, trips=2)
        return [combination, *softmax, draw]
    select = [Kernel("FilteredTopK", 4, again=4, blocks=1, trips=2), Kernel("Finalize", 0)]
    if case.rows < min(64, max(16, case.vocab_size // 4096)):
        select = [Kernel("RadixTopK", 4, blocks=3, trips=5)]
    return [combination, *select, Kernel("sort the k", 0), Kernel("among the k", 0, 6)]


ALGORITHMS = {
    "inputs once": lambda case: [Kernel("read", ROW)],  # no algorithm goes below
    "ours": ours,
    "flashinfer": flashinfer,
    "eager": eager,
}


class Floor(NamedTuple):
    """Bytes per entry, launches, and microseconds: the floor is the larger of two times."""

    bytes_per_entry: float
    launches: int
    bytes_us: float  # every byte from device memory, as fast as the kernel's blocks can draw
    latency_us: float  # launches and trips to memory, one after the other
    floor_us: float
    cached_floor_us: float  # L2 kept all it could: between two kernels at most twice its size


def floor(kernels: Kernels, case: Case, gpu: Gpu) -> Floor:
    """The model of docs/roofline.md."""
    entries, memory = case.rows * case.vocab_size, gpu.bandwidth * 1e6  # bytes a microsecond
    bytes_us = drawn_us = 0.0
    for kernel in kernels:
        moved = entries * kernel.launches * (kernel.moved + kernel.again)
        sms = gpu.sms if kernel.blocks is None else min(gpu.sms, case.rows * kernel.blocks)
        drawn = sms * SM_BYTES_PER_CLOCK * gpu.clock * 1e3
        bytes_us += moved / min(memory, drawn)
        drawn_us += moved / drawn
    saved = 2 * gpu.l2_mib * 2**20 * (sum(k.launches for k in kernels if k.moved) - 1)
    left = entries * sum(k.moved * k.launches for k in kernels) - saved
    cached_us = max(max(entries * ROW, left) / memory, drawn_us)
    latency_us = sum(k.launches * (LAUNCH_US + k.trips * TRIP_US) for k in kernels)
    per_entry = sum(k.launches * (k.moved + k.again) for k in kernels)
    floors = max(bytes_us, latency_us), max(cached_us, latency_us)
    return Floor(per_entry, sum(k.launches for k in kernels), bytes_us, latency_us, *floors)


# A decoder's step at batch 1. Launches of a layer are counted (tests/decoder/test_launches.py):
# modules called one by one; compiled; compiled, with adapters on all products.
EAGER, COMPILED, ADAPTED = 34, 11, 14
REST = 10  # launches of a member outside its layers, and of the draw; assumed
KEYS = 1024  # tokens whose keys and values are read, of all heads: these models group none


def member(shape: ModelShape, layer: int, adapted: bool = False) -> tuple[float, int]:
    """GB that a forward reads, and its launches; an adapted pair has two rows of keys."""
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    adapter = LORA_RANK * (11 * hidden + 3 * shape.intermediate_size)
    beside = 2 * KEYS * hidden * (1 + adapted) + adapter * adapted
    read = step_bytes([empty_model(shape)]) + 2 * layers * beside
    return read / 1e9, layers * layer + REST


def step_ms(members: Sequence[tuple[float, int]], streams: int, gpu: Gpu) -> float:
    """Milliseconds: between two kernels of a stream nothing is read but by other streams."""
    own = [read / gpu.bandwidth + launches * LAUNCH_US / 1e3 for read, launches in members]
    parts = {1: [own], 2: [own[:1], own[1:]], 3: [own[:1], own[1:2], own[2:]]}[streams]
    read = sum(read for read, _ in members) / gpu.bandwidth
    return max(read, *map(sum, parts)) + REST * LAUNCH_US / 1e3


def print_steps(name: str, gpu: Gpu) -> None:
    """Steps of Llama 13B + 7B + 7B in bf16, on 1, 2 and 3 streams."""
    base = member(LLAMA_13B, COMPILED)
    ways = {
        "base alone": [base],
        "eager": [member(LLAMA_13B, EAGER), *[member(LLAMA_7B, EAGER)] * 2],
        "compiled": [base, *[member(LLAMA_7B, COMPILED)] * 2],
        "shared pair": [base, member(LLAMA_7B, ADAPTED, adapted=True)],
    }
    rows: list[tuple[str, Sequence[str]]] = []
    for way, members in ways.items():
        read, launches = map(sum, zip(*members, strict=True))
        times = [read / gpu.bandwidth, *(step_ms(members, n, gpu) for n in (1, 2, 3))]
        cells = (fixed(read, 1), str(launches + REST), *map(fixed, times))
        rows.append(("", (way, *cells, fixed(times[1] / times[0]))))
    caption = (
        f"A model: nothing here is measured. {gpu.bandwidth:g} TB/s. Milliseconds. bytes: weights, "
        f"keys and values of {KEYS} tokens. {LAUNCH_US:g} us from one kernel of a stream to the "
        "next (assumed). x bytes: on 1 stream; 2 and 3 are taken to overlap wherever they can."
    )
    columns = ("", "GB", "launches", "bytes", "1 stream", "2", "3", "x bytes")
    print_table(f"13B + 7B + 7B, batch 1, on {name}", columns, caption, rows)


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
    terms: Annotated[bool, typer.Option("--terms", help="Also each kernel.")] = False,
    step: Annotated[bool, typer.Option("--step", help="A decoder's step instead.")] = False,
) -> None:
    """Bytes, launches and least time of ours and of the peers' algorithms. Nothing is measured.

    Logits are bf16. Options take several values, separated by commas.
    """
    cases = product(
        parse_integers("--batch", batch, 1, 2**20),
        parse_integers("--vocab", vocab, LEAST_VOCAB_SIZE, MOST_VOCAB_SIZE),
        parse_choices("--filters", filters, SUMMARY_BYTES, None),
        parse_choices("--kinds", kinds, ("peaked", "flat"), None),
    )
    work = list(product(map(Case._make, cases), ALGORITHMS.items()))
    for name in parse_choices("--gpu", gpu, GPUS, None):
        one = GPUS[name]._replace(bandwidth=bandwidth or GPUS[name].bandwidth)
        if step:
            print_steps(name, one)
            continue
        rows: list[tuple[str, Sequence[str]]] = []
        for case, (algorithm, make) in work:
            section = f"{case.kind} {case.filters}\nbf16 V={case.vocab_size:,} B={case.rows}"
            kernels = make(case)
            moved, launches, *times = floor(kernels, case, one)
            cells = (algorithm, fixed(moved, 1), str(launches), *map(significant, times))
            rows.append((section, cells))
            for k in kernels if terms else ():
                cells = (f"  {k.name}", fixed(k.moved + k.again, 1), str(k.launches))
                rows.append((section, cells))
        caption = (
            f"A model: nothing here is measured. {one.bandwidth:g} TB/s "
            f"({'data sheet' if bandwidth is None else '--bandwidth'}), {one.sms} SMs, L2 "
            f"{one.l2_mib:g} MiB. Microseconds. bytes: all of them from device memory. latency: "
            f"{LAUNCH_US:g} us a launch, {TRIP_US:g} us a dependent trip to memory (assumed). "
            "floor: the larger of the two. in L2: the floor if L2 kept all it could."
        )
        columns = ("", "B/entry", "launches", "bytes", "latency", "floor", "in L2")
        print_table(f"sample on {name}", columns, caption, rows)


if __name__ == "__main__":
    typer.run(main)
