"""Launches that do not ask Triton at each call which of its compiled kernels they need.

Triton looks at every argument for that, 20 us a launch and more. Here a *kind* says it: what differs
between two calls, of all that Triton compiles a kernel for.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
from triton.runtime.driver import driver

REMEMBERS = True
"""Off where something stands in for Triton's launches."""
_COMPILED: dict[Hashable, Any] = {}


def launch(
    kernel: Any, kind: Hashable, device: torch.device, grid: tuple[int, ...], *args: Any,
    **options: Any,
) -> None:  # fmt: skip
    """``kernel[grid](*args, **options)``, on the current stream.

    Args:
        kernel: a function of ``triton.jit``.
        kind: launches of a kernel on a device with the same kind have arguments of the same types,
            tensors at multiples of 16 bytes or not, integers that are 1, multiples of 16 or neither
            (those that Triton specialises), and the same constants and options.
        device: the current one.
        grid: number of programs, in one or two dimensions.
        args: all arguments of the kernel, in order, its constants included.
        options: Triton's.
    """
    key = (kernel.__name__, device.index, kind)
    compiled = _COMPILED.get(key)
    if compiled is None or not REMEMBERS or _watched():
        compiled = kernel[grid](*args, **options)  # None in the interpreter
        if compiled is not None and REMEMBERS:
            _COMPILED[key] = compiled
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
