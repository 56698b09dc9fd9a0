"""Wall-clock budget: what still fits, by what the like of it took."""

from __future__ import annotations

import time
from collections.abc import Callable

# Guesses, until the first of a kind was measured: a unit of replays, one that compiles twice, all
# ways to decode a trio at a batch size.
_FIRST_COSTS = {"plain": 3.0, "compiled": 25.0, "decoding": 60.0}
_NEWEST = 0.5  # weight of the newest cost in the running mean: batch sizes come in runs


class Budget:
    """Seconds left of a run.

    Args:
        seconds: in all, from now.
        clock: monotonic seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._costs = dict(_FIRST_COSTS)

    def now(self) -> float:
        """The clock."""
        return self._clock()

    def left(self, reserved: float = 0.0) -> float:
        """Seconds left when some are reserved for later; never negative."""
        return max(0.0, self._end - self._clock() - reserved)

    def fits(self, kind: str, reserved: float = 0.0) -> bool:
        """Whether one more unit of a kind is likely to end in time."""
        return self._costs[kind] <= self.left(reserved)

    def spent(self, kind: str, seconds: float) -> None:
        """Learn what a unit of a kind took."""
        self._costs[kind] += _NEWEST * (seconds - self._costs[kind])
