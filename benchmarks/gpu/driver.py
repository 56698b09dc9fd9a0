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
from benchmarks.gpu.cases import OURS, OWN, SAMPLE, Case, make_inputs
from benchmarks.gpu.device import Device, find_device
from benchmarks.logits import KINDS, Logits, make_logits
from benchmarks.op_cases import FILTERS

_REQUESTS, _POSITIONS = 3, 3
_VOCAB_SIZES = (1000, 4096)
"""Widths that fill a tile, and that do not."""
_CLUSTER_VOCAB_SIZES = (1000, 30_000, 70_001)
"""Of CUDA C++'s kernels: for one block, two, and as many as a cluster may have."""


def profile(device: Device, provider: str, filters: str, vocab_size: int, batch_size: int) -> None:
    """One call of ``sample`` on logits in device memory, between the profiler's start and stop."""
    case = Case(SAMPLE, "peaked", filters, vocab_size, batch_size)
    [inputs] = make_inputs(case, 1, device.torch_device, device.backend)
    params = case.params(device.torch_device)
    backend = device.backend if provider == OURS else device.cuda_backend
    out = ptk.sample(*inputs.logits, params, backend=backend)  # compiles
    # Written last, it takes the place of the logits in L2.
    torch.empty(4 * device.l2_bytes, dtype=torch.uint8, device=device.torch_device).fill_(1)
    device.synchronize()
    with torch.cuda.profiler.profile():
        ptk.sample(*inputs.logits, params, backend=backend, out=out)
        device.synchronize()


def awkward_logits(kind: str, rows: int, vocab_size: int, device: str) -> Logits:
    """Rows of a kind, among them one with ties, one with masked tokens, one with a NaN."""
    base, expert, anti = make_logits(kind, rows, vocab_size, torch.bfloat16, device=device)
    expert[0], anti[0] = 0, 0
    base[0] = base[0].round()
    base[1, : vocab_size // 2] = -torch.inf
    base[2, vocab_size // 3] = torch.nan
    return base, expert, anti


def sanitize(device: Device) -> None:
    """Every operator, filter and kind once, in several widths; CUDA C++'s where it is usable."""
    rows = _REQUESTS * _POSITIONS
    if ptk.backends()[device.cuda_backend] is None:
        for vocab_size, kind in product(_CLUSTER_VOCAB_SIZES, KINDS):
            logits = awkward_logits(kind, rows, vocab_size, device.torch_device)
            for filters in FILTERS:
                _sample_and_verify(device, logits, filters, device.cuda_backend)
    for vocab_size, kind in product(_VOCAB_SIZES, KINDS):
        logits = awkward_logits(kind, rows, vocab_size, device.torch_device)
        for filters in FILTERS:
            _sample_and_verify(device, logits, filters, device.backend)
        base, expert, anti = _shaped(logits)
        ids = torch.zeros(_REQUESTS, _POSITIONS, dtype=torch.int64, device=device.torch_device)
        ptk.score(base, expert, anti, ids, backend=device.backend)
        ptk.combine(*logits, backend=device.backend)
    device.synchronize()


def _shaped(logits: Logits) -> Logits:
    base, expert, anti = (role.view(_REQUESTS, _POSITIONS, -1) for role in logits)
    return base, expert, anti


def _sample_and_verify(device: Device, logits: Logits, filters: str, backend: str) -> None:
    base, expert, anti = (role[:_REQUESTS] for role in logits)
    case = Case(SAMPLE, "peaked", filters, base.shape[1], _REQUESTS)
    params = case.params(device.torch_device)
    ptk.sample(base, expert, anti, params, backend=backend)
    base, expert, anti = _shaped(logits)
    drafts = base.new_zeros(_REQUESTS, _POSITIONS - 1, dtype=torch.int64)
    for mode, draft_logits in (("coupled", None), ("rejection", expert[:, :-1])):
        ptk.verify(
            base,
            expert,
            anti,
            drafts,
            params,
            mode=mode,
            draft_logits=draft_logits,
            backend=backend,
        )


def main(arguments: list[str]) -> None:
    """Run what the arguments say."""
    device = find_device()
    if arguments == ["sanitize"]:
        sanitize(device)
        return
    what, provider, filters, vocab_size, batch_size = arguments
    if what != "profile":
        raise ValueError(f"the first argument must be profile or sanitize, got {what!r}")
    if provider not in OWN:
        raise ValueError(f"the provider must be one of {OWN}, got {provider!r}")
    profile(device, provider, filters, int(vocab_size), int(batch_size))


if __name__ == "__main__":
    main(sys.argv[1:])
