"""What one provider's memory peaks at, in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.memory import PeakMemory
from benchmarks.prompts import make_prompts
from benchmarks.providers import PROVIDERS, Sampling
from benchmarks.trios import TrioForms


def provider_peaks(
    trio: str,
    dtype: str | None,
    provider: str,
    cases: Sequence[Sequence[int]],
    threads: int,
) -> list[dict[str, int]]:
    """Peak memory of a provider for each case (batch_size, prompt_length, output_length).

    Run it in a process of its own (:func:`benchmarks.memory.in_fresh_process`). The weights are
    loaded before, a one-token run has paged in the libraries, and each case starts with a new
    provider; ``extra_bytes`` is therefore the case's caches, temporaries and, on first use, packed
    weights. ``total_bytes`` is the whole process.
    """
    torch.set_num_threads(threads)
    forms, sampling = TrioForms.open(trio, dtype), Sampling()
    PROVIDERS[provider](forms, 1, 16, sampling).generate(make_prompts(forms.trio, 1, 8), 1)
    peaks = []
    for batch_size, prompt_length, output_length in cases:
        prompts = make_prompts(forms.trio, batch_size, prompt_length)
        with PeakMemory() as peak:
            made = PROVIDERS[provider](forms, batch_size, prompt_length + output_length, sampling)
            made.generate(prompts, output_length)
        del made
        peaks.append({"total_bytes": peak.total_bytes, "extra_bytes": peak.extra_bytes})
    return peaks
