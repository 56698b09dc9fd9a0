"""Cases of the operator benchmark, what runs on each, and the check that all of it agrees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.logits import KINDS, Logits, make_logits
from benchmarks.peers import ALPHA, PEERS, Candidates, Filters, Peer, softmax_only
from proxytune_kernels import reference

VOCAB_SIZES = (32_000, 128_256, 151_936)
BATCH_SIZES = (1, 8, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FILTERS = {
    "none": Filters(),
    "top_p": Filters(top_p=0.9),
    "top_k+top_p": Filters(top_k=50, top_p=0.9),
}
OURS, YARDSTICK = "ours", "softmax only"
PROVIDERS = (OURS, YARDSTICK, *PEERS)

_CHECKED_ROWS = 2  # rows are alike and independent; the oracle sorts each in fp64
# fp32 logprobs of at most 20 nats, two roundings of 2^-24 each way, and the op's own exp and log:
# 20 * 2^-24 * 4 is 5e-6; twice that.
_LOGPROB_TOLERANCE = 1e-5


@dataclass(frozen=True)
class OpCase:
    """One shape and kind of logits with its filters; see :mod:`benchmarks.logits`."""

    kind: str = "peaked"
    dtype: str = "float32"
    filters: str = "top_p"
    vocab_size: int = 128_256
    batch_size: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype} {self.filters} V={self.vocab_size} B={self.batch_size}"

    @property
    def logits_bytes(self) -> int:
        """Bytes of the three roles' logits, each read once."""
        return 3 * self.batch_size * self.vocab_size * DTYPES[self.dtype].itemsize

    def logits(self, seed: int = 0) -> Logits:
        """Rows of this case; another seed gives other rows."""
        return make_logits(self.kind, self.batch_size, self.vocab_size, DTYPES[self.dtype], seed)

    def row_params(self, device: torch.device | str = "cpu") -> ptk.RowParams:
        """The filters as prepared parameters."""
        filters = FILTERS[self.filters]
        return ptk.RowParams.make(
            self.batch_size,
            device=device,
            alpha=ALPHA,
            temperature=filters.temperature,
            top_k=filters.top_k,
            top_p=filters.top_p,
            seed=torch.arange(self.batch_size),
        )


DEFAULT_CASES = (
    OpCase(),
    OpCase(dtype="bfloat16"),
    OpCase(kind="flat"),
    OpCase(kind="flat", dtype="bfloat16"),
    OpCase(filters="none"),
    OpCase(filters="top_k+top_p"),
    OpCase(vocab_size=32_000),
    OpCase(vocab_size=151_936),
    OpCase(batch_size=8),
    OpCase(batch_size=64),
)
"""A representative subset, each axis varied on its own."""

ALL_CASES = tuple(
    OpCase(*axes) for axes in product(KINDS, DTYPES, FILTERS, VOCAB_SIZES, BATCH_SIZES)
)
"""Every combination."""


def make_calls(
    case: OpCase, providers: Sequence[str], buffers: int
) -> dict[str, Callable[[], object]]:
    """What to time, by provider, after checking that each gives the distribution of the contract.

    Args:
        case: the work.
        providers: of :data:`PROVIDERS`.
        buffers: sets of logits that each provider goes through in turn, so that no row's branches
            are learnt by heart; large batches have rows enough and use one.

    Raises:
        AssertionError: a provider is wrong.
    """
    sets = [case.logits(seed) for seed in range(buffers if case.batch_size < 8 else 1)]
    target = contract_distribution(case, sets[0])
    calls: dict[str, Callable[[], object]] = {}
    for name in providers:
        if name == OURS:
            check_ours(case, sets[0], target)
            calls[name] = _turning(_ours(case), sets)
        elif name == YARDSTICK:
            calls[name] = _turning(softmax_only, sets)
        else:
            peer = PEERS[name](FILTERS[case.filters])
            check_peer(case, peer, sets[0], target)
            calls[name] = _turning(peer.sample, sets)
    return calls


def _ours(case: OpCase) -> Callable[[Logits], object]:
    params = case.row_params()
    return lambda logits: ptk.sample(*logits, params)


