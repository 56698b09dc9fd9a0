"""The cluster kernels' source on a CPU: the CPU backend's results for every cluster, and no races.

tests/ops runs the contract's suite on it too. Here: what a cluster could do wrong and a single core
could not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels.ops.backends import backends
from tests.cluster import build
from tests.cluster.model import Model
from tests.ops import oracle
from tests.ops.conftest import CLUSTERS, Backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(backends()["cpu"] is not None, reason="needs the C++ extension to compare"),
]

BLOCKS = (1, 2, 4, 8, 16)
INF = torch.inf
CPU = Backend("cpu")
RAW_ERROR = CLUSTERS[0].tile_error if CLUSTERS else 0.0

each_cluster = pytest.mark.parametrize("blocks", BLOCKS)


class Case(NamedTuple):
    """Rows and what is asked of them."""

    roles: tuple[Tensor | None, ...]  # base, expert, anti
    params: ptk.RowParams
    keywords: dict[str, Any]


def sample(model: Model, case: Case) -> ptk.SampleOutput:
    base, expert, anti = case.roles
    return model.sample(base, expert, anti, case.params, **case.keywords)


def check_same(found: Any, wanted: Any) -> None:
    """Everything is the CPU's bit for bit, but raw logprobs, whose mass is of approximate sums."""
    named = [oracle.tensors(out) for out in (found, wanted)]
    assert named[0].keys() == named[1].keys()
    for name, one in named[0].items():
        other = named[1][name]
        if name not in (".raw_logprobs", ".top.logprobs"):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            continue
        # Both round the result, by 2^-24 of it.
        near = (one - other).double().abs() <= RAW_ERROR + 2.0**-23 * other.double().abs()
        assert (near | (one == other) | (one.isnan() & other.isnan())).all(), name


def check(found: ptk.SampleOutput, case: Case) -> None:
    check_same(found, CPU.sample(*case.roles, params=case.params, **case.keywords))


FILTERS: tuple[dict[str, Any], ...] = (
    dict(), dict(temperature=0.6), dict(temperature=0.0), dict(top_k=1), dict(top_k=40),
    dict(top_k=1500, temperature=0.8), dict(top_p=0.9), dict(top_p=0.3, temperature=1.3),
    dict(top_p=0.999, top_k=60), dict(min_p=0.05), dict(min_p=0.5, top_p=0.8),
    dict(top_k=300, top_p=0.95, min_p=0.01, filter_order="hf"),
    dict(top_k=3000, top_p=0.7, filter_order="joint"), dict(top_p=1e-9), dict(alpha=0.0, top_p=0.5),
)  # fmt: skip


