"""What the design promises of the kernels, and which figures are worse than those stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.static.figures import Figures

WIDE = 16
"""Bytes of the widest load that all of these GPUs have, and that the design promises."""


@dataclass(frozen=True)
class Budget:
    """The most that a kernel may take."""

    registers: int
    shared: int = 48 * 1024
    """Bytes: what a block gets without asking the driver for more."""
    stack: int = 0
    """Spilled registers go through the memory that the logits come from."""


_STREAMS = Budget(registers=64)
"""For kernels that are bound by memory: 32 warps, half of what a multiprocessor can hold (cc 12.0:
two thirds). When each of their lanes waits for one 16-byte load, 16 KiB are under way; an H100
needs 13 KB a multiprocessor to draw 3.35 TB/s where a trip takes 0.5 us (docs/roofline.md)."""

_SCAN = Budget(registers=112)
"""16 warps, but two loads a lane and role: 16 KiB are under way when only base's are."""

_SPREAD = Budget(registers=168)
"""For kernels that read flat rows again, with more arithmetic a token: 12 warps."""

_OTHERS = Budget(registers=255)
"""As many as there are: for kernels of one block a row, where a batch seldom fills the device, and
for draw, whose code holds routes for awkward rows that few blocks take."""

_HEADS = Budget(registers=255, shared=99 * 1024)
"""Two accumulators of 64 rows by 128 tokens, and four stages of both operands: what the smallest of
these devices (cc 12.0) gives a block when asked."""

BUDGETS = {
    "scan": _SCAN,
    "combine": _STREAMS,
    "pivots": _SPREAD,
    "residual": _SPREAD,
    "draw": _OTHERS,
    "select": _OTHERS,
    "sample_hidden": _HEADS,
    "top_logprobs": _OTHERS,
    "score": _OTHERS,
    "coupled": _OTHERS,
    "rejection": _OTHERS,
    "shard_scan": _STREAMS,
    "shard_keys": _STREAMS,
    "shard_draw": _SPREAD,
    "shard_residual": _SPREAD,
    "shard_histogram": _STREAMS,
    "shard_finish": _OTHERS,
    "shard_accept": _OTHERS,
}


def over_budget(
    kernel: str, figures: Figures, aligned: bool, bytes_per_token: int
) -> Iterator[str]:
    """What a kernel takes that it may not, and what it does not do as promised.

    Args:
        kernel: of :data:`BUDGETS`.
        figures: its figures.
        aligned: its rows start at multiples of 16 bytes.
        bytes_per_token: of the roles' logits: a route reads each once.
    """
    budget = BUDGETS[kernel]
    limits = {"registers": budget.registers, "shared": budget.shared, "stack": budget.stack}
    for name, most in {**limits, "local": 0}.items():
        if (got := getattr(figures, name)) > most:
            yield f"{name} {got}, the budget is {most}"
    for name, route in figures.routes.items():
        if route.logits_bytes != bytes_per_token:
            yield (
                f"route {name!r} reads {route.logits_bytes:g} bytes of logits a token, the roles "
                f"hold {bytes_per_token}"
            )
        fewest = bytes_per_token / WIDE
        if aligned and route.logits_loads != fewest:
            yield f"route {name!r} takes {route.logits_loads:g} loads a token, {fewest:g} would do"


_MORE_IS_WORSE = ("registers", "stack", "local", "shared", "atomics", "barriers")
_FEWER_IS_WORSE = ("resident_warps", "narrowest")
_ACCESSES = ("logits_loads", "other_loads", "stores")


def _numbers(figures: Figures) -> dict[str, float]:
    """By name, all that is compared; more is worse."""
    numbers: dict[str, float] = {name: getattr(figures, name) for name in _MORE_IS_WORSE}
    numbers |= {name: sum(getattr(figures, name).values()) for name in _ACCESSES}
    if figures.routes:  # by token, whatever a thread has of them
        del numbers["logits_loads"]
    for name, route in figures.routes.items():
        numbers[f"{name}: instructions a token"] = route.instructions
        numbers[f"{name}: loads of logits a token"] = route.logits_loads
    return numbers


def worse(now: Figures, before: Figures) -> Iterator[str]:
    """Each figure that got worse, with both values.

    No tolerance: one version of Triton, whose package holds the assembler too, makes the same code
    of the same source wherever it runs. The code's length is not compared: it is what it is where
    no route is counted.
    """
    old = _numbers(before)
    for name, value in _numbers(now).items():
        if name in old and value > old[name]:
            yield f"{name} {value:g}, was {old[name]:g}"
    for name in _FEWER_IS_WORSE:
        new_value, old_value = getattr(now, name), getattr(before, name)
        if None not in (new_value, old_value) and new_value < old_value:
            yield f"{name.replace('_', ' ')} {new_value}, was {old_value}"
