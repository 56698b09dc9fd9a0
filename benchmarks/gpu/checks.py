"""Before anything is timed, each provider's results are held to the contract, on the timed inputs.

Ours: the first requests' tokens, counts and logprobs are the reference backend's. Peers: the
filtered distribution, where it can be had, by total variation distance as on the CPU, and their
draws: every token lies in the contract's kept set, and a thousand draws fall on the kept set's
parts as their mass says. A check raises AssertionError, which says what is wrong. The operators'
own tests on the device are tests/ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.gpu.cases import Case, Inputs
from benchmarks.harness.heads import check_heads
from benchmarks.harness.logits import (
    ALPHA,
    FILTERS,
    Logits,
    OpCase,
    Peer,
    check_outputs,
    check_peer,
    contract_distribution,
    ties_past_top_k,
)
from proxytune_kernels import reference

_ROWS = 32  # of a batch: rows are alike and independent
_DRAWS = 1024  # at least, over all rows
_PARTS = 16
_REQUESTS = 2  # the reference goes through verify's position by position
HEADS_ROWS = 4

# Probabilities summed in fp32 in blocks, V = 151,936: relative errors of about 18 roundings of
# 2^-24 in the sum, as much again in each term's exponential: 2e-6. Fifty times that, and still far
# from what a wrong filter does.
_SHARE_TOLERANCE = 1e-4
_SIGMAS, _SMALL_COUNT = 5.0, 5.0  # the second for parts that few draws are due from


@dataclass(frozen=True)
class Sampler:
    """One token id per row from the three roles' logits."""

    name: str
    sample: Callable[[Logits], Tensor]
    reseed: Callable[[int], object]
    """Makes the next call draw other numbers."""
    peer: Peer | None = None
    """Its two halves, where the filtered distribution can be had."""


def check_sampler(case: OpCase, sampler: Sampler, logits: Logits) -> None:
    """Hold a sampler to the contract's distribution of the first rows."""
    target = contract_distribution(case, logits, _ROWS)
    if sampler.peer is not None:
        check_peer(case, sampler.peer, logits, target)
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
        tokens.append(sampler.sample(logits)[:rows].long().clone())
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
    ranked = p.gather(-1, target.order)
    ranked_part = ((ranked.cumsum(-1) - ranked / 2) * _PARTS).long().clamp(max=_PARTS - 1)
    part = torch.empty_like(ranked_part).scatter_(-1, target.order, ranked_part)
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


def check_ours(
    case: Case,
    inputs: Inputs,
    params: ptk.RowParams,
    out: Any,
    expected: Callable[[Inputs, ptk.RowParams], Any],
) -> None:
    """Compare the first requests of an operator with what is expected of them alone."""
    if inputs.heads is not None:
        return check_heads(inputs.heads, case.vocab_size, params, out, HEADS_ROWS)
    requests, rows = slice(0, _REQUESTS), slice(0, _REQUESTS * case.positions)
    base, expert, anti = (role[rows] for role in inputs.logits)
    few = Inputs((base, expert, anti), inputs.token_ids[requests])
    return check_outputs(str(case), out, expected(few, params.rows(requests)))


def _combined(logits: Logits, rows: int) -> Tensor:
    base, expert, anti = (role[:rows] for role in logits)
    alpha = torch.full((len(base),), ALPHA, device=base.device)
    return reference.combine(base, expert, anti, alpha)
