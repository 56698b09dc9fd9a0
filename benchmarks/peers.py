"""What ``sample`` is compared with: other ways to combine, filter and draw, each the best we know.

A peer has two halves: ``distribution`` gives the filtered distribution over candidates, ``draw`` a
token id from it. The first is what is compared before anything is timed; both are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.logits import Logits

ALPHA = 1.0


@dataclass(frozen=True)
class Filters:
    """Sampling parameters of a benchmark, the same for all rows."""

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0


class Candidates(NamedTuple):
    """A filtered distribution: probabilities [B, K], zero outside the kept set, not normalised.

    ``token_ids`` int64 [B, K] says which token each column is; None where the columns are the
    vocabulary.
    """

    probabilities: Any
    token_ids: Any


@dataclass(frozen=True)
class Peer:
    """A way to sample; both halves are bound to their filters."""

    name: str
    distribution: Callable[[Logits], Candidates]
    draw: Callable[[Candidates], Any]

    def sample(self, logits: Logits) -> Any:
        """One token id per row."""
        return self.draw(self.distribution(logits))


def combine(logits: Logits) -> Tensor:
    """Combined logits, fp32 [B, V], in the fewest operations torch has for it."""
    base, expert, anti = (x.float() for x in logits)
    return torch.add(base, expert - anti, alpha=ALPHA)


def softmax_only(logits: Logits) -> Tensor:
    """The yardstick: one softmax of the combination; it draws nothing."""
    base, expert, anti = logits
    return torch.softmax(base + (expert - anti), dim=-1)


def transformers_peer(filters: Filters) -> Peer:
    """The chain of transformers' ``generate``: combination, warpers, softmax, multinomial.

    Raises:
        ModuleNotFoundError: transformers is not installed; the other peers do without it.
    """
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain: list[Any] = [TemperatureLogitsWarper(filters.temperature)]
    if filters.top_k:
        chain.append(TopKLogitsWarper(filters.top_k))
    if filters.top_p < 1:
        chain.append(TopPLogitsWarper(filters.top_p))
    warpers = LogitsProcessorList(chain)
    no_ids: Any = None  # these warpers don't look at the text

    def distribution(logits: Logits) -> Candidates:
        base, expert, anti = (x.float() for x in logits)
        scores = base + ALPHA * (expert - anti)
        return Candidates(torch.softmax(warpers(no_ids, scores), dim=-1), None)

    def draw(candidates: Candidates) -> Tensor:
        return torch.multinomial(candidates.probabilities, num_samples=1)[:, 0]

    return Peer("transformers", distribution, draw)


_PREFILTER = 256  # likeliest tokens among which the top-p set is looked for first


def _torch_prefix(sorted_mass: Tensor, total: Tensor | float, filters: Filters) -> Tensor:
    """Zero what lies past the shortest prefix that holds top_p of the total."""
    before = sorted_mass.cumsum(-1) - sorted_mass
    return torch.where(before < filters.top_p * total, sorted_mass, 0.0)


def torch_distribution(logits: Logits, filters: Filters) -> Candidates:
    """The fewest torch operations that give the exact set.

    Without a filter no sort; with top_k only the k likeliest; with top_p the likeliest
    :data:`_PREFILTER` and, where they do not hold enough mass (a flat row), the whole row sorted.
    """
    x = combine(logits).div_(filters.temperature)
    mass = torch.softmax(x, dim=-1)
    if filters.top_k:
        top, ids = mass.topk(filters.top_k, dim=-1)
        return Candidates(_torch_prefix(top, top.sum(-1, keepdim=True), filters), ids)
    if filters.top_p >= 1:
        return Candidates(mass, None)
    top, ids = mass.topk(min(_PREFILTER, mass.shape[-1]), dim=-1)
    if not (top.sum(-1) >= filters.top_p).all():
        top, ids = mass.sort(dim=-1, descending=True)
    return Candidates(_torch_prefix(top, 1.0, filters), ids)


def torch_draw(candidates: Candidates) -> Tensor:
    """Inverse of the cumulative distribution; much cheaper than multinomial on a CPU."""
    cumulative = candidates.probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    column = torch.searchsorted(cumulative, total * (1 - torch.rand_like(total)))
    if candidates.token_ids is None:
        return column[:, 0]
    return candidates.token_ids.gather(-1, column)[:, 0]


def torch_peer(filters: Filters) -> Peer:
    """The best form in plain torch that we know."""
    return Peer("torch", lambda logits: torch_distribution(logits, filters), torch_draw)


def compiled_peer(filters: Filters) -> Peer:
    """``torch.compile`` of the plain torch form, draw included; for one case's shapes."""
    torch.compiler.reset()  # the shapes of earlier cases would count against the recompile limit
    distribution = torch.compile(lambda logits: torch_distribution(logits, filters), dynamic=False)
    return Peer("torch.compile", distribution, torch.compile(torch_draw, dynamic=False))


def numpy_distribution(logits: Logits, filters: Filters) -> Candidates:
    """In numpy: partition for the likeliest tokens; for a flat row, sort values, not indices.

    A flat row's cut is a value, so that tokens tied at it are all kept.
    """
    base, expert, anti = (x.float().numpy() for x in logits)
    x = expert - anti
    x *= ALPHA
    x += base
    x -= x.max(-1, keepdims=True)
    x /= filters.temperature
    mass = np.exp(x, out=x)
    if filters.top_k == 0 and filters.top_p >= 1:
        return Candidates(mass, None)
    size = filters.top_k or min(_PREFILTER, mass.shape[-1])
    ids = np.argpartition(mass, -size, axis=-1)[:, -size:]
    top = np.take_along_axis(mass, ids, axis=-1)
    order = np.argsort(-top, axis=-1)
    ids, top = np.take_along_axis(ids, order, axis=-1), np.take_along_axis(top, order, axis=-1)
    total = (top if filters.top_k else mass).sum(-1, keepdims=True, dtype=np.float64)
    if filters.top_k or (top.sum(-1, keepdims=True) >= filters.top_p * total).all():
        return Candidates(_numpy_prefix(top, total, filters), ids)
    rising = np.sort(mass, axis=-1)
    falling = _numpy_prefix(rising[:, ::-1], total, filters)
    lowest = np.take_along_axis(falling, (falling > 0).sum(-1, keepdims=True) - 1, axis=-1)
    return Candidates(np.where(mass >= lowest, mass, 0), None)


def _numpy_prefix(sorted_mass: Any, total: Any, filters: Filters) -> Any:
    before = sorted_mass.cumsum(-1, dtype=np.float64) - sorted_mass
    return np.where(before < filters.top_p * total, sorted_mass, 0)


def numpy_peer(filters: Filters) -> Peer:
    """The best form in numpy that we know."""
    generator = np.random.default_rng(0)

    def draw(candidates: Candidates) -> Any:
        cumulative = candidates.probabilities.cumsum(-1)
        targets = cumulative[:, -1] * (1 - generator.random(len(cumulative)))
        columns = [np.searchsorted(c, t) for c, t in zip(cumulative, targets, strict=True)]
        if candidates.token_ids is None:
            return np.array(columns)
        return candidates.token_ids[np.arange(len(columns)), columns]

    return Peer("numpy", lambda logits: numpy_distribution(logits, filters), draw)


PEERS: dict[str, Callable[[Filters], Peer]] = {
    "transformers": transformers_peer,
    "torch": torch_peer,
    "torch.compile": compiled_peer,
    "numpy": numpy_peer,
}
"""Peers by name, in the order of tables."""
