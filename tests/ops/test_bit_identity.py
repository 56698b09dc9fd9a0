"""The same bits whatever the batch, the strides, the threads and the instruction set."""

from __future__ import annotations

import functools

import pytest
import torch

import proxytune_kernels as ptk
from tests.ops import oracle
from tests.ops.conftest import KERNELS, on_threads, sized
from tests.ops.oracle import assert_same

CPU = [backend for backend in KERNELS if backend.name == "cpu"]


def run(backend, rows, index=None, **kwargs):
    params, roles = ptk.RowParams(**rows.params), rows[:3]
    if index is not None:
        params, roles = params.rows(index), tuple(t[index] for t in roles)
    return backend.sample(*roles, params, vocab_size=rows.vocab_size, **kwargs)


def at(out, index):
    return oracle.each(lambda t: t[index], out)


@functools.cache
def rows_of(vocab_size, dtype=torch.float32, batch=48):
    return oracle.random_rows(vocab_size, batch, vocab_size, dtype)


def with_roles(rows, roles):
    base, expert, anti = roles
    return rows._replace(base=base, expert=expert, anti=anti)


# Of one tile, of some, and of several programs a row; each dtype with one of them.
shapes = pytest.mark.parametrize(
    ("vocab_size", "dtype"), list(zip((5, 300, 2048), oracle.DTYPES, strict=True)), ids=str
)


@shapes
@pytest.mark.parametrize("top_logprobs", (0, 128))
def test_batch_permuted_grown_and_split(backend, vocab_size, dtype, top_logprobs):
    batch = sized(backend, 48, 3)
    rows, options = rows_of(vocab_size, dtype, batch), {"top_logprobs": top_logprobs}
    whole = run(backend, rows, **options)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(1))
    for index in sized(
        backend,
        (order, slice(0, 1), slice(17, 24), slice(batch - 1, batch), slice(0, 0), order.repeat(3)),
        (order, slice(batch - 1, batch), slice(0, 0)),
    ):
        assert_same(at(whole, index), run(backend, rows, index, **options))


@shapes
def test_strided_and_misaligned_rows(backend, vocab_size, dtype):
    """Views whose rows start at odd addresses, far apart, or (stride 0) are one row."""
    rows = rows_of(vocab_size, dtype, sized(backend, 48, 5))
    plain = run(backend, rows)

    def view(role, offset, gap):
        batch, width = role.shape
        store = torch.full((batch * (width + gap) + offset,), torch.nan, dtype=dtype)
        strided = store[offset:].view(batch, width + gap)[:, :width]
        return strided.copy_(role)

    places = ((1, 1), (3, 0), (7, 65))
    views = [view(r, *p) for r, p in zip(rows[:3], places, strict=True)]
    assert_same(plain, run(backend, with_roles(rows, views)))
    one = with_roles(rows, [r[:1].expand_as(r) for r in rows[:3]])
    copied = with_roles(rows, [r.contiguous() for r in one[:3]])
    assert_same(run(backend, one), run(backend, copied))


def test_reversed_rows_of_a_larger_tensor(backend):
    """Every second row of a [B, 2, V] tensor: what verify's positions and score's look like."""
    rows = rows_of(300, batch=sized(backend, 48, 6))
    stacked = torch.stack([rows.anti, rows.base], 1)
    assert_same(run(backend, rows), run(backend, rows._replace(base=stacked[:, 1])))


@on_threads
@pytest.mark.parametrize("vocab_size", (300, 16384, 40001))
def test_thread_counts(backend, vocab_size):
    """Rows over threads, and from 16,384 tokens each row over threads where rows are few."""
    for batch in [2] if backend.name == "reference" else [1, 2, 7]:
        rows = rows_of(vocab_size, batch=batch)
        torch.set_num_threads(1)
        alone = run(backend, rows, top_logprobs=50)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert_same(alone, run(backend, rows, top_logprobs=50))


@pytest.mark.parametrize("kernel", CPU, ids=str, indirect=True)
def test_thread_counts_of_flat_rows(kernel):
    """No filter: the race itself runs over all threads; some rows with a top_p cut among them."""
    row = (torch.randn(3, 100_003, generator=torch.Generator().manual_seed(2)) * 0.1).half()
    for params in ({}, {"top_p": 0.9}, {"top_k": 9000}, {"temperature": 30.0, "min_p": 0.5}):
        outs = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outs += [kernel.sample(row[i : i + 1], position=i, **params) for i in range(3)]
        for i, out in enumerate(outs[3:]):
            assert_same(outs[i % 3], out)


