"""Before anything is timed, each provider's results are held to the contract, on the timed inputs.

What can be compared depends on the provider:

- with its filtered distribution at hand (eager, transformers): total variation distance from the
  contract's, as on the CPU (:func:`benchmarks.harness.logits.check_peer`);
- with draws only (torch.compile, FlashInfer, ours): every token lies in the contract's kept set,
  and a thousand draws fall on the kept set's parts as their mass says;
- ours besides: exactly the contract's number of kept tokens, and its logprob of each token.

A check raises AssertionError, which says what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.gpu.cases import Case, Inputs
from benchmarks.harness.heads import exact_x, first_rows
from benchmarks.harness.logits import (
    ALPHA,
    FILTERS,
    KINDS,
    Logits,
    OpCase,
    Peer,
    check_ours,
    check_peer,
    contract_distribution,
    make_logits,
    ties_past_top_k,
)
from proxytune_kernels import reference

_ROWS = 32  # of a batch: rows are alike and independent
_DRAWS = 1024  # at least, over all rows
_PARTS = 16
_REQUESTS = 2  # of verify: the reference goes through them position by position
_HEADS_ROWS = 4

# Probabilities summed in fp32 in blocks, V = 151,936: relative errors of about 18 roundings of
# 2^-24 in the sum, as much again in each term's exponential: 2e-6. Fifty times that, and still far
# from what a wrong filter does.
_SHARE_TOLERANCE = 1e-4
_SIGMAS, _SMALL_COUNT = 5.0, 5.0  # the second for parts that few draws are due from
# fp32 log-softmax: logits up to about 30, an exponential and a sum each good to about 1e-6.
_LOGPROB_TOLERANCE = {True: 1e-5, False: 1e-4}  # by whether it is ours, which promises more


@dataclass(frozen=True)
class Sampler:
    """One token id per row from the three roles' logits."""

    name: str
    sample: Callable[[Logits], Tensor]
    reseed: Callable[[int], object]
    """Makes the next call draw other numbers."""
    peer: Peer | None = None
    """Its two halves, where the filtered distribution can be had."""
    config: Mapping[str, Any] = field(default_factory=dict)


def check_sampler(
    case: OpCase, sampler: Sampler, logits: Logits, backend: str | None = None
) -> None:
    """Hold a sampler to the contract's distribution of the first rows; ours has a backend."""
    target = contract_distribution(case, logits, _ROWS)
    if sampler.peer is not None:
        check_peer(case, sampler.peer, logits, target)
    if backend is not None:
        check_ours(case, logits, target, backend)
    check_draws(case, sampler, logits, target)


def check_draws(
    case: OpCase, sampler: Sampler, logits: Logits, target: reference.Distribution
) -> None:
    """Compare many draws with a distribution: where they lie, and how often where.

    A token past the kept set passes where rounding or ties explain it: with another 1e-4 on top_p,
    and with all that are tied with the last of top_k, it is kept, or it is tied with one that is.
    The kept set of each row, likeliest first, is cut into 16 parts of equal mass; each part's
    number of draws over all rows is close to normal, or small. The seeds are fixed, so what passes
    once passes again.
    """
    rows = len(target.kept)
    tokens = []
    for n in range(math.ceil(_DRAWS / rows)):
        sampler.reseed(n)
        tokens.append(sampler.sample(logits)[:rows].long().clone())  # ours writes there again
    drawn = torch.stack(tokens, dim=1)
    inside = (drawn >= 0) & (drawn < case.vocab_size)
    allowed = inside & _allowed(case, logits, target).gather(-1, drawn * inside)
    if not allowed.all():
        row, column = (int(i) for i in (~allowed).nonzero()[0])
        raise AssertionError(
            f"{case}: {sampler.name} draws token {int(drawn[row, column])} in row {row}, which is "
            "not in the kept set"
        )
    p = target.logprobs().exp()
    part = _parts(target, p)
    share = p.new_zeros(rows, _PARTS).scatter_add_(-1, part, p)
    counted = target.kept.gather(-1, drawn)
    number = counted.sum(-1, keepdim=True)
    wanted, sigma = (number * share).sum(0), (number * share * (1 - share)).sum(0).sqrt()
    got = torch.bincount(part.gather(-1, drawn)[counted], minlength=_PARTS)
    if not ((got - wanted).abs() <= _SIGMAS * sigma + _SMALL_COUNT).all():
        raise AssertionError(
            f"{case}: {sampler.name} draws {got.tolist()} times from {_PARTS} parts of the kept "
            f"set, likeliest first, where {[round(n) for n in wanted.tolist()]} are due"
        )


def _parts(target: reference.Distribution, p: Tensor) -> Tensor:
    """Which part of its row's kept set each token is in, by the mass before it: int64 [rows, V]."""
    ranked = p.gather(-1, target.order)
    middle = ranked.cumsum(-1) - ranked / 2
    part = (middle * _PARTS).long().clamp(max=_PARTS - 1)
    return torch.empty_like(part).scatter_(-1, target.order, part)


