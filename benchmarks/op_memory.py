"""Peak memory of the operators; each function runs in a process of its own."""

from __future__ import annotations

import torch

import proxytune_kernels as ptk
from benchmarks.logits import make_logits
from benchmarks.memory import PeakMemory
from benchmarks.op_cases import DTYPES, OpCase


def sample_peak(batch_size: int, vocab_size: int, dtype: str, threads: int) -> dict[str, int]:
    """Extra bytes of one ``ptk.sample`` (peaked, top_p 0.9), outputs included."""
    torch.set_num_threads(threads)
    case = OpCase(dtype=dtype, vocab_size=vocab_size, batch_size=batch_size)
    small = OpCase(dtype=dtype, vocab_size=64, batch_size=batch_size)
    ptk.sample(*small.logits(), small.row_params())  # pages the code in, starts the threads
    logits, params = case.logits(), case.row_params()
    with PeakMemory() as peak:
        ptk.sample(*logits, params)
    return {
        "extra_bytes": peak.extra_bytes,
        "row_bytes": 4 * vocab_size,
        "logits_bytes": case.logits_bytes,
    }


def score_peak(tokens: int, vocab_size: int, dtype: str, threads: int) -> dict[str, int]:
    """Extra bytes of one ``ptk.score`` over [1, tokens, vocab_size], output included."""
    torch.set_num_threads(threads)
    ids = torch.arange(tokens)[None]
    tiny = torch.zeros(1, tokens, tokens, dtype=DTYPES[dtype])
    ptk.score(tiny, tiny, tiny, ids)
    base, expert, anti = (x[None] for x in make_logits("flat", tokens, vocab_size, DTYPES[dtype]))
    with PeakMemory() as peak:
        ptk.score(base, expert, anti, ids)
    return {
        "extra_bytes": peak.extra_bytes,
        "row_bytes": 4 * vocab_size,
        "logits_bytes": 3 * base.numel() * base.element_size(),
    }


def control_peak(vocab_size: int) -> dict[str, int]:
    """Extra bytes measured while one fp32 row is written: what this way of measuring can tell."""
    torch.ones(64)  # pages the code in
    with PeakMemory() as peak:
        torch.ones(vocab_size)
    return {"extra_bytes": peak.extra_bytes, "row_bytes": 4 * vocab_size}
