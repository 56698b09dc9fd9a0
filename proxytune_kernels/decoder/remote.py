"""A base behind an API, in the place of a model over a slot cache: the cache holds its texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.decoder.cache import Layer, Part, SlotCache
from proxytune_kernels.decoder.model import SlotModel
from proxytune_kernels.trio.remote import RemoteModel

_TOKEN = Part(1, 1, torch.int64, torch.device("cpu"))
TEXT_LAYER: Layer = (_TOKEN, _TOKEN)
"""What a remote base keeps of a token, in the words of a cache: the token, in the place of keys."""


class Answer:
    """Logits that are on their way, while the other roles run."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self._future: Future[Tensor] = Future()
        # A thread that the end of the process does not wait for.
        Thread(target=self._run, args=(call,), name="proxytune-remote", daemon=True).start()

    def _run(self, call: Callable[[], Tensor]) -> None:
        try:
            self._future.set_result(call())
        except BaseException as error:
            self._future.set_exception(error)

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        """Wait for them, and have them on a device."""
        return self._future.result().to(device, non_blocking=non_blocking)


class RemoteSlots(SlotModel):
    """A remote base over the slots: a forward is a call, and gives an :class:`Answer`.

    Args:
        model: the base.
        cache: its texts, of :data:`TEXT_LAYER`.
    """

    def __init__(self, model: RemoteModel, cache: SlotCache) -> None:
        self.model, self.cache = model, cache
        self.forwards = self.compiled = self._compiled = None
        self.packed = False
        self._first, self._stride, self._rows_per_slot = 0, 1, 1

    def forward(self, token_ids: Tensor, offset: int = 0, *, eager: bool = False) -> Any:
        """As of a model; rows that do not run are not asked for."""
        running = self.cache.active[: len(token_ids)].tolist()
        for slot, tokens in enumerate(token_ids.tolist()):
            self._write(slot, self.cache.lengths[slot] + offset, tokens)
        width = token_ids.shape[1]
        slots = [slot for slot, runs in enumerate(running) if runs]
        ends = [self.cache.lengths[slot] + offset + width for slot in slots]
        return self._ask(slots, ends, width, rows=len(token_ids))

    def prefill(
        self,
        slots: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        numbers: Sequence[Tensor] | None = None,
        last: int = 1,
    ) -> Any:
        """As of a model."""
        made = self.prompt_numbers(slots, token_ids) if numbers is None else numbers
        lengths = [len(tokens) for tokens in token_ids]
        for slot, tokens in zip(slots, token_ids, strict=True):
            self._write(slot, 0, tokens)
        self.cache.set_lengths(slots, lengths, (made[0], made[2]))
        return self._ask(slots, lengths, last, one=last == 1)

    def extend(
        self,
        slots: range,
        token_ids: Sequence[Sequence[int]],
        numbers: Sequence[Tensor] | None = None,
        *,
        every: bool = False,
    ) -> Any:
        """As of a model."""
        for slot, tokens in zip(slots, token_ids, strict=True):
            self._write(slot, self.cache.lengths[slot], tokens)
        self.cache.extend(slots, len(token_ids[0]))
        ends = [self.cache.lengths[slot] for slot in slots]
        return self._ask(slots, ends, len(token_ids[0]) if every else 1, one=not every)

    @property
    def _texts(self) -> Tensor:
        """The tokens of each slot, int64 [slots, capacity]."""
        return self.cache.keys[0][:, :, 0, 0]

    def _write(self, slot: int, start: int, token_ids: Sequence[int]) -> None:
        self._texts[slot, start : start + len(token_ids)] = torch.tensor(token_ids)

    def _ask(
        self,
        slots: Sequence[int],
        ends: Sequence[int],
        count: int,
        *,
        rows: int | None = None,
        one: bool = False,
    ) -> Answer:
        """What follows the last ``count`` tokens of the texts in slots, up to their ends.

        Logits [n, count, V], [n, V] for ``one``; for ``rows`` of all first slots, where those
        that are not asked for have -inf.
        """
        texts = [self._texts[slot, :end].tolist() for slot, end in zip(slots, ends, strict=True)]

        def call() -> Tensor:
            found = self.model.score(texts, count)
            if rows is None or rows == len(slots):
                return found[:, 0] if one else found
            logits = found.new_full((rows, *found.shape[1:]), -torch.inf)
            logits[torch.tensor(slots)] = found
            return logits

        return Answer(call)


def complete(
    base: Tensor, anti: Tensor | None, tail: str, steered: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Give the mass of what a remote base does not tell to the tokens that it leaves out.

    Args:
        base: fp32 [..., V], log-probabilities; -inf where nothing is known.
        anti: logits [..., V]; None where it does not run, and there is no tail of it then.
        tail: "drop", "anti" or "uniform".
        steered: bool [...] without V, the rows in which the anti runs; None is all.

    Returns:
        The base's logits [..., V], and the probability [...] of what is known.
    """
    known = base.exp().sum(-1).clamp(max=1.0)
    if tail == "drop" or (tail == "anti" and anti is None):
        return base, known
    unknown = base == -torch.inf
    if tail == "anti":
        assert anti is not None
        spread = anti.float().masked_fill(~unknown, -torch.inf).log_softmax(-1)
    else:
        spread = -unknown.sum(-1, keepdim=True).log()
        steered = None
    if steered is not None:
        unknown = unknown & steered[..., None]
    rest = torch.log1p(-known)[..., None]
    return torch.where(unknown, rest + spread, base), known
