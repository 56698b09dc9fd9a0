"""What torch's operations move on CUDA, and the chains that the benchmarks compare with.

Which operations a chain runs, and what goes in and out of each, is counted
(:mod:`benchmarks.traffic_count`). The kernels behind an operation are read from ATen's CUDA sources
(around torch 2.13) and CUB's (CUDA 13.0), for rows of at least :data:`LEAST_VOCAB_SIZE` entries.
"""

from __future__ import annotations

from benchmarks.op_cases import FILTERS
from benchmarks.traffic import Algorithm, Case, Kernel, Op

LEAST_VOCAB_SIZE = 20_000
"""From here on topk takes many blocks a row, sort is a radix sort and softmax reads three times."""

FP32, INT64, BOOL = 4, 8, 1  # bytes
ROLES = ("base", "expert", "anti")

COUNTED = "Operations counted on a CPU, their kernels read from torch's CUDA sources"


def one_kernel(name: str, read: float, write: float, why: str) -> Op:
    """An operation that is one kernel."""
    return Op(name, read, write, (Kernel(name, read, write, why),))


def small(name: str, why: str = "one number a row") -> Op:
    """An operation whose bytes don't count."""
    return one_kernel(name, 0, 0, why)


def cast(dtype_bytes: int, role: str) -> list[Op]:
    """``float()`` of a role; nothing where it is fp32 already."""
    if dtype_bytes == FP32:
        return []
    return [one_kernel("_to_copy", dtype_bytes, FP32, f"{role} to fp32")]


def softmax(why: str, name: str = "_softmax") -> Op:
    """Softmax, or its logs, of a row that fits no SM's shared memory."""
    kernel = Kernel(
        "cunn_SoftMaxForward",
        FP32,
        FP32,
        f"{why}: read for the maximum, for the sum, and to write",
        reread=2 * FP32,
        blocks=1,
        trips=3,
    )
    return Op(name, FP32, FP32, (kernel,))


def cumsum(rows: int) -> Op:
    """Running sum of a row."""
    kernels: tuple[Kernel, ...]
    if rows == 1:
        kernels = (
            Kernel("DeviceScanInit", 0, 0, "state of the tiles"),
            Kernel("DeviceScan", FP32, FP32, "one pass"),
        )
    else:
        kernels = (Kernel("scan_innermost_dim", FP32, FP32, "one pass", blocks=1),)
    return Op("cumsum", FP32, FP32, kernels)


def masked_fill() -> Op:
    """``masked_fill`` into a new tensor."""
    kernels = (
        Kernel("copy", FP32, FP32, "the values, cloned first"),
        Kernel("masked_fill_", FP32 + BOOL, FP32, "reads values and mask, writes all values"),
    )
    return Op("masked_fill", FP32 + BOOL, FP32, kernels)


def scatter_mask() -> Op:
    """The mask of sorted tokens back in the order of the vocabulary."""
    kernels = (
        Kernel("copy", BOOL, BOOL, "the mask, cloned first"),
        Kernel("scatter", INT64 + BOOL, BOOL, "reads index and mask, writes bytes at random"),
    )
    return Op("scatter", INT64 + BOOL, BOOL, kernels)


def _radix_sort(passes: int, key: int, value: int) -> tuple[Kernel, ...]:
    """cub::DeviceRadixSort: one sweep a digit of 8 bits."""
    both = key + value
    return (
        Kernel("memset", 0, 0, "counters, bins, and look-back of each pass", launches=2 + passes),
        Kernel("RadixSortHistogram", key, 0, "the digits of all passes"),
        Kernel("RadixSortExclusiveSum", 0, 0, "256 bins a pass"),
        Kernel("RadixSortOnesweep", both, both, "keys and values, once a digit", launches=passes),
    )


def sort(rows: int) -> Op:
    """fp32 values with int64 indices: ``launch_stable_sort_kernel`` has three ways, by rows."""
    fill = Kernel("fill_reverse_indices", 0, INT64, "indices 0 to V - 1")
    both = FP32 + INT64
    if rows == 1:
        kernels = (fill, *_radix_sort(4, FP32, INT64))
    elif rows < 128:
        kernels = (
            Kernel("fill_index_and_segment", 0, 8, "index and row, int32 each"),
            *_radix_sort(4, FP32, 8),  # all rows by value
            *_radix_sort(1, 8, 0),  # then by row: at most 7 bits
            Kernel("sort_postprocess", 8 + FP32, both, "values gathered by sorted index"),
        )
    else:
        why = "digits of 5 and 6 bits; a pass reads the keys twice"
        kernels = (
            fill,
            Kernel("SegmentedRadixSort", both, both, why, 6, reread=FP32, blocks=1, trips=2),
        )
    return Op("sort", FP32, both, kernels)


