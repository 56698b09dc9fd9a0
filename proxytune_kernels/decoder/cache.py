"""Static KV cache of one role: a fixed place per slot, and what one forward reads and writes of it.

A token's index in its slot is its position, so a slot's keys need no padding, a row's length is its
next position, and rolling back is a smaller length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SlotCache:
    """Keys and values of ``max_batch_size`` slots of ``max_seq_len`` tokens, for each layer.

    A layer's memory is [max_batch_size, max_seq_len, kv_heads, D] for keys and the same for values;
    it is taken when the layer first writes, with the shape and dtype that it writes. ``lengths``
    counts the tokens in each slot.

    Args:
        max_batch_size: number of slots.
        max_seq_len: tokens a slot can hold.
        device: where the keys and values live.
    """

    def __init__(self, max_batch_size: int, max_seq_len: int, device: torch.device) -> None:
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.device = device
        self.lengths = [0] * max_batch_size
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._positions = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self._starts = torch.arange(max_batch_size, device=device) * max_seq_len
        self._span = torch.arange(max_seq_len, device=device)

    def prefill_step(self, slots: Sequence[int], length: int) -> CacheStep:
        """The forward that fills empty ``slots`` with prompts of ``length`` tokens each."""
        index = torch.tensor(slots, device=self.device)
        self._positions[index] = length
        for slot in slots:
            self.lengths[slot] = length
        span = self._span[:length]
        write_index = (self._starts[index][:, None] + span).flatten()
        return CacheStep(self, span.expand(len(slots), -1), write_index, span, fresh=True)

    def decode_step(self, rows: int) -> CacheStep:
        """The forward that adds one token to each of the slots 0 to ``rows`` - 1."""
        # Copied, since the rows' positions move on before the forward reads them.
        positions = self._positions[:rows].clone()
        self._positions[:rows] += 1
        longest, shortest = max(self.lengths[:rows]), min(self.lengths[:rows])
        for slot in range(rows):
            self.lengths[slot] += 1
        return CacheStep(
            self,
            positions[:, None],
            self._starts[:rows] + positions,
            self._span[: longest + 1],
            ragged=shortest != longest,
        )

    def move(self, source: int, target: int) -> None:
        """Move a slot's tokens to an empty slot."""
        length = self.lengths[source]
        for layer in (*self.keys, *self.values):
            layer[target, :length] = layer[source, :length]
        self._positions[target] = length
        self.lengths[target] = length
        self.release(source)

    def release(self, slot: int) -> None:
        """Empty a slot."""
        # A ragged batch reads past a short row's end with weight 0, and 0 * NaN is NaN: what a
        # request left must not be there for the next.
        for layer in (*self.keys, *self.values):
            layer[slot, : self.lengths[slot]] = 0
        self._positions[slot] = 0
        self.lengths[slot] = 0

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, [slots, max_seq_len, kv_heads, D]; made at the first call."""
        while len(self.keys) <= index:
            slots = (self.max_batch_size, self.max_seq_len)
            self.keys.append(key.new_zeros(*slots, key.shape[1], key.shape[3]))
            self.values.append(value.new_zeros(*slots, value.shape[1], value.shape[3]))
        return self.keys[index], self.values[index]

    def nbytes(self) -> int:
        """Bytes reserved; on a CPU the system hands out the pages as they are first written."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


class CacheStep:
    """One forward's view of a :class:`SlotCache`: transformers' ``past_key_values``.

    Args:
        cache: the keys and values.
        position_ids: int64 [B, q], position of each new token.
        write_index: int64 [B * q], where each new token goes, slot * max_seq_len + position.
        span: int64 [L], 0 to L - 1, for L the tokens of the longest row, new ones included.
        fresh: the slots were empty, so the new keys are all there is to attend to.
        ragged: the rows have different lengths.
    """

    def __init__(
        self,
        cache: SlotCache,
        position_ids: Tensor,
        write_index: Tensor,
        span: Tensor,
        *,
        fresh: bool = False,
        ragged: bool = False,
    ) -> None:
        self.cache = cache
        self.position_ids = position_ids
        self.write_index = write_index
        self.span = span
        self.fresh = fresh
        self.ragged = ragged
        self.masks: dict[int | None, Tensor] = {}

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, [B, kv_heads, q, D]; return all to attend to.

        Returns:
            Keys and values [B, kv_heads, L, D], views of the cache; the new ones if it was empty.
        """
        keys, values = self.cache.layer(layer_idx, key, value)
        rows, length, first = key.shape[0], self.span.shape[0], self.get_seq_length()
        seen_keys = keys[:rows, :length].transpose(1, 2)
        seen_values = values[:rows, :length].transpose(1, 2)
        if self.fresh or self.ragged or torch.compiler.is_compiling():
            for cached, new in ((keys, key), (values, value)):
                tokens = new.transpose(1, 2).reshape(-1, new.shape[1], new.shape[3])
                cached.flatten(0, 1).index_copy_(0, self.write_index, tokens)
        else:
            # Rows of one length write at one place: half the calls of the general way.
            seen_keys[:, :, first:].copy_(key)
            seen_values[:, :, first:].copy_(value)
        return (key, value) if self.fresh else (seen_keys, seen_values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row before this forward (transformers asks to infer positions)."""
        return self.span.shape[0] - self.position_ids.shape[1]

    def visible(self, window: int | None) -> tuple[int, Tensor | None]:
        """The first key that any row sees through a window, and the additive mask over the rest.

        No mask means: causal where there are several queries, everything where there is one.
        """
        length = self.span.shape[0]
        if self.ragged:
            return 0, self.mask(window)
        if window is None or length <= window:
            return 0, None
        # All rows are equally long: one new query sees the last keys, without a mask.
        return (0, self.mask(window)) if self.fresh else (length - window, None)

    def mask(self, window: int | None) -> Tensor:
        """Additive causal mask [B, 1, q, L]: 0 where a query may look, -inf elsewhere."""
        if window not in self.masks:
            positions = self.position_ids[:, None, :, None]
            hidden = self.span > positions
            if window is not None:
                hidden |= self.span <= positions - window
            zeros = torch.zeros_like(hidden, dtype=self.cache.keys[0].dtype)
            self.masks[window] = zeros.masked_fill_(hidden, -torch.inf)
        return self.masks[window]
