"""What ncu and compute-sanitizer watch: a few calls of ours and little else.

``python -m benchmarks.gpu.driver profile PROVIDER FILTERS VOCAB_SIZE BATCH_SIZE`` calls ``sample``
once between the profiler's start and stop, on peaked logits that are in no cache.
``python -m benchmarks.gpu.driver sanitize`` calls every operator on small, awkward logits.
docs/benchmarks.md has the tools' command lines.
"""

from __future__ import annotations

import sys
from itertools import product

import torch

import proxytune_kernels as ptk
from benchmarks.gpu.cases import BACKENDS, Case, Inputs, make_inputs
from benchmarks.gpu.device import find_device
from benchmarks.gpu.peers import operator
from benchmarks.harness.samplers import FILTERS, KINDS, Logits, make_logits

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
    out = operator(case, inputs, params, backend=backend)  # compiles
    # Written last, it takes the place of the logits in L2.
    torch.empty(4 * device.l2_bytes, dtype=torch.uint8, device="cuda").fill_(1)
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        operator(case, inputs, params, backend=backend, out=out)
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
    ids = torch.zeros(_REQUESTS, _POSITIONS, dtype=torch.int64, device=device)
    cases = [
        Case(op, kind, filters, vocab_size, _REQUESTS, _POSITIONS)
        for op, filters in product(("verify", "verify-rejection"), FILTERS)
    ]
    cases += [Case("sample", kind, filters, vocab_size, len(rows[0])) for filters in FILTERS]
    for case in cases:
        inputs = Inputs(rows, ids[:, 1:] if case.op.startswith("verify") else ids)
        operator(case, inputs, case.params(device), backend=backend)
    if every:
        base, expert, anti = (role.view(_REQUESTS, _POSITIONS, -1) for role in rows)
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


if __name__ == "__main__":
    if sys.argv[1:] == ["sanitize"]:
        sanitize()
    else:
        what, provider, filters, vocab_size, batch_size = sys.argv[1:]
        if what != "profile":
            raise ValueError(f"the first argument must be profile or sanitize, got {what!r}")
        profile(provider, filters, int(vocab_size), int(batch_size))
