"""Launches that do not ask Triton at each call which of its compiled kernels they need.

Triton looks at every argument for that, which takes longer than all else that the host does. Here a
*kind* says it: whatever differs between two calls, of all that Triton compiles a kernel for.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
from triton.runtime.driver import driver

REMEMBERS = True
"""Off where something stands in for Triton's launches."""
COMPILED: dict[Hashable, Any] = {}
"""By kernel, device and kind."""


def launch(
    kernel: Any, kind: Hashable, device: torch.device, grid: tuple[int, ...], *args: Any,
    **options: Any,
) -> None:  # fmt: skip
    """``kernel[grid](*args, **options)``, on the current stream.

    Args:
        kernel: a function of ``triton.jit``.
        kind: where it is the same, arguments are of the same types; tensors are all at multiples of
            16 bytes, or all are not; integers that Triton specialises are all 1, multiples of 16 or
            neither; and constants and options are the same.
        device: the current one.
        grid: number of programs, in one or two dimensions.
        args: all arguments of the kernel, in order, its constants included.
        options: Triton's.
    """
    key = (kernel.__name__, device.index, kind)
    compiled = COMPILED.get(key)
    if compiled is None or not REMEMBERS or _watched():
        compiled = kernel[grid](*args, **options)  # None in the interpreter
        if compiled is not None and REMEMBERS:
            COMPILED[key] = compiled
        return
    stream = driver.active.get_current_stream(device.index)
    height = grid[1] if len(grid) > 1 else 1
    compiled.run(
        grid[0], height, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *args,
    )  # fmt: skip


def _watched() -> bool:
    """Whether a profiler of Triton's wants to know of each launch."""
    return bool(triton.knobs.runtime.launch_enter_hook.calls)
