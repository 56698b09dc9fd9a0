"""Static KV cache: a fixed place per row, and what one forward reads and writes of it.

A token's index in its row is its position. So keys need no padding, and a row's length is its next
position. To roll back is to make the length smaller: no query attends to what lies past it.
"""

from __future__ import annotations

import inspect
import math
import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.dlpack import from_dlpack

from proxytune_kernels.decoder.states import SlotStates, StateKey
from proxytune_kernels.ops.attention import MAX_HEAD_SIZE


def cache_keyword(function: Callable[..., Any]) -> str:
    """The name under which a forward, or another function of a model, takes its cache.

    transformers calls it ``cache`` from 5.24 on, and warns of ``past_key_values``, its name before,
    until that goes in 5.40; where a model has no keys and values it is ``cache_params``. A model's
    output has its cache under the same name.
    """
    names = inspect.signature(function).parameters
    others = [name for name in ("cache", "cache_params") if name in names]
    return others[0] if others and "past_key_values" not in names else "past_key_values"


class Part(NamedTuple):
    """A layer's keys, or its values: what they are of one token in one row."""

    heads: int
    size: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Part:
        """Of keys or values [B, kv_heads, q, D]."""
        return cls(tensor.shape[1], tensor.shape[3], tensor.dtype, tensor.device)

    def nbytes(self) -> int:
        """Bytes of a token."""
        return self.heads * self.size * self.dtype.itemsize


Layer = tuple[Part, Part]
"""A layer's keys and its values."""


