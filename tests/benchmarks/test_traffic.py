import ast
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
import torch

from benchmarks.gpu.samplers import combine
from benchmarks.op_cases import FILTERS
from benchmarks.traffic import GPUS, Algorithm, Case, Gpu, Kernel, Latency, Op, estimate
from benchmarks.traffic_count import (
    CHAINS,
    case_logits,
    count_chain,
    count_draws,
    count_ops,
    count_parts,
    count_tiles,
    draw_passes,
)
from benchmarks.traffic_fused import ALGORITHMS, BLOCK, DRAW_PASSES, TILE, TILES_AGAIN, ours
from benchmarks.traffic_torch import eager, multinomial, sort, topk, torch_combine, transformers
from proxytune_kernels import RowParams, reference

H100, LATENCY = GPUS["h100"], Latency()
TORCH_CHAINS = {"eager": eager, "transformers": transformers}
ALL = [
    (op, make, Case(rows, dtype=dtype, filters=filters, kind=kind))
    for op, makes in ALGORITHMS.items()
    for make in makes
    for rows in (1, 8, 256)
    for dtype in ("bf16", "fp32")
    for filters in FILTERS
    for kind in ("peaked", "flat")
]
# Tensors of one number a row are left out of the model: 8 bytes at most, fewer than ten of them in
# an operation, over at least 20,000 entries.
TOLERANCE = 10 * 8 / 20_000


@pytest.mark.parametrize("kind", ["peaked", "flat"])
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_run_the_operations_of_the_model(name, dtype, filters, kind):
    case = Case(2, 20_000, dtype, filters, kind)
    model, counted = TORCH_CHAINS[name](case).ops, count_chain(name, case)
    assert [op.name for op in counted] == [op.name for op in model]
    for said, got in zip(model, counted, strict=True):
        assert (got.read, got.write) == pytest.approx((said.read, said.write), abs=TOLERANCE)


def test_combination_runs_the_operations_of_the_model():
    for dtype in ("bf16", "fp32"):
        case = Case(2, 20_000, dtype)
        logits = case_logits(case)
        counted = count_ops(partial(combine, logits), case.entries)
        said = [(op.name, op.read, op.write) for op in torch_combine(case).ops]
        assert [(op.name, op.read, op.write) for op in counted] == said


def test_multinomial_is_made_of_the_parts_of_the_model():
    """CUDA runs the same operators; there, _assert_async is a kernel and waits for nothing."""
    parts = count_parts(lambda: torch.multinomial(torch.rand(2, 20_000), 1), "multinomial")
    if "aminmax" not in parts:
        pytest.skip("the multinomial of an older torch, which takes min and max one by one")
    assert parts == [
        "aminmax", "ge", "lt", "bitwise_and", "_assert_async", "sum", "eq", "any", "bitwise_not",
        "_assert_async", "exponential_", "div", "argmax",
    ]  # fmt: skip
    assert len(parts) == sum(kernel.launches for kernel in multinomial().kernels)


def test_counter_counts():
    x = torch.zeros(2, 100)

    def run():
        y = x[:, :50] + x[:, 50:]  # two views of 400 bytes in, 400 out
        y.exponential_()  # 400 out
        return y.sum(-1)  # 400 in, 8 out

    counted = count_ops(run, entries=100)
    assert [(op.name, op.read, op.write) for op in counted] == [
        ("add", 8, 4), ("exponential_", 0, 4), ("sum", 4, 0.08),
    ]  # fmt: skip


def test_kernels_move_what_their_operation_takes_and_gives():
    """At least each argument once and each result once, except where few entries are looked at."""
    for _, make, case in ALL:
        for op in make(case).ops:
            moved = sum(kernel.bytes_moved for kernel in op.kernels)
            assert moved >= op.read + op.write - 1e-9 or op.name == "gather", (make, op)


@pytest.mark.parametrize(
    ("rows", "size", "launches"),
    [
        # indices, histogram, 4 sweeps of value and int64 index
        (1, 8 + 4 + 4 * 24, 1 + 2 + 4 + 2 + 4),
        # the same with row and index for values; one sweep of 8 bytes by row; values gathered
        (2, 8 + 4 + 4 * 24 + 8 + 16 + 24, 1 + 12 + 6 + 1),
        (127, 8 + 4 + 4 * 24 + 8 + 16 + 24, 1 + 12 + 6 + 1),
        # indices, 6 passes that read keys twice
        (128, 8 + 6 * 28, 7),
    ],
)
def test_sort_by_rows(rows, size, launches):
    kernels = sort(rows).kernels
    assert sum(kernel.bytes_moved for kernel in kernels) == size
    assert sum(kernel.launches for kernel in kernels) == launches


