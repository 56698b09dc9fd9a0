"""What the operators' launches ask Triton to compile: nothing that warming up did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

pytest.importorskip("triton", reason="Triton is not installed")

import proxytune_kernels as ptk
from tests.ptx.device import Device

OPS: Any = ptk
BF16, FP32 = torch.bfloat16, torch.float32


class Asked(Device):
    """Notes what a launch asks for, by which Triton finds what is compiled; compiles nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[tuple[str, ...]] = set()

    def _launch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any):
        binder = kernel.device_caches[self.capability][-1]
        _, specialization, options = binder(*args, **options)
        self.kernels.add((str(kernel.__name__), str(specialization), str(options)))

def logits(batch, V, dtype, width, T=None):
    shape=(batch, width) if T is None else (batch, T, width)
    return [torch.zeros(shape, dtype=dtype) for _ in range(3)]

def calls(V, dtype, width, batch):
    base, expert, anti = logits(batch, V, dtype, width)
    bias = torch.zeros(batch, V); mask=torch.zeros(batch, -(-V//32), dtype=torch.int32)
    for n in (0, 5, 128):
      for roles in ((base,expert,anti),(base,None,None)):
        for b in (None,bias):
            for m in (None,mask):
                OPS.sample(*roles, vocab_size=V, bias=b, allowed_mask=m, top_logprobs=n, backend="triton")
if __name__ == "__main__":
    for V, dtype, width in ((128256,BF16,128256),(50257,torch.float16,50257),(151936,BF16,152064),(32000, FP32, 32000)):
        with Asked() as a:
            for B in (1,2,3,16,17):
                calls(V, dtype, width, B)
                print(V, B, len(a.kernels))
            from collections import Counter
            print(Counter(k[0] for k in a.kernels))