def _turning(call: Callable[[Logits], object], sets: Sequence[Logits]) -> Callable[[], object]:
    turn = cycle(sets)
    return lambda: call(next(turn))


def contract_distribution(
    case: OpCase, logits: Logits, rows: int = _CHECKED_ROWS
) -> reference.Distribution:
    """The contract's distribution of the first rows, in fp64, where the logits are."""
    base, expert, anti = (x[:rows] for x in logits)
    params = case.row_params(base.device).rows(slice(0, rows))
    return reference.distribution(reference.combine(base, expert, anti, params.alpha), params)


def check_ours(
    case: OpCase, logits: Logits, target: reference.Distribution, backend: str | None = None
) -> None:
    """Compare ``ptk.sample``'s kept sets and logprobs with the contract's.

    Raises:
        AssertionError: they differ.
    """
    out = ptk.sample(*logits, case.row_params(logits[0].device), backend=backend)
    rows = len(target.kept)
    tokens = out.token_ids[:rows, None]
    kept = target.kept.sum(-1).int()
    if not torch.equal(out.num_kept[:rows], kept):
        raise AssertionError(
            f"{case}: ours keeps {out.num_kept[:rows].tolist()}, not {kept.tolist()}"
        )
    off = (target.logprobs().gather(-1, tokens)[:, 0] - out.logprobs[:rows]).abs().max()
    if not off <= _LOGPROB_TOLERANCE:  # infinite where the token is not kept
        raise AssertionError(f"{case}: ours has logprobs off by {float(off):.3g}")


def check_peer(case: OpCase, peer: Peer, logits: Logits, target: reference.Distribution) -> None:
    """Compare a peer's distribution with the contract's, by total variation distance.

    Three things may differ, and bound the distance allowed: where the cut falls, by the error of
    summing V fp32 masses one after another, V * 2^-24; which of the tokens tied at the cut are
    kept, which the contract settles by id and the peers leave open; and whether all that are tied
    with the last of top_k are kept, as transformers does: that adds their mass, and moves the cut
    of top_p by as much and one token.

    Raises:
        AssertionError: the distance is larger.
    """
    wanted = target.logprobs().exp().masked_fill(~target.kept, 0.0)
    probabilities, ids = peer.distribution(logits)
    rows = len(wanted)
    first = Candidates(probabilities[:rows], None if ids is None else ids[:rows])
    got = dense(first, case.vocab_size)
    distance = (got - wanted).abs().sum(-1) / 2
    lowest = target.shifted.masked_fill(~target.kept, torch.inf).amin(-1, keepdim=True)
    ties = (target.shifted == lowest).sum(-1) - 1
    extra, share = ties_past_top_k(case, target)
    smallest = wanted.masked_fill(~target.kept, torch.inf).amin(-1)
    allowed = case.vocab_size * 2.0**-24 + ties * smallest
    allowed += 2 * extra * share + (extra > 0) * smallest
    if not (distance <= allowed).all():
        raise AssertionError(
            f"{case}: {peer.name} differs from the contract by {distance.tolist()} in total "
            f"variation, more than {allowed.tolist()}"
        )


def ties_past_top_k(case: OpCase, target: reference.Distribution) -> tuple[Tensor, Tensor]:
    """Tokens past the first top_k that are tied with the last of them, by row.

    Returns:
        How many, and the mass of each as a share of the top_k's, fp64 [rows]; 0 without a top_k.
    """
    k = FILTERS[case.filters].top_k
    if not k:
        none = target.scaled.new_zeros(len(target.kept))
        return none, none
    top = target.scaled.topk(k, dim=-1).values
    last = top[:, -1:]
    extra = (target.scaled == last).sum(-1) - (top == last).sum(-1)
    return extra.double(), last[:, 0].exp() / top.exp().sum(-1)


def dense(candidates: Candidates, vocab_size: int) -> Tensor:
    """Candidates as normalised probabilities, fp64 [B, V]."""
    mass: Tensor = torch.as_tensor(candidates.probabilities).double()
    mass = mass / mass.sum(-1, keepdim=True)
    if candidates.token_ids is None:
        return mass
    ids: Any = torch.as_tensor(candidates.token_ids)
    return mass.new_zeros(len(mass), vocab_size).scatter_(-1, ids, mass)