def noise(vocab_size: int, spread: float, seed: int = 1) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def kinds(vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Rows of every kind, by name."""
    flat, peaked = noise(vocab_size, 0.01), noise(vocab_size, 4.0, 2)
    yield "flat", flat
    yield "peaked", peaked
    yield "ordinary", noise(vocab_size, 1.0, 3)
    yield "constant", torch.full((vocab_size,), -3.25)
    yield "ties", (noise(vocab_size, 1.0, 4) * 2).round() / 2
    yield "two values", (peaked > 4.0).float()
    yield "one tile", torch.where(torch.arange(vocab_size) // 128 == 3, peaked + 9, flat)
    yield "zeros of both signs", torch.where(flat > 0, 0.0, -0.0)
    spoiled = peaked.clone()
    spoiled[:: max(1, vocab_size // 9)] = torch.nan
    yield "NaN", spoiled
    spoiled = peaked.clone()
    spoiled[vocab_size // 3 :: max(1, vocab_size // 5)] = INF
    yield "+inf", spoiled
    yield "all but one", torch.where(torch.arange(vocab_size) == vocab_size - 1, 1.0, -INF)
    yield "nothing", torch.full((vocab_size,), -INF)
    yield "nearly all masked", peaked.masked_fill(torch.arange(vocab_size) % 100 != 7, -INF)
    yield "huge", torch.where(peaked > 0, peaked * 1e37, -3e38)


def rows_of(vocab_size: int, dtype: torch.dtype, filters: int) -> Case:
    """A row of each kind by some of the filters, the same ones each time."""
    base, values = [], []
    for i, (_, row) in enumerate(kinds(vocab_size)):
        for j in range(filters):
            base.append(row)
            values.append(FILTERS[(i + j * len(FILTERS) // filters) % len(FILTERS)])
    names = sorted({name for value in values for name in value})
    columns: dict[str, Any] = {}
    for name in names:
        default = getattr(ptk.SamplingParams(), name)
        column = [value.get(name, default) for value in values]
        if name == "filter_order":
            column = [ptk.params.FILTER_ORDERS.index(order) for order in column]
        columns[name] = torch.tensor(column)
    batch = len(base)
    params = ptk.RowParams.make(batch, seed=7, position=torch.arange(batch), **columns)
    steer = noise(batch * vocab_size, 0.5, 5).view(batch, vocab_size).to(dtype)
    return Case(
        (torch.stack(base).to(dtype), steer, steer.roll(1, -1)), params, {"top_logprobs": 20}
    )


@each_cluster
@pytest.mark.parametrize("vocab_size", (1, 127, 128, 129, 1031, 2048 + 128, 8192))
def test_rows_of_every_kind(vocab_size, blocks):
    dtype = oracle.DTYPES[vocab_size % 3]
    # A cluster of 16 blocks takes a second for a hundred rows.
    case = rows_of(vocab_size, dtype, 15 if vocab_size < 8192 and blocks < 8 else 5)
    check(sample(Model(blocks), case), case)


@each_cluster
@pytest.mark.parametrize("vocab_size", (50_257, 128_256))
def test_wide_rows_of_every_kind(vocab_size, blocks):
    case = rows_of(vocab_size, torch.bfloat16, 1)
    check(sample(Model(blocks), case), case)


def test_the_widest_row():
    vocab_size = 2**19
    base = torch.stack([noise(vocab_size, 3.0), torch.zeros(vocab_size)])
    params = ptk.RowParams.make(2, top_p=torch.tensor([0.9, 0.4]))
    case = Case((base, None, None), params, {"top_logprobs": 5})
    check(sample(Model(16), case), case)


@pytest.mark.parametrize("blocks", (1, 4))
def test_what_tiles_say_is_a_bound(blocks):
    """Trial cutoffs lie at multiples of -0.5 here. Just below one of them are 127 tokens of each
    tile, whose mass must not count as above it; and tiles' maxima are counted one by one."""
    mass = torch.full((64, 128), -4.0 - 2.0**-16)
    mass[:, 0] = 0.0
    mass[-1] = -16.0
    top_p = torch.linspace(0.02, 0.98, 49)
    case = Case(
        (mass.view(1, -1).expand(49, -1), None, None), ptk.RowParams.make(49, top_p=top_p), {}
    )
    check(sample(Model(blocks), case), case)
    count = torch.full((64, 128), -20.0)
    count[:, 5] = -0.25 * torch.arange(64)
    params = ptk.RowParams.make(63, top_k=torch.arange(1, 64))
    case = Case((count.view(1, -1).expand(63, -1), None, None), params, {"top_logprobs": 33})
    check(sample(Model(blocks), case), case)


@each_cluster
def test_threads_and_their_order_do_not_show(blocks):
    """The same bits from 1, 2 and 8 warps a block, in any order."""
    case = rows_of(2500, torch.float16, 1)
    first = sample(Model(blocks), case)
    for threads, seed in ((64, 1), (64, 2), (32, 3), (256, 4)):
        oracle.assert_same(first, sample(Model(blocks, threads, seed), case))


def test_blocks_do_not_show_in_a_bit():
    """Raw logprobs too: tiles' sums are the same, and their sum is of integers."""
    case = rows_of(5000, torch.bfloat16, 2)
    first = sample(Model(1), case)
    for blocks in BLOCKS[1:]:
        oracle.assert_same(first, sample(Model(blocks), case))


@pytest.mark.slow
@each_cluster
@pytest.mark.parametrize("vocab_size", (5, 600))
def test_no_races(vocab_size, blocks):
    """Between any two accesses to a byte of shared memory that conflict there is a barrier."""
    case = rows_of(vocab_size, torch.bfloat16, 5 if blocks < 8 else 2)
    check(sample(Model(blocks, races=True), case), case)


@pytest.mark.parametrize("blocks", (2, 4))
def test_no_races_in_wider_rows(blocks):
    """Histograms and lists of what they leave, one search after the other."""
    rows = dict(kinds(9000))
    base = torch.stack([rows[name] for name in ("ties", "two values", "flat", "constant")])
    filters: list[dict[str, Any]] = [
        dict(top_k=3000, top_p=0.7), dict(top_p=0.9), dict(top_k=40, min_p=0.001),
    ]  # fmt: skip
    for values in filters:
        params = ptk.RowParams.make(len(base), **values)
        case = Case((base, None, None), params, {"top_logprobs": 20})
        check(sample(Model(blocks, races=True), case), case)
    # Fewer tiles than likeliest tokens: nothing bounds x, and their list follows a histogram.
    few = Case((base[2:3, :2176], None, None), ptk.RowParams.make(1), {"top_logprobs": 20})
    check(sample(Model(blocks, races=True), few), few)


def place(values: Tensor, offset: int) -> Tensor:
    """Rows that start `offset` elements past an address that is a multiple of 16 bytes."""
    size = values.element_size()
    store = torch.full((values.numel() + 64,), torch.nan, dtype=values.dtype)
    start = -store.data_ptr() % 16 // size + offset
    return store[start : start + values.numel()].view(values.shape).copy_(values)


@each_cluster
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: str(d)[6:])
def test_rows_at_every_offset_from_16_bytes(dtype, blocks):
    """All roles alike (a head, vectors, a tail), and each at its own (one by one)."""
    per_vector = 16 // dtype.itemsize
    rows = oracle.random_rows(blocks, 3, 1000 + blocks, dtype, padding=0)
    params = ptk.RowParams(**rows.params)
    for offset in range(per_vector):
        for offsets in ((offset,) * 3, (offset, (offset + 1) % per_vector, 0)):
            roles = tuple(place(r, o) for r, o in zip(rows[:3], offsets, strict=True))
            case = Case(roles, params, {})
            check(sample(Model(blocks), case), case)


