"""A rank's part of the vocabulary, and the collectives over all parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from proxytune_kernels.ops.backends import BY_NAME, resolve
from proxytune_kernels.ops.backends.backend import Implementation
from proxytune_kernels.ops.checks import MAX_VOCAB_SIZE

# Renamed in torch 2.12; the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Shard:
    """One rank's contiguous part of the vocabulary, agreed with the other ranks' once.

    Made by :meth:`agree`, and handed to every call. Ranks may hold parts of any size, in any order;
    a rank may hold none.
    """

    vocab_start: int
    """Id of the first token here."""
    size: int
    """Tokens here."""
    starts: tuple[int, ...]
    """``vocab_start`` of every rank."""
    sizes: tuple[int, ...]
    """``size`` of every rank."""
    backend: str
    """What runs between the collectives, the same on every rank."""
    group: dist.ProcessGroup | None
    """The ranks; None is the default group."""

    @classmethod
    def agree(
        cls,
        vocab_start: int,
        size: int,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        backend: str | None = None,
    ) -> Shard:
        """Tell the other ranks which tokens are here; a collective, to be called once on each.

        Args:
            vocab_start: id of this rank's first token.
            size: number of its tokens; padding of the logits, at their end, is not counted.
            group: the tensor-parallel group; None is the default one.
            device: where the logits are, and what the group's collectives run on.
            backend: as in :func:`proxytune_kernels.sample`.

        Raises:
            ValueError: on every rank, where the parts leave a gap, overlap, hold more than 2^19
                tokens together or none, or where the ranks' backends differ.
            RuntimeError: torch.distributed is not initialised, or the backend can't run here.

        Example (vLLM's names, on each rank)::

            indices = lm_head.shard_indices
            start, end = indices.org_vocab_start_index, indices.org_vocab_end_index
            shard = Shard.agree(start, end - start, group=tp_group, device="cuda")

        Source: docs/sharded.md.
        """
        if not dist.is_initialized():
            raise RuntimeError(
                "Shard.agree: torch.distributed is not initialised: call init_process_group first"
            )
        names, refused = sorted(BY_NAME), None
        try:
            _check_part(vocab_start, size)
            like = torch.empty((1, size), device=device)
            own = [vocab_start, size, names.index(resolve(backend, like, "sharded", size))]
        except (ValueError, RuntimeError) as error:
            own, refused = [0, 0, -1], error  # the other ranks must not wait for this one
        starts, sizes, codes = _tell(own, group, device)
        if refused is not None:
            raise refused
        if -1 in codes:
            raise RuntimeError(f"Shard.agree: rank {codes.index(-1)} refused its arguments")
        _check_parts(starts, sizes)
        if len(set(codes)) > 1:
            found = [names[code] for code in codes]
            raise ValueError(f"Shard.agree: backend must be the same on all ranks, got {found}")
        return cls(vocab_start, size, tuple(starts), tuple(sizes), names[codes[0]], group)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.starts)

    @property
    def vocab_size(self) -> int:
        """Tokens of all ranks."""
        return sum(self.sizes)

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors of this shape, by rank: [W, ...]."""
        out = tensor.new_empty((self.world_size, *tensor.shape))
        if tensor.numel():
            # One dimension, the form that all backends take.
            _all_gather(out.view(-1), tensor.contiguous().view(-1), group=self.group)
        return out

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in place."""
        if tensor.numel():
            dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)
        return tensor

    def operator(self, name: str, device: torch.device) -> Implementation:
        """The backend's ``shard_*`` operator for tensors on a device."""
        return BY_NAME[self.backend].implementation(name, device)


def _tell(
    own: list[int], group: dist.ProcessGroup | None, device: torch.device | str
) -> list[list[int]]:
    """All ranks' numbers: of each, a list by rank."""
    told = torch.empty(dist.get_world_size(group) * len(own), dtype=torch.int64, device=device)
    _all_gather(told, torch.tensor(own, device=device), group=group)
    columns: list[list[int]] = told.view(-1, len(own)).t().tolist()
    return columns


def _check_part(vocab_start: Any, size: Any) -> None:
    for name, value in (("vocab_start", vocab_start), ("size", size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"Shard.agree: {name} must be an integer >= 0, got {value!r}")


def _check_parts(starts: list[int], sizes: list[int]) -> None:
    """Check that the parts are the whole vocabulary, each token once."""
    parts = sorted(zip(starts, sizes, range(len(starts)), strict=True))
    end = 0
    for start, size, rank in parts:
        if size and start != end:
            what = "overlap" if start < end else "leave a gap"
            raise ValueError(
                f"Shard.agree: the ranks' parts {what}: vocab_start of rank {rank} must be {end}, "
                f"got {start}"
            )
        end += size
    if not 1 <= end <= MAX_VOCAB_SIZE:
        raise ValueError(f"Shard.agree: all sizes must add up to [1, 2^19], got {end}")
