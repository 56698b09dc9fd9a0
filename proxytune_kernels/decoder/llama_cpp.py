"""A member that llama.cpp runs: a slot is a sequence of its context."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from proxytune_kernels.decoder.cache import Layer, SlotCache
from proxytune_kernels.decoder.model import SlotModel
from proxytune_kernels.trio.llama_cpp import RUNTIME, LlamaContext, LlamaModel


class LlamaCache(SlotCache):
    """The lengths of slots; the tokens of slot s are those of sequence s of a context."""

    def __init__(self, model: LlamaModel, rows: int, max_seq_len: int, slack: int) -> None:
        super().__init__(rows, max_seq_len, model.device, slack=slack, kernel=RUNTIME)
        self.context = LlamaContext(model, rows, self.capacity)

    def move(self, source: int, target: int, rows: int = 1) -> None:
        """See :meth:`SlotCache.move`."""
        self.context.copy(source, target)
        super().move(source, target, rows)

    def copy(self, source: int, target: int, count: int) -> None:
        """See :meth:`SlotCache.copy`."""
        self.context.copy(source, target)  # what is behind the count goes when it is used
        super().copy(source, target, count)

    def reset(self) -> None:
        """See :meth:`SlotCache.reset`."""
        self.context.clear()
        super().reset()

    def reserve(self, layers: Sequence[Layer], numbers: Sequence[int] | None = None) -> None:
        """Note the layers: the context took their memory as it was made."""
        self._layers += layers

    def nbytes(self) -> int:
        """See :meth:`SlotCache.nbytes`."""
        token = sum(part.nbytes() for layer in self._layers for part in layer)
        return token * self.rows * self.capacity


class LlamaSlots(SlotModel):
    """A model of llama.cpp over slots of its own, in the place of a :class:`SlotModel`.

    The logits of :meth:`forward` are the library's memory, which the next call writes over.

    Args:
        model: opened by libllama.
        slots, max_seq_len, slack: as in :class:`SlotCache`.
        drafts: it drafts, too: its logits, of several forwards, are copied.
    """

    def __init__(
        self, model: LlamaModel, slots: int, max_seq_len: int, slack: int, drafts: bool
    ) -> None:
        self.model = model
        self.cache = LlamaCache(model, slots, max_seq_len, slack)
        self._context, self._drafts = self.cache.context, drafts
        self._slots, self._first, self._stride, self._rows_per_slot = slots, 0, 1, 1
        self.forwards, self.compiled, self.packed = None, None, False

    def forward(self, token_ids: Tensor, offset: int = 0, *, eager: bool = False) -> Tensor:
        """See :meth:`SlotModel.forward`."""
        slots, width = token_ids.shape
        lengths = self.cache.device_lengths[:slots].tolist()
        rows = [
            (slot, length + offset, tokens)
            for slot, (length, tokens) in enumerate(zip(lengths, token_ids.tolist(), strict=True))
        ]
        logits = self._context.run(rows, every=True).view(slots, width, -1)
        return logits.clone() if self._drafts else logits

    def prefill(
        self,
        slots: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        numbers: Sequence[Tensor] | None = None,
        last: int = 1,
    ) -> Tensor:
        """See :meth:`SlotModel.prefill`."""
        if numbers is None:
            numbers = self.prompt_numbers(slots, token_ids)
        rows = sorted((slot, 0, tokens) for slot, tokens in zip(slots, token_ids, strict=True))
        logits = self._context.run(rows, every=last > 1)
        self.cache.set_lengths(slots, [*map(len, token_ids)], (numbers[0], numbers[2]))
        if last > 1:
            ends = accumulate(len(tokens) for _, _, tokens in rows)
            logits = torch.stack([logits[end - last : end] for end in ends])
        return logits[[sorted(slots).index(slot) for slot in slots]]

    def extend(
        self,
        slots: range,
        token_ids: Sequence[Sequence[int]],
        numbers: Sequence[Tensor] | None = None,
        *,
        every: bool = False,
    ) -> Tensor:
        """See :meth:`SlotModel.extend`."""
        rows = [
            (slot, self.cache.lengths[slot], x) for slot, x in zip(slots, token_ids, strict=True)
        ]
        logits = self._context.run(rows, every=every).clone()
        self.cache.extend(slots, len(token_ids[0]))
        return logits.unflatten(0, (len(slots), -1)) if every else logits

    def warm_up(self) -> None:
        """There is nothing to compile."""