def topk(k: int, vocab_size: int) -> Op:
    """The k largest, sorted: multi-block radix select (``mbtopk``), then a sort of the k."""
    out = (FP32 + INT64) * k / vocab_size
    kernels = (
        Kernel("fill, memset", 0, 0, "state of the select", launches=3),
        Kernel("computeBlockDigitCounts", FP32, 0, "digits of 8 bits", launches=4),
        Kernel("digit sums", 0, 0, "which digit holds the k-th", launches=4 * 2),
        Kernel("counts, scans by key", 0, 0, "where each block writes", launches=1 + 2 * 2),
        Kernel("gatherTopK", FP32, out, "what is above the k-th value"),
        Kernel("sortKeyValueInplace", out, out, "the k, by value"),
    )
    return Op("topk", FP32, out, kernels)


def multinomial() -> Op:
    """One draw a row: argmax of p over exponential noise, after two checks."""
    kernels = (
        Kernel("aminmax", FP32, 0, "check: finite, not negative"),
        Kernel("ge, lt, and, assert", 0, 0, "its verdict", launches=4),
        Kernel("sum", FP32, 0, "check: some mass"),
        Kernel("eq, any, not, assert", 0, 0, "its verdict", launches=4),
        Kernel("exponential_", 0, FP32, "noise for every entry"),
        Kernel("div", 2 * FP32, FP32, "p / noise"),
        Kernel("argmax", FP32, 0, "the draw"),
    )
    return Op("multinomial", FP32, 0, kernels)


def transformers(case: Case) -> Algorithm:
    """``peers.transformers_peer``: combination, transformers' warpers, softmax, multinomial."""
    filters = FILTERS[case.filters]
    ops = [op for role in ROLES for op in cast(case.dtype_bytes, role)]
    ops += [
        one_kernel("sub", 2 * FP32, FP32, "expert - anti"),
        one_kernel("mul", FP32, FP32, "times alpha"),
        one_kernel("add", 2 * FP32, FP32, "plus base"),
        one_kernel("div", FP32, FP32, "temperature"),
    ]
    if filters.top_k:
        ops += [
            topk(filters.top_k, case.vocab_size),
            one_kernel("lt", FP32, BOOL, "below the k-th value"),
            masked_fill(),
        ]
    if filters.top_p < 1:
        ops += [
            sort(case.rows),
            softmax("of the sorted values"),
            cumsum(case.rows),
            one_kernel("le", FP32, BOOL, "mass up to here at most 1 - p"),
            small("fill_"),
            scatter_mask(),
            masked_fill(),
        ]
    ops += [softmax("of what is left"), multinomial()]
    return Algorithm("transformers", tuple(ops), 3 * case.dtype_bytes, COUNTED)


def combine_ops(dtype_bytes: int) -> list[Op]:
    """``gpu.samplers.combine``: torch widens mixed operands on the fly."""
    return [
        *cast(dtype_bytes, "anti"),
        one_kernel("sub", dtype_bytes + FP32, FP32, "expert - anti"),
        one_kernel("add", dtype_bytes + FP32, FP32, "plus base"),
    ]


def eager(case: Case) -> Algorithm:
    """``gpu.samplers.eager_sampler``: a topk or a sort, softmax, and an exponential race."""
    filters, rows = FILTERS[case.filters], case.rows
    ops = [*combine_ops(case.dtype_bytes), one_kernel("div_", FP32, FP32, "temperature")]
    share = 1.0
    if filters.top_k:
        ops.append(topk(filters.top_k, case.vocab_size))
        share = filters.top_k / case.vocab_size
    elif filters.top_p < 1:
        ops.append(sort(rows))
    size, mask = share * FP32, share * BOOL
    k_mass = one_kernel("_softmax", size, size, "of the k")
    ops.append(k_mass if filters.top_k else softmax("of the row"))
    if filters.top_p < 1:
        ops += [
            one_kernel("cumsum", size, size, "of the k") if filters.top_k else cumsum(rows),
            one_kernel("sub", 2 * size, size, "mass before each"),
            one_kernel("lt", size, mask, "before p is reached"),
            small("scalar_tensor", "the 0 of where"),
            one_kernel("where", mask + size, size, "mass of the kept"),
        ]
    ops += [
        one_kernel("exponential_", 0, size, "noise for every entry"),
        one_kernel("div", 2 * size, size, "p / noise"),
        one_kernel("argmax", size, 0, "the draw"),
    ]
    if filters.top_p < 1:
        kernel = Kernel("gather", 0, 0, "one id a row")
        ops.append(Op("gather", share * INT64, 0, (kernel,)))
    return Algorithm("eager", tuple(ops), 3 * case.dtype_bytes, COUNTED)


def torch_combine(case: Case) -> Algorithm:
    """``gpu.samplers.combine``."""
    ops = tuple(combine_ops(case.dtype_bytes))
    return Algorithm("eager", ops, 3 * case.dtype_bytes + FP32, COUNTED)


def torch_score(case: Case) -> Algorithm:
    """``gpu.providers.torch_score``: combination, log-softmax, one value a row of it."""
    ops = (
        *combine_ops(case.dtype_bytes),
        softmax("of the row", "_log_softmax"),
        Op("gather", FP32, 0, (Kernel("gather", 0, 0, "one value a row"),)),
    )
    return Algorithm("eager", ops, 3 * case.dtype_bytes, COUNTED)