def row_capacity(max_seq_len: int, slack: int) -> int:
    """Places in a row: a multiple of 8, since rows of a mask are aligned to 16 bytes."""
    return -(-(max_seq_len + slack) // 8) * 8


class SlotCache:
    """Keys and values of ``rows`` rows of ``max_seq_len`` tokens, for each layer.

    A row is a slot of one role. A layer has memory [rows, capacity, kv_heads, D] for its keys and
    as much for its values. All that are alike lie in one slab: a row is emptied or moved by one
    launch. :meth:`reserve` takes it; what it was not asked for is taken when a layer first writes.
    The lengths are kept twice: on the device, for forwards, and on the host, which so knows how far
    the keys reach without asking the device.

    Args:
        rows: number of rows.
        max_seq_len: tokens a row can hold.
        device: where token ids and positions live.
        slack: places past ``max_seq_len`` for drafts that will be rolled back.
        exact: the host's lengths are the device's, rather than upper bounds of them.
        kernel: what attends to the keys in steps, by its name in
            :data:`~proxytune_kernels.decoder.attention.KERNELS`.
    """

    def __init__(
        self,
        rows: int,
        max_seq_len: int,
        device: torch.device,
        *,
        slack: int = 0,
        exact: bool = True,
        kernel: str = "sdpa",
    ) -> None:
        self.rows = rows
        self.max_seq_len = max_seq_len
        self.capacity = row_capacity(max_seq_len, slack)
        self.device = device
        self.exact = exact
        self.kernel = kernel
        # Steps are captured: they reach over whole rows, wherever these end.
        self.captured = False
        self.lengths = [0] * rows
        self._state = torch.zeros((2, rows), dtype=torch.int64, device=device)
        # The second is 1 for rows whose request runs: only their lengths move.
        self.device_lengths, self.active = self._state
        self.slabs: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.states = SlotStates(rows)
        self._layers: list[Layer] = []
        # By a model's number of a layer: recurrent ones among them have no keys.
        self._places: dict[int, int] = {}
        # Where it is a set, it gets the window of each layer that attends.
        self.windows: set[int | None] | None = None
        self._starts = torch.arange(rows, device=device) * self.capacity
        self._span = torch.arange(self.capacity, device=device)
        # A model with a table of positions has none for drafts past the end.
        self._position_ids = self._span.clamp(max=max_seq_len - 1) if slack else self._span

    def fresh_step(self, rows: Tensor, width: int) -> CacheStep:
        """The forward that fills empty ``rows``, int64 [B], with up to ``width`` tokens each.

        A shorter prompt is padded at its end: what comes behind a row's length does not exist.
        """
        positions = self._span[:width].expand(len(rows), -1)
        write_index = (self._starts.index_select(0, rows)[:, None] + positions).flatten()
        step = CacheStep(
            self, positions, positions, write_index, self._span[:width], first_row=0, fresh=True
        )
        step.row_index = rows
        return step

    def step(
        self,
        rows: range,
        width: int,
        offset: int = 0,
        *,
        indexed: bool = False,
        prompt: bool = False,
    ) -> CacheStep:
        """The forward that adds ``width`` tokens to each of ``rows``; their lengths stay.

        Args:
            rows: which rows, in the order of the forward's batch.
            width: new tokens of each row.
            offset: how many tokens behind a row's length they go.
            indexed: write by index even where all rows have one length.
            prompt: the rows are of slots that do not run yet: the host knows their lengths.
        """
        host = [self.lengths[row] for row in rows]
        longest = max(host) + offset
        fixed = self.captured and not prompt
        equal = (self.exact or prompt) and not fixed and min(host) == max(host)
        length = self.capacity if fixed else longest + width
        write_index, clamped = None, self._position_ids is not self._span
        if equal and not indexed:
            positions = self._span[longest:length].expand(len(rows), -1)
            ids = self._position_ids[longest:length].expand(len(rows), -1) if clamped else positions
        else:
            place = slice(rows.start, rows.stop, rows.step)
            positions = self.device_lengths[place][:, None] + self._span[offset : offset + width]
            write_index = (self._starts[place][:, None] + positions).flatten()
            ids = self._position_ids[positions] if clamped else positions
        step = CacheStep(
            self, ids, positions, write_index, self._span[:length], first_row=rows.start
        )
        step.row_stride, step.ragged = rows.step, not equal
        return step

    def advance(self, rows: int, counts: Tensor | None) -> None:
        """Move the first rows' lengths on, if they are active, on the device.

        Args:
            rows: how many.
            counts: int64 [rows], by how many tokens each; None is by one.
        """
        moved = self.active[:rows]
        self.device_lengths[:rows].add_(moved if counts is None else moved * counts)

    def set_lengths(
        self, rows: Sequence[int], lengths: Sequence[int], on_device: tuple[Tensor, Tensor]
    ) -> None:
        """Set rows' lengths: on the host, and on the device by the same numbers, int64 [B] each."""
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        self.device_lengths.index_copy_(0, *on_device)

    def extend(self, rows: range, count: int) -> None:
        """Make rows longer by ``count``, on the host and on the device."""
        for row in rows:
            self.lengths[row] += count
        self.device_lengths[rows.start : rows.stop : rows.step].add_(count)

    def move(self, source: int, target: int, rows: int = 1) -> None:
        """Move the tokens of neighbouring rows, and whether they run, to as many empty rows."""
        old, new = slice(source, source + rows), slice(target, target + rows)
        length = max(self.lengths[old])
        for slab in self.slabs:
            slab[:, new, :length].copy_(slab[:, old, :length])
        # On the device, which may know better than the host.
        self._state[:, new].copy_(self._state[:, old])
        self.states.move(old, new)
        self.lengths[new] = self.lengths[old]
        self.release(source, rows)

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy a row's first tokens into an empty row, which becomes as long."""
        for slab in self.slabs:
            slab[:, target, :count].copy_(slab[:, source, :count])
        self.lengths[target] = count
        self.device_lengths[target].fill_(count)

    def release(self, row: int, rows: int = 1, keep: int = 0) -> None:
        """Empty neighbouring rows, which run no more, but for their first ``keep`` tokens."""
        which = slice(row, row + rows)
        keep = min(keep, *self.lengths[which])
        if self.kernel == "sdpa":
            # It reads past a short row's end with weight 0, and 0 * NaN is NaN: what a request left
            # must not be there for the next, drafts past its end included.
            end = max(self.lengths[which]) + 1 + self.capacity - self.max_seq_len
            for slab in self.slabs:
                slab[:, which, keep:end].zero_()
        self._state[:, which].zero_()
        if keep:
            self.device_lengths[which].fill_(keep)
        self.states.clear(which)
        self.lengths[which] = [keep] * rows

    def reset(self) -> None:
        """Empty all rows, whatever was written where."""
        self.lengths[:] = [0] * self.rows
        self._state.zero_()
        self.states.clear(slice(None))
        if self.device.type == "cpu":
            # New memory is zeros that take no room until they are written.
            layers, self._layers = self._layers, []
            for taken in (self.slabs, self.keys, self.values):
                taken.clear()
            self.reserve(layers, [*self._places])
        elif self.kernel == "sdpa":
            for slab in self.slabs:
                slab.zero_()  # where it is: captured graphs know the place

    def reserve(self, layers: Sequence[Layer], numbers: Sequence[int] | None = None) -> None:
        """Take memory for these layers, behind those that there are: for all of them or none.

        ``numbers`` are theirs in the model; None counts on from those that there are.
        """
        counts = Counter(part for layer in layers for part in layer)
        slabs = {
            part: _zeros((count, self.rows, self.capacity, part.heads, part.size), part)
            for part, count in counts.items()
        }
        # Each has a storage of its own: torch.compile guards views of one storage as aliases.
        places = {part: iter([from_dlpack(x) for x in slab]) for part, slab in slabs.items()}
        taken = [(next(places[keys]), next(places[values])) for keys, values in layers]
        if any(part.size > MAX_HEAD_SIZE for part in counts):
            self.kernel = "sdpa"  # the others go no further
        self.slabs += slabs.values()
        first = len(self._layers)
        for i, number in enumerate(
            range(first, first + len(layers)) if numbers is None else numbers
        ):
            self._places[number] = first + i
        self._layers += layers
        self.values += [values for _, values in taken]
        # Last: they say how many layers there are.
        self.keys += [keys for keys, _ in taken]

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, [rows, capacity, kv_heads, D], for what it writes."""
        if index not in self._places:
            self.reserve([(Part.of(key), Part.of(value))], [index])
        place = self._places[index]
        return self.keys[place], self.values[place]

    def nbytes(self) -> int:
        """Bytes reserved; on a CPU the system hands out the pages as they are first written."""
        return sum(slab.nbytes for slab in self.slabs) + self.states.nbytes()


def _zeros(shape: Sequence[int], part: Part) -> Tensor:
    """Zeros on a device; on a CPU pages that the system hands out as they are written."""
    count = math.prod(shape)
    private = getattr(mmap, "MAP_PRIVATE", None)
    if part.device.type != "cpu" or private is None or not count:
        return torch.zeros(shape, dtype=part.dtype, device=part.device)
    try:
        pages = mmap.mmap(-1, count * part.dtype.itemsize, private | mmap.MAP_ANONYMOUS)
    except OSError as error:
        wanted = f"{count * part.dtype.itemsize:,} bytes"
        raise MemoryError(f"no memory for keys and values: {wanted}: {error}") from error
    return torch.frombuffer(pages, dtype=part.dtype).view(shape)


@dataclass(eq=False)
class CacheStep:
    """One forward's view of a :class:`SlotCache`, in the place of a cache of transformers.

    Args:
        cache: the keys and values.
        position_ids: int64 [B, q], position of each new token for the model.
        positions: int64 [B, q], its index in its row; past the end these two differ.
        write_index: int64 [B * q], row * capacity + position; None where all rows have one length.
        span: int64 [L], 0 to L - 1, for L the keys to attend over, new ones included.
        first_row, row_stride: the B rows are first_row, first_row + row_stride, ...
        fresh: the rows were empty, so the new keys are all there is to attend to.
        ragged: the rows have different lengths.
    """

    cache: SlotCache
    position_ids: Tensor
    positions: Tensor
    write_index: Tensor | None
    span: Tensor
    _: KW_ONLY
    first_row: int
    row_stride: int = 1
    fresh: bool = False
    ragged: bool = False
    row_index: Tensor | None = field(default=None, init=False)
    masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict, init=False)
    _seq_lens: Tensor | None = field(default=None, init=False)
    _zeros: Tensor | None = field(default=None, init=False)
    _arrivals: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict, init=False)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, [B, kv_heads, q, D]; return all to attend to.

        Returns:
            Keys and values [B, kv_heads, L, D], views of the cache; the new ones if it was empty.
        """
        keys, values = self.cache.layer(layer_idx, key, value)
        length = self.span.shape[0]
        # No branch on the number of rows: a compiled step has one graph for all of them.
        end = self.first_row + key.shape[0] * self.row_stride
        rows = slice(self.first_row, end, self.row_stride)
        seen_keys, seen_values = keys[rows], values[rows]
        seen_keys = seen_keys.narrow(1, 0, length).transpose(1, 2)
        seen_values = seen_values.narrow(1, 0, length).transpose(1, 2)
        if self.write_index is not None:
            # A model may be spread over devices.
            index = self.write_index.to(key.device)
            for cached, new in ((keys, key), (values, value)):
                tokens = new.transpose(1, 2).reshape(-1, new.shape[1], new.shape[3])
                cached.flatten(0, 1).index_copy_(0, index, tokens)
        else:
            # Rows of one length write at one place: half the calls of the general way.
            width = key.shape[2]
            seen_keys.narrow(2, length - width, width).copy_(key)
            seen_values.narrow(2, length - width, width).copy_(value)
        return (key, value) if self.fresh else (seen_keys, seen_values)

    def rows(self) -> slice | Tensor:
        """The rows of this forward, of the cache."""
        if self.row_index is not None:
            return self.row_index
        end = self.first_row + len(self.positions) * self.row_stride
        return slice(self.first_row, end, self.row_stride)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of a layer's convolution, [B, channels, width]; None before any token."""
        return self._state("convolution", layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """What a recurrent layer carries, [B, ...]; None before any token."""
        return self._state("recurrent", layer_idx, state_idx)

    def _state(self, kind: str, layer_idx: int, state_idx: int) -> Tensor | None:
        key = StateKey(kind, layer_idx, state_idx)
        return None if self.fresh else self.cache.states.of(key, self.rows())

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Append inputs [B, channels, q] to those kept; returns all, and keeps the last of them."""
        before = self.get_conv_state(layer_idx, state_idx)
        kept = conv_states if before is None else before
        width = conv_kernel_size or kept.shape[-1]
        if before is not None:
            conv_states = torch.cat([before, conv_states], -1)
        conv_states = pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))
        key = StateKey("convolution", layer_idx, state_idx)
        self.cache.states.write(key, self.rows(), conv_states[..., -width:])
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        """Replace what a recurrent layer carries."""
        key = StateKey("recurrent", layer_idx, state_idx)
        self.cache.states.write(key, self.rows(), recurrent_states)
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether states can be rolled back: never."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row before this forward (transformers asks to infer positions)."""
        return self.span.shape[0] - self.positions.shape[1]

    def visible(self, window: int | None) -> tuple[int, bool]:
        """The first key that any query sees, and whether the rest needs a mask.

        Without a mask: causal where the rows are fresh, everything where there is one query.
        """
        if self.cache.windows is not None:
            self.cache.windows.add(window)
        length, width = self.span.shape[0], self.positions.shape[1]
        if self.ragged:
            return 0, True
        if self.fresh:
            return 0, window is not None and length > window
        first = 0 if window is None else max(0, length - width + 1 - window)
        return first, width > 1

    def mask(self, window: int | None, groups: int = 1) -> Tensor:
        """Additive causal mask [B or 1, 1, q * groups, L]: 0 where a query may look, else -inf.

        Args:
            window: a query sees this many keys at most, itself included; None sees all.
            groups: how often the q queries follow each other.
        """
        if (window, groups) not in self.masks:
            # Rows of one length share a mask.
            positions = self.positions if self.ragged else self.positions[:1]
            positions = positions.repeat(1, groups)[:, None, :, None]
            hidden = self.span > positions
            if window is not None:
                hidden |= self.span <= positions - window
            zeros = torch.zeros_like(hidden, dtype=self.cache.keys[0].dtype)
            self.masks[window, groups] = zeros.masked_fill_(hidden, -torch.inf)
        return self.masks[window, groups]

    def take(self, seq_lens: Tensor, arrivals: Tensor) -> None:
        """Have what :meth:`seq_lens` and :meth:`arrivals` give; compiled layers make their own."""
        self._seq_lens, self._zeros = seq_lens, arrivals

    def seq_lens(self) -> Tensor:
        """int32 [B]: tokens of each row, new ones included."""
        if self._seq_lens is None:
            self._seq_lens = (self.positions[:, -1] + 1).to(torch.int32)
        return self._seq_lens

    def arrivals(self, device: torch.device, count: int) -> Tensor:
        """int32 zeros, which each layer of this forward leaves as zeros: one launch for all."""
        given = self._zeros
        if given is not None and given.device == device and len(given) >= count:
            return given
        if (device, count) not in self._arrivals:
            zeros = torch.zeros(count, dtype=torch.int32, device=device)
            self._arrivals[device, count] = zeros
        return self._arrivals[device, count]
