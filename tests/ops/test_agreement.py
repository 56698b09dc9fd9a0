"""The CPU's kernels, Triton's and the reference draw the same tokens from the same seeds.

Where a kernel's token is not the reference's, the two fp64 scores must be as close as the bounds of
docs/contracts.md, Scores, allow; the test prints how close.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels import reference, rng
from tests.ops import oracle
from tests.ops.conftest import NEEDS_TRITON, Backend, sized

pytestmark = NEEDS_TRITON

REFERENCE, TRITON = Backend("reference"), Backend("triton")
KERNELS = [TRITON, Backend("cpu")] if ptk.backends()["cpu"] is None else [TRITON]


class Truth:
    """What the reference says of a batch, in fp64."""

    def __init__(self, x: Tensor, params: ptk.RowParams, stream: str) -> None:
        self.distribution = reference.distribution(x, params)
        ids = torch.arange(x.shape[1])
        self.noise = rng.gumbel(params.seed, params.position, ids, rng.STREAMS[stream])
        self.logprobs = self.distribution.logprobs()
        self.raw_logprobs = self.distribution.raw_logprobs()

    def explains(self, row: int, token: int, wanted: int) -> bool:
        """Whether rounding lets ``token`` win: docs/contracts.md, Scores. Prints the gap."""
        at = torch.tensor([token, wanted])
        scaled, noise = self.distribution.scaled[row, at], self.noise[row, at]
        score = scaled + noise
        bound = 3 * 2.0**-24 * scaled.abs() + 1.7e-7 * noise.abs().clamp(min=1)
        bound += 2.0**-24 * score.abs()
        gap = float(score[1] - score[0])
        print(f"row {row}: {token} for {wanted}, {gap:.3g} apart; rounding: {bound.sum():.3g}")
        return bool(self.distribution.kept[row, token]) and gap <= float(bound.sum())

    def check_logprobs(self, out: ptk.SampleOutput, rows: Tensor, tile_error: float) -> None:
        """The bounds of docs/contracts.md, Logprobs; of docs/gpu.md where tiles are summed."""
        tokens = out.token_ids.clamp(min=0)[:, None]
        for found, wanted, depth, factor in (
            (out.logprobs, self.logprobs, self.distribution.scaled, 2.0**-23),
            (out.raw_logprobs, self.raw_logprobs, self.distribution.shifted, 2.0**-24),
        ):
            value, below = (t.gather(1, tokens)[:, 0] for t in (wanted, depth))
            bound = factor * below.abs() + 2.0**-24 * value.abs() + max(9.1e-7, tile_error)
            right = (found.double() - value).abs() <= bound
            assert torch.where(out.token_ids < 0, found.isnan(), right)[rows].all()


def _spoiled(rows: oracle.Rows) -> oracle.Rows:
    """Some rows with NaN, +inf, nothing left, or a parameter out of range."""
    base, batch = rows.base.clone(), len(rows.base)
    column = torch.randint(rows.vocab_size, (batch,), generator=torch.Generator().manual_seed(1))
    for first, value in ((0, torch.nan), (2, torch.inf)):
        base[range(first, batch, 7), column[first::7]] = value
    base[4::14, : rows.vocab_size] = -torch.inf
    rows.params["top_p"][5::14] = 1.5
    return rows._replace(base=base)


def _batches(dtype: torch.dtype) -> Iterator[oracle.Rows]:
    sizes = sized(TRITON, (*oracle.MANY, (20_000, 60), (50_257, 20)), oracle.FEW)
    for i, (vocab_size, batch) in enumerate(sizes):
        rows = oracle.random_rows(7000 + i, batch, vocab_size, dtype)
        yield _spoiled(rows) if i % 2 else rows


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: str(d)[6:])
def test_sample(dtype):
    total = differ = undecided = 0
    for i, rows in enumerate(_batches(dtype)):
        params, stream = ptk.RowParams(**rows.params), ("sample", "draft")[i % 2]
        arguments = {"vocab_size": rows.vocab_size, "noise_stream": stream}
        wanted = REFERENCE.sample(*rows[:3], params, **arguments)
        base, expert, anti = (t[:, : rows.vocab_size] for t in rows[:3])
        x = reference.combine(base, expert, anti, params.alpha)
        truth = Truth(x, params, stream)
        outs = [kernel.sample(*rows[:3], params, **arguments) for kernel in KERNELS]
        for kernel, out in zip(KERNELS, outs, strict=True):
            assert torch.equal(out.status, wanted.status)
            # Kernels sum the same integers; the reference rounds some of them otherwise.
            assert torch.equal(out.num_kept, outs[0].num_kept)
            same = out.num_kept == wanted.num_kept
            truth.check_logprobs(out, same, kernel.tile_error)
            for row in torch.where(same & (out.token_ids != wanted.token_ids))[0].tolist():
                assert truth.explains(row, int(out.token_ids[row]), int(wanted.token_ids[row]))
                differ += 1
            total, undecided = total + len(same), undecided + int((~same).sum())
    print(f"{total} rows, {undecided} with another kept set, {differ} with another token")
    assert undecided <= 1 + total // 100 and differ <= 1 + total // 1000


def test_score_and_top_logprobs():
    """Tokens of the order are equal; logprobs lie within two bounds of each other."""
    batch, n, vocab_size = sized(TRITON, 200, 6), 20, 700
    rows = oracle.random_rows(7200, batch, vocab_size)
    params = ptk.RowParams(**rows.params)
    tops = [
        backend.sample(*rows[:3], params, vocab_size=vocab_size, top_logprobs=n).top
        for backend in (REFERENCE, *KERNELS)
    ]
    roles = [t[:, None].expand(-1, n, -1) for t in rows[:3]]
    live = tops[0].token_ids >= 0
    bound = 2 * (2.0**-23 * tops[0].logprobs[live].abs() + 4.2e-6)
    for kernel, top in zip(KERNELS, tops[1:], strict=True):
        assert torch.equal(top.token_ids, tops[0].token_ids)
        assert ((top.logprobs - tops[0].logprobs)[live].abs() <= bound).all()
        scored = kernel.score(*roles, top.token_ids, params.alpha, vocab_size=vocab_size)
        assert torch.equal(oracle.bits(scored), oracle.bits(top.logprobs))
