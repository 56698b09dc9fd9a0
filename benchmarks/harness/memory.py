"""Peak memory, as the operating system counts it, in a process that does nothing else."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs: peak resident size := resident size


def _status_bytes(field: str) -> int:
    [line] = (x for x in _STATUS.read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak_memory(run: Callable[[], object]) -> dict[str, int]:
    """Highest resident size during a call, in bytes.

    ``total_bytes`` is the whole process (weights, libraries), ``extra_bytes`` what came on top of
    what was resident before. Freed memory that the allocator still held is given back first, or
    reusing it would not show. The kernel batches its counts: good to about 0.3 MB.
    """
    if not _CLEAR_REFS.exists():
        raise RuntimeError(f"{_CLEAR_REFS} is missing: peak memory needs Linux")
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others return memory
    if trim is not None:
        trim(0)
    _CLEAR_REFS.write_text(_RESET_PEAK)
    before = _status_bytes("VmRSS")
    run()
    total = _status_bytes("VmHWM")
    return {"total_bytes": total, "extra_bytes": max(0, total - before)}


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a module's function in a new interpreter; return its result."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