def test_zeros_of_both_signs_are_equal_in_head_and_tail():
    row = torch.tensor([[-0.0, 0.0, -0.0, -1.0, 0.0, -0.0, 0.0]])
    for offset in range(4):
        case = Case((place(row, offset), None, None), ptk.RowParams.make(1), {"top_logprobs": 7})
        check(sample(Model(1), case), case)


@each_cluster
@pytest.mark.parametrize("mode", ("coupled", "rejection"))
def test_verify(mode, blocks):
    """All positions of all requests in any order; the last to finish joins them."""
    batch, k, vocab_size = 6, 3, 400
    rows = oracle.random_rows(blocks, batch * (k + 1), vocab_size, torch.bfloat16, padding=0)
    roles = [t.view(batch, k + 1, vocab_size) for t in rows[:3]]
    params = ptk.RowParams(**rows.params).rows(slice(0, batch))
    g = torch.Generator().manual_seed(blocks)
    x = torch.stack([CPU.combine(*(r[:, j] for r in roles), params.alpha) for j in range(k)], 1)
    near = x + 0.1 * torch.randn(batch, k, vocab_size, generator=g)
    steps = [params._replace(position=params.position + j) for j in range(k)]
    stream = "sample" if mode == "coupled" else "draft"
    drafts = torch.stack(
        [
            ptk.sample(near[:, j], params=p, noise_stream=stream).token_ids
            for j, p in enumerate(steps)
        ],
        1,
    )
    drafts[0, 1], drafts[1, 0], drafts[2, 2], drafts[3] = -1, vocab_size, 10**12, -1
    extra = {} if mode == "coupled" else {"draft_logits": near.to(torch.float16)}
    wanted = CPU.verify(*roles, drafts, params, mode=mode, **extra)
    assert 0 < wanted.num_accepted.sum() < batch * k
    for threads, seed, races in ((64, 1, False), (256, 2, False), (32, 3, True)):
        model: Any = Model(blocks, threads, seed, races)
        found = model.verify(*roles, drafts, params, mode=mode, **extra)
        check_same(found, wanted)
