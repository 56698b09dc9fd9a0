"""What is timed: our operators, the eager chain, torch.compile of it, transformers, FlashInfer.

None synchronises, so that a CUDA graph can hold it. FlashInfer, from its PyPI wheel, is optional
and compiles its kernels on first use, with nvcc, for a minute or more. Read against
flashinfer-python 0.7.2.post1, ``flashinfer/sampling.py``: everything takes fp32, seed and offset as
tensors for CUDA graphs, and top-k before top-p as in vLLM.

Before a peer is timed, what it draws is held to the contract, on the timed inputs: the filtered
distribution, where it can be had, by total variation distance as on the CPU, and the draws. A check
raises AssertionError, which says what is wrong. The operators' own tests on the device are
tests/ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.gpu.cases import BACKENDS, Case, Inputs
from benchmarks.harness import samplers
from benchmarks.harness.samplers import ALPHA, FILTERS, Candidates, Filters, Logits, OpCase, Peer
from proxytune_kernels import reference

# Every shape is compiled on its own; at the default limit of 8 torch would fall back to eager.
_RECOMPILES = 256
_COMPILE_MODE = "max-autotune-no-cudagraphs"  # graphs are captured around all providers alike
_REQUESTS = 2  # checked: the reference goes through verify's position by position
_HEADS_ROWS = 4
_ROWS = 32  # of a batch: rows are alike and independent
_DRAWS = 1024  # at least, over all rows
_PARTS = 16

# Probabilities summed in fp32 in blocks, V = 151,936: relative errors of about 18 roundings of
# 2^-24 in the sum, as much again in each term's exponential: 2e-6. Fifty times that, and still far
# from what a wrong filter does.
_SHARE_TOLERANCE = 1e-4
_SIGMAS, _SMALL_COUNT = 5.0, 5.0  # the second for parts that few draws are due from


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled for each shape alone."""
    torch._dynamo.config.recompile_limit = _RECOMPILES
    return torch.compile(function, mode=_COMPILE_MODE, dynamic=False)


# torch


def combine(logits: Logits) -> Tensor:
    """Combined logits, fp32 [rows, V], in three kernels: torch widens mixed operands on the fly."""
    base, expert, anti = logits
    return torch.add(base, expert - anti.float(), alpha=ALPHA)


def eager_distribution(logits: Logits, filters: Filters) -> Candidates:
    """The filtered distribution in the fewest torch operations that need no host.

    A top-k first where there is one; else a sort of the row for top_p, as vLLM's native sampler.
    """
    x = combine(logits).div_(filters.temperature)
    if filters.top_k:
        top, ids = x.topk(min(filters.top_k, x.shape[-1]), dim=-1)
    elif filters.top_p < 1:
        top, ids = x.sort(dim=-1, descending=True)
    else:
        return Candidates(x.softmax(-1), None)
    return Candidates(samplers.top_p_prefix(top.softmax(-1), 1.0, filters.top_p), ids)


def draw_by_exponentials(candidates: Candidates) -> Tensor:
    """Argmax of p / e, e exponential: one pass, where multinomial checks its input first."""
    p: Tensor = candidates.probabilities
    return candidates.tokens((p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))


def eager_peer(filters: Filters) -> Peer:
    """The chain, operation by operation."""
    distribution = partial(eager_distribution, filters=filters)
    return Peer.of("eager", distribution, draw_by_exponentials)


