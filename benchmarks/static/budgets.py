"""What the design promises of the Triton kernels, with any version of Triton."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.static.figures import Figures

WIDE = 16
"""Bytes of the widest load that all of these GPUs have, and that the design promises."""

# Registers of a kernel. Bound by memory: 32 warps, half of what a multiprocessor can hold (cc 12.0:
# two thirds). When each of their lanes waits for one 16-byte load, 16 KiB are under way; an H100
# needs 13 KB a multiprocessor to draw 3.35 TB/s where a trip takes 0.5 us (docs/roofline.md).
_STREAMS = 64
_SCAN = 112  # 16 warps, but two loads a lane and role: 16 KiB are under way when only base's are
_SPREAD = 168  # for kernels that read flat rows again, with more arithmetic a token: 12 warps
# As many as there are: for kernels of one block a row, where a batch seldom fills the device, and
# for draw, whose code holds routes for awkward rows that few blocks take.
_OTHERS = 255

BUDGETS = {
    "scan": _SCAN,
    "combine": _STREAMS,
    "pivots": _SPREAD,
    "residual": _SPREAD,
    "draw": _OTHERS,
    "select": _OTHERS,
    "sample_hidden": _OTHERS,
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
"""Registers a thread by kernel; never a stack, as spills go through the logits' memory."""

SHARED = {"sample_hidden": 99 * 1024}
"""Bytes of shared memory a block, where it is not the 48 KiB that a block gets without asking.
sample_hidden has two accumulators of 64 rows by 128 tokens, and four stages of both operands: what
the smallest of these devices (cc 12.0) gives a block when asked."""


def over_budget(
    kernel: str, figures: Figures, aligned: bool, bytes_per_token: int
) -> Iterator[str]:
    """What a kernel takes that it may not, and what it does not do as promised.

    ``aligned``: its rows start at multiples of 16 bytes. ``bytes_per_token`` of the roles' logits:
    a route reads each once.
    """
    shared = SHARED.get(kernel, 48 * 1024)
    budget = {"registers": BUDGETS[kernel], "shared": shared, "stack": 0, "local": 0}
    for name, most in budget.items():
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
