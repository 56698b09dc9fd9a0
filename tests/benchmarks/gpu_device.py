"""A processor in the place of a GPU: for tests of the flow, its times mean nothing."""

from __future__ import annotations

import time
from typing import Any

import proxytune_kernels as ptk
from benchmarks.gpu.device import CannotCapture


class CpuDevice:
    """See :class:`benchmarks.gpu.device.Device`.

    ``not_captured`` names calls that can't be captured, by a part of their repr; ``lost`` makes
    every later synchronisation fail.
    """

    name = "NVIDIA Test 1 (GB)"
    torch_device = "cpu"
    backend = "cpu" if ptk.backends()["cpu"] is None else "reference"
    cuda_backend = backend
    l2_bytes = 10_000
    memory_bytes = 2**30

    def __init__(self) -> None:
        self.captured = 0
        self.capturable = True
        self.lost = False

    def describe(self) -> dict[str, Any]:
        return {"device": "cuda", "device_name": self.name, "driver": "1.2.3"}

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def capture(self, calls):
        if not self.capturable:
            raise CannotCapture("RuntimeError: operation not permitted when stream is capturing")
        self.captured += 1

        def replay() -> None:
            for call in calls:
                call()

        return replay

    def seconds(self, run, times):
        start = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - start) / times

    def release(self) -> None:
        pass