@pytest.mark.skipif(len(CPU) < 2, reason="one instruction set runs here")
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: str(d)[6:])
def test_instruction_sets_agree_at_every_width(dtype):
    """1 to 300 tokens and around the multiples of 128, 16,384 and 32,768 (groups of tiles)."""
    edges = [128 * i + d for i in (3, 8, 32, 128, 256) for d in (-17, -1, 0, 1, 15)]
    for vocab_size in (*range(1, 301), *edges):
        rows = oracle.random_rows(vocab_size, 12, vocab_size, dtype, padding=vocab_size % 3)
        outs = []
        for backend in CPU:
            backend.use()
            outs.append(run(backend, rows))
        for out in outs[1:]:
            assert_same(outs[0], out)
    CPU[-1].use()


@pytest.mark.skipif(len(CPU) < 2, reason="one instruction set runs here")
def test_instruction_sets_agree_on_wide_flat_rows():
    """Histogram, ties over 4,096, two values, one value: the rare paths of the selection."""
    g = torch.Generator().manual_seed(8)
    noise = torch.randn(130_000, generator=g)
    kinds = noise * 1e-3, noise, (noise * 2).round() / 2, (noise > 1).float(), noise * 0
    base = torch.stack(kinds).repeat_interleave(6, 0)
    params = ptk.RowParams.make(
        30, top_p=torch.tensor([1.0, 0.9, 0.3, 1.0, 0.99, 1e-5]).repeat(5),
        top_k=torch.tensor([0, 0, 0, 50_000, 9000, 0]).repeat(5), temperature=0.8,
        filter_order=torch.arange(30) % 3, seed=5, position=torch.arange(30),
    )  # fmt: skip
    outs = []
    for backend in CPU:
        backend.use()
        outs += [backend.sample(base, params=params, top_logprobs=n) for n in (1, 33, 128)]
        verified = backend.verify(
            base[:10].view(2, 5, -1), None, None, torch.full((2, 4), 3), params.rows(slice(0, 2)),
            mode="rejection", draft_logits=base[10:18].view(2, 4, -1),
        )  # fmt: skip
        outs.append(verified)
    for i, out in enumerate(outs[4:]):
        assert_same(outs[i % 4], out)
    CPU[-1].use()


@pytest.mark.skipif(len(CPU) < 2, reason="one instruction set runs here")
def test_instruction_sets_agree_on_every_operator():
    for vocab_size in (1, 31, 129, 1000):
        rows = oracle.random_rows(vocab_size, 24, vocab_size, torch.bfloat16)
        roles = tuple(t.view(6, 4, -1) for t in (rows.base, rows.expert, rows.anti))
        params = ptk.RowParams(**rows.params).rows(slice(0, 6))
        drafts = torch.randint(-1, vocab_size, (6, 3), generator=torch.Generator().manual_seed(1))
        outs = []
        for backend in CPU:
            backend.use()
            size: dict[str, int] = {"vocab_size": vocab_size}
            combined = backend.combine(*rows[:3], rows.params["alpha"], **size)
            ids = torch.zeros(6, 4, dtype=torch.int64)
            scored = backend.score(*roles, ids, params.alpha, **size)
            coupled = backend.verify(*roles, drafts, params, **size)
            given = {"mode": "rejection", "draft_logits": roles[1][:, :3]}
            rejected = backend.verify(*roles, drafts, params, **given, **size)
            outs.append((combined, scored, *coupled, *rejected))
        for out in outs[1:]:
            for a, b in zip(outs[0], out, strict=True):
                assert torch.equal(oracle.bits(a), oracle.bits(b))
    CPU[-1].use()


@pytest.mark.parametrize("mode", ("coupled", "rejection"))
def test_verify_and_score_do_not_depend_on_the_batch(backend, mode):
    batch = sized(backend, 16, 5)
    rows = oracle.random_rows(21, batch * 4, 200)
    roles = [t[:, :200].reshape(batch, 4, 200) for t in (rows.base, rows.expert, rows.anti)]
    params = ptk.RowParams(**rows.params).rows(slice(0, batch))
    drafts = torch.randint(-1, 200, (batch, 3), generator=torch.Generator().manual_seed(1))
    extra = {} if mode == "coupled" else {"draft_logits": roles[1][:, :3]}
    whole = backend.verify(*roles, drafts, params, mode=mode, **extra)
    scored = backend.score(*roles, torch.full((batch, 4), 5), params.alpha)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(2))
    for index in (order, slice(3, 4), slice(9, 16)):
        part = {n: v[index] for n, v in extra.items()}
        picked = [r[index] for r in roles]
        out = backend.verify(*picked, drafts[index], params.rows(index), mode=mode, **part)
        assert_same(at(whole, index), out)
        again = backend.score(
            *picked, torch.full_like(whole.token_ids[index], 5), params.alpha[index]
        )
        assert torch.equal(oracle.bits(again), oracle.bits(scored[index]))
    torch.set_num_threads(3)
    assert_same(whole, backend.verify(*roles, drafts, params, mode=mode, **extra))
