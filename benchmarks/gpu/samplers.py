"""Peers in torch: the eager chain, what torch.compile makes of it, and transformers' warpers.

Nothing here synchronises, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import EAGER
from benchmarks.logits import Logits
from benchmarks.peers import ALPHA, Candidates, Filters, Peer, transformers_peer

MODES = ("default", "max-autotune-no-cudagraphs")
"""Modes of torch.compile that are tried; graphs are captured around all providers alike."""

# Every shape is compiled on its own; at the default limit of 8 torch would fall back to eager.
_RECOMPILES = 256


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


def race(candidates: Candidates) -> Tensor:
    """An exponential race: argmax of p / e. One pass, where multinomial checks its input first."""
    p: Tensor = candidates.probabilities
    column = (p / torch.empty_like(p).exponential_()).argmax(-1)
    if candidates.token_ids is None:
        return column
    return candidates.token_ids.gather(-1, column[:, None])[:, 0]


def _of_peer(peer: Peer) -> Sampler:
    return Sampler(peer.name, peer.sample, torch.manual_seed, peer)


def eager_sampler(filters: Filters) -> Sampler:
    """The chain, operation by operation."""
    return _of_peer(Peer(EAGER, lambda logits: eager_distribution(logits, filters), race))


def transformers_sampler(filters: Filters) -> Sampler:
    """What ``generate`` runs: the warpers, softmax, multinomial.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    return _of_peer(transformers_peer(filters))


def compiled_combination(temperature: float) -> Callable[[Logits], Tensor]:
    """``combine(logits) / temperature`` in one kernel, fp32 [rows, V]; compiled at each shape.

    For what follows a combination and takes logits: it then costs one read of the three roles and
    one write.
    """

    def combination(logits: Logits) -> Tensor:
        return combine(logits) / temperature

    torch._dynamo.config.recompile_limit = _RECOMPILES
    return torch.compile(combination, dynamic=False)


class Compiler:
    """torch.compile in the faster of its two modes, decided once for each kind of function."""

    def __init__(self) -> None:
        self._modes: dict[str, str] = {}
        self._tried: dict[str, dict[str, float]] = {}

    def compile(
        self, key: str, function: Callable[..., Any], probe: Callable[[Callable[..., Any]], float]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Compile ``function`` for the shapes it is then called with.

        Args:
            key: functions with the same key share a mode.
            function: what to compile.
            probe: seconds of the compiled function on this case's inputs.

        Returns:
            The compiled function, and its configuration for the results: the mode, and the seconds
            by which it was chosen.
        """
        if key not in self._modes:
            tried = {mode: probe(_compiled(function, mode)) for mode in MODES}
            self._tried[key] = tried
            self._modes[key] = min(tried, key=tried.__getitem__)
        mode = self._modes[key]
        microseconds = {m: 1e6 * seconds for m, seconds in self._tried[key].items()}
        return _compiled(function, mode), {"mode": mode, "mode_microseconds": microseconds}


def _compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = _RECOMPILES
    return torch.compile(function, mode=mode, dynamic=False)
