"""What ncu and compute-sanitizer watch: a few calls of ours and little else.

``python -m benchmarks.gpu.driver profile PROVIDER FILTERS VOCAB_SIZE BATCH_SIZE`` calls ``sample``
once between the profiler's start and stop, on peaked logits that are in no cache.
``python -m benchmarks.gpu.driver sanitize`` calls every operator on small, awkward logits.
"""

from __future__ import annotations

import sys
from itertools import product

import torch

import proxytune_kernels as ptk
from benchmarks.gpu.cases import BACKENDS, Case, make_inputs
from benchmarks.gpu.device import find_device
from benchmarks.harness.logits import FILTERS, KINDS, Logits, make_logits

_REQUESTS, _POSITIONS = 3, 3
_WIDTHS = {"ours": (1000, 4096), "cuda": (1000, 30_000, 70_001)}
"""Vocabularies by provider: ours fill a tile, or do not; CUDA C++'s take one block, two, and as
many as a cluster may have."""


def profile(provider: str, filters: str, vocab_size: int, batch_size: int) -> None:
    """One call of ``sample`` on logits in device memory, between the profiler's start and stop."""
    device, backend = find_device(), BACKENDS[provider]
    case = Case("sample", "peaked", filters, vocab_size, batch_size)
    [inputs] = make_inputs(case, 1)
    params = case.params("cuda")
    out = ptk.sample(*inputs.logits, params, backend=backend)  # compiles
    # Written last, it takes the place of the logits in L2.
    torch.empty(4 * device.l2_bytes, dtype=torch.uint8, device="cuda").fill_(1)
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        ptk.sample(*inputs.logits, params, backend=backend, out=out)
        torch.cuda.synchronize()


def awkward_logits(kind: str, rows: int, vocab_size: int, device: str) -> Logits:
    """Rows of a kind, among them one with ties, one with masked tokens, one with a NaN."""
    base, expert, anti = make_logits(kind, rows, vocab_size, torch.bfloat16, device=device)
    expert[0], anti[0] = 0, 0
    base[0] = base[0].round()
    base[1, : vocab_size // 2] = -torch.inf
    base[2, vocab_size // 3] = torch.nan
    return base, expert, anti


def call_operators(device: str, backend: str, vocab_size: int, kind: str, *, every: bool) -> None:
    """``sample`` and ``verify`` with each filter, and ``every`` other operator, once."""
    rows = awkward_logits(kind, _REQUESTS * _POSITIONS, vocab_size, device)
    base, expert, anti = (role.view(_REQUESTS, _POSITIONS, -1) for role in rows)
    ids = torch.zeros(_REQUESTS, _POSITIONS, dtype=torch.int64, device=device)
    for filters in FILTERS:
        params = Case("sample", kind, filters, vocab_size, _REQUESTS).params(device)
        first = [role[:_REQUESTS] for role in rows]
        ptk.sample(first[0], first[1], first[2], params, backend=backend)
        verified = (base, expert, anti, ids[:, 1:], params)
        ptk.verify(*verified, mode="coupled", backend=backend)
        draft_logits = expert[:, :-1]
        ptk.verify(*verified, mode="rejection", draft_logits=draft_logits, backend=backend)
    if every:
        ptk.score(base, expert, anti, ids, backend=backend)
        ptk.combine(*rows, backend=backend)


def sanitize() -> None:
    """Every operator, filter and kind once, in several widths; CUDA C++'s where it is usable."""
    find_device()
    for provider, backend in reversed(BACKENDS.items()):
        if ptk.backends()[backend] is None:
            for vocab_size, kind in product(_WIDTHS[provider], KINDS):
                call_operators("cuda", backend, vocab_size, kind, every=provider == "ours")
    torch.cuda.synchronize()


def main(arguments: list[str]) -> None:
    """Run what the arguments say."""
    if arguments == ["sanitize"]:
        sanitize()
        return
    what, provider, filters, vocab_size, batch_size = arguments
    if what != "profile":
        raise ValueError(f"the first argument must be profile or sanitize, got {what!r}")
    if provider not in BACKENDS:
        raise ValueError(f"the provider must be one of {tuple(BACKENDS)}, got {provider!r}")
    profile(provider, filters, int(vocab_size), int(batch_size))


if __name__ == "__main__":
    main(sys.argv[1:])
