"""Peak memory, as the operating system counts it, in a process that does nothing else.

:func:`in_fresh_process` runs ``python -m benchmarks.harness.memory MODULE:FUNCTION JSON``.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.report import REPOSITORY

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs: peak resident size := resident size


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}: peak memory needs Linux")


class PeakMemory:
    """Context manager: highest resident size within, in bytes.

    ``total_bytes`` is the whole process (weights, libraries), ``extra_bytes`` what came on top of
    what was resident at entry. Freed memory that the allocator still held at entry is given back
    first, or reusing it would not show. The kernel batches its counts: good to about 0.3 MB.
    """

    total_bytes: int
    extra_bytes: int

    def __enter__(self) -> PeakMemory:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others return memory
        if trim is not None:
            trim(0)
        if not _CLEAR_REFS.exists():
            raise RuntimeError(f"{_CLEAR_REFS} is missing: peak memory needs Linux")
        _CLEAR_REFS.write_text(_RESET_PEAK)
        self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *raised: object) -> None:
        self.total_bytes = _status_bytes("VmHWM")
        self.extra_bytes = max(0, self.total_bytes - self._before)


def in_fresh_process(function: str, **arguments: Any) -> Any:
    """Call ``MODULE:FUNCTION`` with JSON arguments in a new interpreter; return its JSON result."""
    command = [sys.executable, "-m", "benchmarks.harness.memory", function, json.dumps(arguments)]
    # The new interpreter finds this package wherever it is started from.
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environ = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if done.returncode != 0:
        raise RuntimeError(
            f"measuring memory with {function} failed with exit code {done.returncode}: "
            f"{done.stderr.strip()[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    print("\n" + json.dumps(result))