def test_topk_reads_once_a_digit_and_once_to_gather():
    kernels = topk(50, 128_256).kernels
    of_the_k = 3 * 12 * 50 / 128_256  # written, then sorted: read and written
    assert sum(kernel.bytes_moved for kernel in kernels) == pytest.approx(5 * 4 + of_the_k)


def test_the_eager_chain_in_words():
    """The sum in docs/roofline.md: combination, temperature, sort, softmax, prefix, race."""
    case = Case(1)
    prefix = 8 + 12 + 5 + 9
    assert eager(case).bytes_moved == 26 + 8 + 108 + 16 + prefix + 4 + 12 + 4


def small_gpu(**changes) -> Gpu:
    """1 TB/s; 10 SMs of 64 GB/s each: 1,000,000 and 64,000 bytes a microsecond; no L2."""
    return replace(Gpu("small", "0", 10, 1.0, 0.0, 1.0), **changes)


def algorithm(*kernels: Kernel, compulsory: float = 1.0) -> Algorithm:
    return Algorithm("x", (Op("x", 0, 0, kernels),), compulsory, "made up")


def test_estimate_by_hand():
    case = Case(rows=2, vocab_size=1_000_000)
    two = algorithm(
        Kernel("wide", 4, 2, "", launches=3, trips=2),
        Kernel("narrow", 1, 0, "", reread=1, blocks=2),
    )
    e = estimate(two, case, small_gpu(), Latency(launch=10, trip=1))
    assert e.bytes_per_entry == 3 * 6 + 2
    assert e.launches == 4
    assert e.megabytes == 2 * 20
    wide = 2e6 * 18 / 640_000  # all ten SMs: 640 GB/s, less than memory's 1 TB/s
    narrow = 2e6 * 2 / (4 * 64_000)  # two rows of two blocks
    assert e.bytes_us == pytest.approx(wide + narrow)
    assert e.latency_us == 3 * (10 + 2) + 11
    assert e.floor_us == max(e.bytes_us, e.latency_us)
    assert e.bound == "bytes"
    fast = estimate(two, case, small_gpu(sms=100, clock=10.0), Latency(launch=1000))
    assert fast.bytes_us == pytest.approx(2e6 * 18 / 1e6 + 2e6 * 2 / 1e6)
    assert fast.bound == "latency"


def test_what_a_cache_saves():
    """Twice its size between kernels; never the operation's own inputs and outputs."""
    case = Case(rows=1, vocab_size=2**20)
    chain = algorithm(Kernel("a", 6, 4, ""), Kernel("b", 4, 0, "", reread=8), compulsory=6)
    gpu = small_gpu(sms=10_000)

    def mib(l2: float) -> float:
        return estimate(chain, case, replace(gpu, l2_mib=l2), LATENCY).cached_us * 1e6 / 2**20

    assert mib(0) == pytest.approx(14)  # b's second read is taken to hit
    assert mib(1) == pytest.approx(12)
    assert mib(4) == pytest.approx(6)
    assert mib(100) == pytest.approx(6)


def test_floors_are_in_order():
    for _, make, case in ALL:
        for gpu in (H100, GPUS["l40s"]):
            e = estimate(make(case), case, gpu, LATENCY)
            inputs = 3 * case.dtype_bytes * case.entries / (gpu.bandwidth * 1e6)
            assert e.floor_us >= e.cached_floor_us * (1 - 1e-12)
            assert e.cached_floor_us >= inputs * (1 - 1e-12)


def test_less_bandwidth_and_slower_launches_are_never_faster():
    case = Case(64)
    for make in ALGORITHMS["sample"]:
        usual = estimate(make(case), case, H100, LATENCY)
        slow = estimate(make(case), case, replace(H100, bandwidth=1.0), Latency(2.0, 1.0))
        assert slow.bytes_us > usual.bytes_us
        assert slow.latency_us == pytest.approx(2 * usual.latency_us)


def test_ours():
    size, summary = 6, 14 / 128
    peaked, flat = (ours(Case(64, kind=kind)) for kind in ("peaked", "flat"))
    tiles = 6 * 128 * TILES_AGAIN["top_p"] / 128_256
    assert peaked.bytes_moved == pytest.approx(size + 2 * summary + tiles)
    sampled = 1024 * 3 * 32 / 128_256
    assert flat.bytes_moved == pytest.approx(3 * size + 2 * summary + sampled)
    assert peaked.launches == flat.launches == 4
    assert ours(Case(64, dtype="fp32")).bytes_moved > 2 * size


