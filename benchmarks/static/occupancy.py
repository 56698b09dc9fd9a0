"""How many warps of a kernel a multiprocessor holds at once, from what each of them takes.

The rules and granularities are those of ``cuda_occupancy.h`` (CUDA Toolkit; Triton's package has a
copy, and a test compiles it and compares), the limits of a multiprocessor those of the CUDA C++
Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
_REGISTERS = 65_536  # 32-bit ones, of each compute capability below
_REGISTER_UNIT = 256  # allocated for a warp
_QUARTERS = 4  # a multiprocessor's parts, each with its own registers and scheduler
_SHARED_UNIT = 128
RESERVED_SHARED = 1024  # the driver's own, for each block, from compute capability 8.0


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds at most."""

    warps: int
    blocks: int
    shared: int  # bytes


LIMITS = {
    80: Limits(64, 32, 164 * 1024),
    90: Limits(64, 32, 228 * 1024),
    100: Limits(64, 32, 228 * 1024),
    120: Limits(48, 24, 100 * 1024),
}
"""By compute capability, as ``80`` for 8.0."""


def resident_warps(cc: int, registers: int, shared: int, warps: int) -> int:
    """Warps of one kernel that a multiprocessor holds.

    Args:
        cc: compute capability, of :data:`LIMITS`.
        registers: per thread.
        shared: bytes per block, without :data:`RESERVED_SHARED`.
        warps: per block.
    """
    limits = LIMITS[cc]
    for_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // _QUARTERS // for_warp * _QUARTERS // warps
    for_block = -(-(shared + RESERVED_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    return warps * min(
        limits.blocks, limits.warps // warps, by_registers, limits.shared // for_block
    )