def accept(token_ids: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Verification by draws at every position: keep drafts while they are what was drawn.

    Args:
        token_ids: [B * (k + 1)], drawn at each position.
        drafts: [B, k].

    Returns:
        The tokens to emit, [B, k + 1], -1 past the last, and how many are drafts, [B].
    """
    drawn = token_ids.view(drafts.shape[0], -1)
    accepted = (drawn[:, :-1] == drafts).cumprod(-1).sum(-1)
    positions = torch.arange(drawn.shape[1], device=drawn.device)
    return drawn.masked_fill(positions > accepted[:, None], -1), accepted


# FlashInfer


def flashinfer_peer(filters: Filters, device: torch.device) -> Peer:
    """The combination compiled into one kernel, temperature included; then FlashInfer.

    Each filter by the function that FlashInfer's documentation names for it. Filters are scalars,
    which is the faster of the two forms.
    """
    sampling = import_module("flashinfer.sampling")
    seed, offset = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
    scaled = compiled(lambda logits: combine(logits) / filters.temperature)

    def sample(logits: Logits) -> Tensor:
        x, noise = scaled(logits), {"seed": seed, "offset": offset}
        tokens: Tensor
        if filters.top_k:
            k, p = filters.top_k, filters.top_p
            tokens = sampling.top_k_top_p_sampling_from_logits(x, k, p, **noise)
        elif filters.top_p < 1:
            probabilities = sampling.softmax(x)
            tokens = sampling.top_p_sampling_from_probs(probabilities, filters.top_p, **noise)
        else:
            tokens = sampling.sampling_from_logits(x, **noise)
        return tokens

    return Peer("flashinfer", sample, reseed=seed.fill_)


PEERS: Mapping[str, Callable[[Filters, torch.device], Peer]] = {
    "eager": lambda filters, _: eager_peer(filters),
    "torch.compile": lambda filters, _: Peer("torch.compile", compiled(eager_peer(filters).sample)),
    "transformers": lambda filters, _: samplers.transformers_peer(filters),
    "flashinfer": flashinfer_peer,
}


def absent() -> dict[str, str]:
    """Providers that can't run here, with the reason."""
    reasons = {
        "cuda": ptk.backends()[BACKENDS["cuda"]],
        "transformers": None if find_spec("transformers") else "transformers is not installed",
        "flashinfer": None if find_spec("flashinfer") else "flashinfer-python is not installed",
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


# The checks


def check_sampler(case: OpCase, peer: Peer, logits: Logits) -> None:
    """Hold a peer to the contract's distribution of the first rows."""
    target = samplers.contract_distribution(case, logits, _ROWS)
    samplers.check_peer(case, peer, logits, target)
    check_draws(case, peer, logits, target)


def check_draws(case: OpCase, peer: Peer, logits: Logits, target: reference.Distribution) -> None:
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
        peer.reseed(n)
        tokens.append(peer.sample(logits)[:rows].long().clone())
    drawn = torch.stack(tokens, dim=1)
    inside = (drawn >= 0) & (drawn < case.vocab_size)
    allowed = inside & _allowed(case, logits, target).gather(-1, drawn * inside)
    if not allowed.all():
        row, column = (int(i) for i in (~allowed).nonzero()[0])
        raise AssertionError(
            f"{case}: {peer.name} draws token {int(drawn[row, column])} in row {row}, which is "
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
            f"{case}: {peer.name} draws {got.tolist()} times from {_PARTS} parts of the kept "
            f"set, likeliest first, where {[round(n) for n in wanted.tolist()]} are due"
        )


def _allowed(case: OpCase, logits: Logits, target: reference.Distribution) -> Tensor:
    """Tokens a sampler may draw, bool [rows, V]: the kept set and what rounding may add."""
    rows = len(target.kept)
    params = case.row_params(logits[0].device).rows(slice(0, rows))
    top_p = FILTERS[case.filters].top_p
    if top_p < 1:
        params.top_p.fill_(min(1.0, top_p + _SHARE_TOLERANCE))
        extra, _ = samplers.ties_past_top_k(case, target)
        params.top_k.add_(extra.int())
        base, expert, anti = (role[:rows] for role in logits)
        x = reference.combine(base, expert, anti, params.alpha)
        target = reference.distribution(x, params)
    lowest = target.shifted.masked_fill(~target.kept, torch.inf).amin(-1, keepdim=True)
    return target.shifted >= lowest


# Ours, and all of them


class Prepared(NamedTuple):
    """What to time, and how to tell that it is right: ``check`` raises AssertionError."""

    call: Callable[[Inputs], Any]
    check: Callable[[Inputs], None]


def operator(case: Case, inputs: Inputs, params: ptk.RowParams, **given: Any) -> Any:
    """Call the case's operator; ``given`` is its backend, and outputs to write to."""
    if inputs.heads is not None:
        return ptk.sample_hidden(*inputs.heads, params=params, **given)
    base, expert, anti = map(case.shaped, inputs.logits)
    if case.op == "sample":
        return ptk.sample(base, expert, anti, params, **given)
    if case.op == "verify-rejection":
        given |= {"mode": "rejection", "draft_logits": expert[:, :-1]}
    return ptk.verify(base, expert, anti, inputs.token_ids, params, **given)


def check_ours(case: Case, inputs: Inputs, params: ptk.RowParams, out: Any) -> None:
    """Hold the first requests to the reference backend's: tokens, counts and logprobs."""
    requests, rows = slice(0, _REQUESTS), slice(0, _REQUESTS * case.positions)
    base, expert, anti = (role[rows] for role in inputs.logits)
    few = Inputs((base, expert, anti), inputs.token_ids[requests])
    wanted = operator(case, few, params.rows(requests), backend="reference")
    samplers.check_outputs(str(case), out, wanted)


def prepare(
    case: Case, name: str, inputs: Inputs, backends: Mapping[str, str] = BACKENDS
) -> Prepared:
    """A provider for a case, given one set of inputs to allocate outputs by; may compile."""
    device, ours = inputs.token_ids.device, name in backends
    params = case.params(device)
    given: dict[str, Any] = {"backend": backends.get(name, backends["ours"])}
    if ours:
        given["out"] = operator(case, inputs, params, **given)
    peer = PEERS["eager" if ours else name](FILTERS[case.filters], device)

    def call(i: Inputs) -> Any:
        if ours:
            return operator(case, i, params, **given)
        if i.heads is not None:  # a peer is three products and our sample
            return ptk.sample(*samplers.logits_apart(i.heads, case.vocab_size), params, **given)
        drawn = peer.sample(i.logits)
        return drawn if case.op == "sample" else accept(drawn, i.token_ids)

    def check(i: Inputs) -> None:
        if i.heads is not None:
            # Logits went through bf16, 2^-9 of up to 32 a role, so that x is off by at most 3/16.
            rounding = 0.0 if ours else 3 / 16
            samplers.check_heads(i.heads, case.vocab_size, params, call(i), _HEADS_ROWS, rounding)
        elif ours:
            check_ours(case, i, params, call(i))
        else:
            check_sampler(case.as_rows, peer, i.logits)

    return Prepared(call, check)