def test_ours_is_what_the_kernels_do():
    """Tile, block and launches, from the code of the Triton backend."""
    pytest.importorskip("triton")
    scan = pytest.importorskip("proxytune_kernels.kernels.scan", exc_type=ImportError)
    assert scan.TILE.value == TILE
    assert scan.TILE.value * scan.TILES_PER_PROGRAM == BLOCK
    source = Path(scan.__file__).with_name("sample.py").read_text()
    functions = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name in ("launch_sample", "launch_selection")
    ]
    assert len(functions) == 2  # the second is what sample_hidden shares
    launches = [
        node.value.id
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id.endswith("_kernel")
    ]
    kernels = [kernel.name for kernel in ours(Case()).kernels]
    assert sorted(launches) == sorted(f"_{name}_kernel" for name in kernels)


def passes(probabilities: list[float], top_p: float, draws: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    row = torch.tensor(probabilities, dtype=torch.float64)
    return [draw_passes(row, top_p, generator) for _ in range(draws)]


def test_a_token_of_the_kept_set_takes_one_round():
    assert set(passes([1.0, 0.0], 0.9, 50)) == {2.0}
    assert set(passes([0.5, 0.5], 0.9, 50)) == {2.0}


def test_a_token_outside_the_kept_set_takes_another_round():
    """5% of first draws; the second then draws from the rest, here one token."""
    drawn = passes([0.95, 0.05], 0.9, 2000)
    assert set(drawn) == {2.0, 4.0}
    # 2,000 draws: a standard deviation of 0.5% of them; four.
    assert drawn.count(4.0) / len(drawn) == pytest.approx(0.05, abs=0.02)


def test_the_second_pivot_saves_rounds():
    """Kept is the first. From the third or fourth the bound goes to halfway to 1, past the second;
    from the second to itself: the next draw is the first either way."""
    drawn = passes([0.6, 0.2, 0.15, 0.05], 0.5, 2000)
    assert set(drawn) == {2.0, 4.0}
    # 2,000 draws: a standard deviation of 1.1% of them; four.
    assert drawn.count(4.0) / len(drawn) == pytest.approx(0.4, abs=0.045)


def test_a_search_stops_at_its_token():
    """The first of 8,192 entries is found in the first 4,096."""
    assert set(passes([1.0] + [0.0] * 8191, 0.9, 5)) == {1.5}
    assert set(passes([0.0] * 8191 + [1.0], 0.9, 5)) == {2.0}


@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_reads_of_a_draw_are_in_the_models_range(kind):
    """64 draws spread by 0.6 reads: their mean is good to about 0.08; three times that."""
    least, mean, most = DRAW_PASSES
    reads = count_draws(Case(16, kind=kind), draws=4)
    assert fmean(reads) == pytest.approx(mean, abs=0.24)
    assert least - 0.002 <= min(reads)
    assert max(reads) <= most


def kept(case: Case) -> torch.Tensor:
    filters = FILTERS[case.filters]
    params = RowParams.make(
        case.rows, temperature=filters.temperature, top_k=filters.top_k, top_p=filters.top_p
    )
    return reference.distribution(combine(case_logits(case)), params).kept


@pytest.mark.parametrize("filters", ["top_p", "top_k+top_p"])
@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_the_tiles_counted_hold_the_kept_set(kind, filters):
    case = Case(4, 20_001, filters=filters, kind=kind)
    x = combine(case_logits(case))
    tiles = torch.nn.functional.pad(x, (0, -20_001 % TILE), value=-math.inf).view(4, -1, TILE)
    for row, number in enumerate(count_tiles(case)):
        chosen = tiles[row].amax(-1).topk(number).indices
        holding = (kept(case)[row].nonzero()[:, 0] // TILE).unique()
        assert set(holding.tolist()) <= set(chosen.tolist())


def test_tiles_read_again_are_those_of_the_model():
    peaked = fmean(count_tiles(Case(32)))
    assert peaked == pytest.approx(TILES_AGAIN["top_p"], abs=2)
    k = fmean(count_tiles(Case(32, filters="top_k+top_p")))
    assert k == pytest.approx(TILES_AGAIN["top_k+top_p"], abs=2)  # ties add a few
    assert set(count_tiles(Case(4, kind="flat"))) == {1002}