def _allowed(case: OpCase, logits: Logits, target: reference.Distribution) -> Tensor:
    """Tokens a sampler may draw, bool [rows, V]: the kept set and what rounding may add."""
    rows = len(target.kept)
    params = case.row_params(logits[0].device).rows(slice(0, rows))
    top_p = FILTERS[case.filters].top_p
    if top_p < 1:
        params.top_p.fill_(min(1.0, top_p + _SHARE_TOLERANCE))
        extra, _ = ties_past_top_k(case, target)
        params.top_k.add_(extra.int())
        target = reference.distribution(_combined(logits, rows), params)
    lowest = target.shifted.masked_fill(~target.kept, torch.inf).amin(-1, keepdim=True)
    return target.shifted >= lowest


def check_verify(case: Case, inputs: Inputs, out: ptk.VerifyOutput) -> None:
    """Compare the first requests of ``verify`` with the reference, token for token."""
    requests = slice(0, _REQUESTS)
    _, expert, _ = (case.shaped(role)[requests] for role in inputs.logits)
    x = _combined(inputs.logits, expert.shape[0] * case.positions).view(expert.shape)
    params = case.params(expert.device).rows(requests)
    drafts, rejection = inputs.token_ids[requests], case.op == "verify-rejection"
    mode, draft_logits = ("rejection", expert[:, :-1].float()) if rejection else ("coupled", None)
    wanted = reference.verify(x, drafts, params, mode, draft_logits)
    got = ptk.VerifyOutput(*(values[requests] for values in out))
    for name in ("token_ids", "num_accepted", "status"):
        if not torch.equal(getattr(got, name), getattr(wanted, name)):
            raise AssertionError(
                f"{case}: ours has {name} {getattr(got, name).tolist()}, not "
                f"{getattr(wanted, name).tolist()}"
            )
    _close(case, "ours", got.logprobs, wanted.logprobs, ours=True)


def check_dense(case: Case, name: str, inputs: Inputs, got: Tensor, *, ours: bool = False) -> None:
    """Compare the first rows of ``score`` with an fp64 log-softmax, of ``combine`` bit by bit.

    At alpha 1 the combination is two roundings, the same everywhere.
    """
    x = _combined(inputs.logits, _ROWS)
    if case.op == "score":
        ids = inputs.token_ids.flatten()[: len(x)]
        wanted = x.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        _close(case, name, got.flatten()[: len(x)].double(), wanted, ours=ours)
    elif not torch.equal(got[: len(x)], x):
        raise AssertionError(f"{case}: {name} differs from the contract's combined logits")


def check_heads(
    case: Case, name: str, inputs: Inputs, params: ptk.RowParams, got: ptk.SampleOutput
) -> None:
    """Compare the first rows' raw logprobs with those of exact heads.

    Logits of others than ours went through bf16, 2^-9 of up to 32 a role, so that x is off by at
    most 3/16; a log-softmax moves by twice the largest error of x.
    """
    assert inputs.heads is not None
    x, error = exact_x(first_rows(inputs.heads, _HEADS_ROWS), case.vocab_size)
    rows = slice(0, len(x))
    exact = reference.distribution(x, params.rows(rows)).raw_logprobs()
    wanted = exact.gather(-1, got.token_ids[rows, None])[:, 0]
    off = (got.raw_logprobs[rows] - wanted).abs()
    rounding = 0.0 if name == "ours" else 3 / 16
    if not (off <= 2 * (error + rounding) + 1e-5).all():
        raise AssertionError(f"{case}: {name} has raw logprobs off by {off.tolist()}")


def _combined(logits: Logits, rows: int) -> Tensor:
    base, expert, anti = (role[:rows] for role in logits)
    alpha = torch.full((len(base),), ALPHA, device=base.device)
    return reference.combine(base, expert, anti, alpha)


def _close(case: Case, name: str, got: Tensor, wanted: Tensor, *, ours: bool) -> None:
    same = torch.isclose(got, wanted, rtol=0.0, atol=_LOGPROB_TOLERANCE[ours], equal_nan=True)
    if not same.all():
        off = (got - wanted).abs().nan_to_num(torch.inf).amax()
        raise AssertionError(f"{case}: {name} has logprobs off by {float(off):.3g}")


def check_sharded(device: str, backend: str, rows: int = 32, vocab_size: int = 32_003) -> int:
    """Draw as the only rank of a process group, and from the whole vocabulary; gives the rows.

    NCCL wants a device of its own for each rank. What several ranks draw between the collectives is
    in the contract suite (tests/ops/test_shard.py).
    """
    store = dist.HashStore()  # type: ignore[attr-defined]
    name = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(name, store=store, rank=0, world_size=1)
    try:
        shard = ptk.sharded.Shard.agree(0, vocab_size, device=device, backend=backend)
        for kind, filters in product(KINDS, FILTERS):
            case = OpCase(kind, "bfloat16", filters, vocab_size, rows)
            logits = make_logits(kind, rows, vocab_size, torch.bfloat16, device=device)
            params = case.row_params(device)
            wanted = ptk.sample(*logits, params, backend=backend)
            found = ptk.sharded.sample(*logits, params, shard=shard)
            for field_ in ("token_ids", "num_kept", "status"):
                if not torch.equal(getattr(found, field_), getattr(wanted, field_)):
                    raise AssertionError(f"{case}: sharded {field_} differ from the whole row's")
    finally:
        dist.destroy_process_group()
    return rows * len(KINDS) * len(FILTERS)
