"""Which request has which slot. Slots in use are always the first ones, so a step has no gaps."""

from __future__ import annotations

from collections import deque

from proxytune_kernels.decoder.request import Request


class Scheduler:
    """First come, first served, over a fixed number of slots.

    Args:
        max_batch_size: number of slots.
    """

    def __init__(self, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self.waiting: deque[Request] = deque()
        self._slots: list[Request | None] = []

    @property
    def running(self) -> list[Request]:
        """The requests with a slot, by slot; complete after :meth:`compact`."""
        return [request for request in self._slots if request is not None]

    @property
    def unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting) or any(self._slots)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Give free slots, lowest first, to waiting requests; returns those."""
        admitted = []
        for slot in range(self.max_batch_size):
            if not self.waiting:
                break
            if slot == len(self._slots):
                self._slots.append(None)
            if self._slots[slot] is None:
                request = self.waiting.popleft()
                request.slot = slot
                self._slots[slot] = request
                admitted.append(request)
        return admitted

    def remove(self, request: Request) -> int | None:
        """Take a request out; returns the slot it had, None if it was waiting."""
        slot, request.slot = request.slot, None
        if slot is None:
            self.waiting.remove(request)
        else:
            self._slots[slot] = None
        return slot

    def compact(self) -> list[tuple[int, int]]:
        """Move the last requests into free slots below them; returns the moves, (from, to)."""
        moves = []
        free = [slot for slot, request in enumerate(self._slots) if request is None]
        for target in free:
            while self._slots and self._slots[-1] is None:
                self._slots.pop()
            if target >= len(self._slots):
                break
            request = self._slots.pop()
            assert request is not None
            moves.append((len(self._slots), target))
            request.slot = target
            self._slots[target] = request
        return moves
