"""Before anything is timed, each provider's results are held to the contract, on the timed inputs.

What can be compared depends on the provider:

- with its filtered distribution at hand (eager, transformers): total variation distance from the
  contract's, as on the CPU (:func:`benchmarks.op_cases.check_peer`);
- with draws only (torch.compile, FlashInfer, ours): every token lies in the contract's kept set,
  and a thousand draws fall on the kept set's parts as their mass says;
- ours besides: exactly the contract's number of kept tokens, and its logprob of each token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.gpu.cases import REJECTION, Case, Inputs
from benchmarks.gpu.samplers import Sampler
from benchmarks.logits import Logits
from benchmarks.op_cases import (
    FILTERS,
    OpCase,
    check_ours,
    check_peer,
    contract_distribution,
    ties_past_top_k,
)
from benchmarks.peers import ALPHA
from proxytune_kernels import reference

_ROWS = 32  # of a batch: rows are alike and independent
_DRAWS = 1024  # at least, over all rows
_PARTS = 16
_REQUESTS = 2  # of verify: the reference goes through them position by position

# Probabilities summed in fp32 in blocks, V = 151,936: relative errors of about 18 roundings of
# 2^-24 in the sum, as much again in each term's exponential: 2e-6. Fifty times that, and still far
# from what a wrong filter does.
_SHARE_TOLERANCE = 1e-4
_SIGMAS, _SMALL_COUNT = 5.0, 5.0  # the second for parts that few draws are due from
# fp32 log-softmax: logits up to about 30, an exponential and a sum each good to about 1e-6.
_LOGPROB_TOLERANCE = {True: 1e-5, False: 1e-4}  # by whether it is ours, which promises more


def check_sampler(case: OpCase, sampler: Sampler, logits: Logits) -> None:
    """Hold a sampler to the contract's distribution of the first rows.

    Raises:
        AssertionError: it draws from another.
    """
    target = contract_distribution(case, logits, _ROWS)
    if sampler.peer is not None:
        check_peer(case, sampler.peer, logits, target)
    check_draws(case, sampler, logits, target)


def check_own_sampler(case: OpCase, sampler: Sampler, logits: Logits, backend: str) -> None:
    """The same for ours, with what it says of its draws.

    Raises:
        AssertionError: a kept set, a logprob or a draw is wrong.
    """
    target = contract_distribution(case, logits, _ROWS)
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

    Raises:
        AssertionError: they disagree.
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
    base, expert, anti = (role[:rows] for role in logits)
    params = case.row_params(base.device).rows(slice(0, rows))
    top_p = FILTERS[case.filters].top_p
    if top_p < 1:
        params.top_p.fill_(min(1.0, top_p + _SHARE_TOLERANCE))
        extra, _ = ties_past_top_k(case, target)
        params.top_k.add_(extra.int())
        x = reference.combine(base, expert, anti, params.alpha)
        target = reference.distribution(x, params)
    lowest = target.shifted.masked_fill(~target.kept, torch.inf).amin(-1, keepdim=True)
    return target.shifted >= lowest


def check_verify(case: Case, inputs: Inputs, out: ptk.VerifyOutput) -> None:
    """Compare the first requests of ``verify`` with the reference, token for token.

    Raises:
        AssertionError: tokens, acceptances or logprobs differ.
    """
    shape = (case.batch_size, case.positions, -1)
    base, expert, anti = (role.view(shape)[:_REQUESTS] for role in inputs.logits)
    device = str(base.device)
    params = case.params(device).rows(slice(0, _REQUESTS))
    alphas = params.alpha.repeat_interleave(case.positions)
    x = reference.combine(base.flatten(0, 1), expert.flatten(0, 1), anti.flatten(0, 1), alphas)
    rejection = case.op == REJECTION
    wanted = reference.verify(
        x.view(base.shape),
        inputs.token_ids[:_REQUESTS],
        params,
        "rejection" if rejection else "coupled",
        expert[:, :-1].float() if rejection else None,
    )
    got = ptk.VerifyOutput(*(values[:_REQUESTS] for values in out))
    for name in ("token_ids", "num_accepted", "status"):
        if not torch.equal(getattr(got, name), getattr(wanted, name)):
            raise AssertionError(
                f"{case}: ours has {name} {getattr(got, name).tolist()}, not "
                f"{getattr(wanted, name).tolist()}"
            )
    _close(case, "ours", got.logprobs, wanted.logprobs, ours=True)


def check_score(case: Case, name: str, inputs: Inputs, got: Tensor, *, ours: bool) -> None:
    """Compare the first scores with an fp64 log-softmax.

    Raises:
        AssertionError: they differ by more than fp32 explains.
    """
    ids = inputs.token_ids.flatten()[:_ROWS]
    x = _combined(inputs.logits, len(ids))
    wanted = x.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    _close(case, name, got.flatten()[:_ROWS].double(), wanted, ours=ours)


def check_combine(case: Case, name: str, inputs: Inputs, got: Tensor) -> None:
    """Compare the first rows of combined logits: at alpha 1 two roundings, the same everywhere.

    Raises:
        AssertionError: they differ at all.
    """
    wanted = _combined(inputs.logits, _ROWS)
    if not torch.equal(got[:_ROWS], wanted):
        raise AssertionError(f"{case}: {name} differs from the contract's combined logits")


def _combined(logits: Logits, rows: int) -> Tensor:
    base, expert, anti = (role[:rows] for role in logits)
    alpha = torch.full((len(base),), ALPHA, device=base.device)
    return reference.combine(base, expert, anti, alpha)


def _close(case: Case, name: str, got: Tensor, wanted: Tensor, *, ours: bool) -> None:
    same = torch.isclose(got, wanted, rtol=0.0, atol=_LOGPROB_TOLERANCE[ours], equal_nan=True)
    if not same.all():
        off = (got - wanted).abs().nan_to_num(torch.inf).amax()
        raise AssertionError(f"{case}: {name} has logprobs off by {float(off):.3g}")
