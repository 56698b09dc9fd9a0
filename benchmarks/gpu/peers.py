"""What is timed: our operators, the eager chain, torch.compile of it, transformers, FlashInfer.

None synchronises, so that a CUDA graph can hold it. FlashInfer, from its PyPI wheel, is optional
and compiles its kernels on first use, with nvcc, for a minute or more. Read against
flashinfer-python 0.7.2.post1, ``flashinfer/sampling.py``: everything takes fp32, seed and offset as
tensors for CUDA graphs, and top-k before top-p as in vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.gpu import checks
from benchmarks.gpu.cases import BACKENDS, Case, Inputs
from benchmarks.gpu.checks import Sampler
from benchmarks.harness.heads import check_heads, logits_apart
from benchmarks.harness.logits import (
    ALPHA,
    FILTERS,
    Candidates,
    Filters,
    Logits,
    Peer,
    transformers_peer,
)

# Every shape is compiled on its own; at the default limit of 8 torch would fall back to eager.
_RECOMPILES = 256
_COMPILE_MODE = "max-autotune-no-cudagraphs"  # graphs are captured around all providers alike
_FLASHINFER = "flashinfer-python"


class Prepared(NamedTuple):
    """What to time, and how to tell that it is right: ``check`` raises AssertionError."""

    call: Callable[[Inputs], Any]
    check: Callable[[Inputs], None]


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
    mass = top.softmax(-1)
    before = mass.cumsum(-1) - mass
    return Candidates(torch.where(before < filters.top_p, mass, 0.0), ids)


def draw_by_exponentials(candidates: Candidates) -> Tensor:
    """Argmax of p / e, e exponential: one pass, where multinomial checks its input first."""
    p: Tensor = candidates.probabilities
    column = (p / torch.empty_like(p).exponential_()).argmax(-1)
    if candidates.token_ids is None:
        return column
    return candidates.token_ids.gather(-1, column[:, None])[:, 0]


def eager_peer(filters: Filters) -> Peer:
    """The chain, operation by operation."""
    return Peer("eager", lambda logits: eager_distribution(logits, filters), draw_by_exponentials)


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


def flashinfer_sampler(filters: Filters, device: torch.device) -> Sampler:
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

    return Sampler("flashinfer", sample, seed.fill_)


def _compiled_sampler(filters: Filters, device: torch.device) -> Sampler:
    return Sampler("torch.compile", compiled(eager_peer(filters).sample), torch.manual_seed)


def _of_peer(make: Callable[[Filters], Peer]) -> Callable[[Filters, torch.device], Sampler]:
    def sampler(filters: Filters, device: torch.device) -> Sampler:
        peer = make(filters)
        return Sampler(peer.name, peer.sample, torch.manual_seed, peer)

    return sampler


SAMPLERS: Mapping[str, Callable[[Filters, torch.device], Sampler]] = {
    "eager": _of_peer(eager_peer),
    "torch.compile": _compiled_sampler,
    "transformers": _of_peer(transformers_peer),
    "flashinfer": flashinfer_sampler,
}


def absent() -> dict[str, str]:
    """Providers that can't run here, with the reason."""
    reasons = {
        "cuda": ptk.backends()[BACKENDS["cuda"]],
        "transformers": None if find_spec("transformers") else "transformers is not installed",
        "flashinfer": None if find_spec("flashinfer") else f"{_FLASHINFER} is not installed",
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


# Ours, and all of them


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


def prepare(
    case: Case, name: str, inputs: Inputs, backends: Mapping[str, str] = BACKENDS
) -> Prepared:
    """A provider for a case, given one set of inputs to allocate outputs by; may compile."""
    device, filters = inputs.token_ids.device, FILTERS[case.filters]
    params = case.params(device)
    if name in backends:
        given: dict[str, Any] = {"backend": backends[name]}
        given["out"] = operator(case, inputs, params, **given)

        def call(i: Inputs) -> Any:
            return operator(case, i, params, **given)

        def expected(i: Inputs, few: ptk.RowParams) -> Any:
            return operator(case, i, few, backend="reference")

        return Prepared(call, lambda i: checks.check_ours(case, i, params, call(i), expected))
    if case.op == "sample_hidden":

        def call_heads(i: Inputs) -> ptk.SampleOutput:
            assert i.heads is not None
            return ptk.sample(
                *logits_apart(i.heads, case.vocab_size), params, backend=backends["ours"]
            )

        def check(i: Inputs) -> None:
            # Logits went through bf16, 2^-9 of up to 32 a role, so that x is off by at most 3/16.
            assert i.heads is not None
            out, rows = call_heads(i), checks.HEADS_ROWS
            check_heads(i.heads, case.vocab_size, params, out, rows, rounding=3 / 16)

        return Prepared(call_heads, check)
    sampler = SAMPLERS[name](filters, device)

    def draw(i: Inputs) -> Any:
        drawn = sampler.sample(i.logits)
        return drawn if case.op == "sample" else accept(drawn, i.token_ids)

    return Prepared(draw, lambda i: checks.check_sampler(case.as_rows, sampler, i.logits))
