"""The trios that benchmarks decode with, by name, and what one provider's memory peaks at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.environment import REPOSITORY
from benchmarks.memory import PeakMemory
from benchmarks.prompts import make_prompts
from benchmarks.providers import PROVIDERS
from proxytune_kernels import Trio, load_trio

_QWEN = Path("trios") / "qwen"


class TrioMissing(ValueError):
    """The trio asked for is not there; says which command makes it."""


def find_trio(name: str) -> str:
    """What ``load_trio`` opens for ``shipped``, ``qwen`` or a directory.

    Raises:
        TrioMissing: it is not there.
    """
    if name == "shipped":
        shipped = REPOSITORY / "proxytune_kernels" / "data" / "trio" / "trio.json"
        if not shipped.is_file():
            raise TrioMissing("no shipped trio: make it with python scripts/train_trio.py")
        return "shipped"
    if name == "qwen":
        for directory in (_QWEN, REPOSITORY / _QWEN):
            if (directory / "trio.json").is_file():
                return str(directory)
        raise TrioMissing(f"no trio in {_QWEN}: make it with python scripts/qwen_trio.py")
    if not (Path(name) / "trio.json").is_file():
        raise TrioMissing(
            f"trio must be shipped, qwen or a directory with a trio.json, got {name!r}"
        )
    return name


def open_trio(name: str, dtype: str | None) -> Trio:
    """Load a trio; without a dtype the shipped one in fp32, others in their checkpoints' dtype."""
    disable_progress_bar()  # it would tear up ours
    if dtype is None:
        dtype = "float32" if name == "shipped" else "auto"
    return load_trio(find_trio(name), dtype=dtype)


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
    loaded = open_trio(trio, dtype)
    PROVIDERS[provider](loaded, 1, 16).generate(make_prompts(loaded, 1, 8), 1)
    peaks = []
    for batch_size, prompt_length, output_length in cases:
        prompts = make_prompts(loaded, batch_size, prompt_length)
        with PeakMemory() as peak:
            made = PROVIDERS[provider](loaded, batch_size, prompt_length + output_length)
            made.generate(prompts, output_length)
        del made
        peaks.append({"total_bytes": peak.total_bytes, "extra_bytes": peak.extra_bytes})
    return peaks
