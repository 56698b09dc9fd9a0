"""The vocabulary-sharded path on one device: ranks as threads, and NCCL where one rank is all.

NCCL wants a device of its own for each rank, so several ranks exchange through the process here;
what runs between the collectives is what runs on many devices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.gpu.contract import Outcome
from benchmarks.gpu.device import Device
from benchmarks.logits import KINDS, Logits, make_logits
from proxytune_kernels.ops.sharded import Shard

VOCAB_SIZE = 32_003
SPLITS: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (0.37, 0.63),
    (0.07, 0.5, 0.0, 0.43),
    (0.001, 0.4, 0.1, 0.1, 0.1, 0.1, 0.099, 0.1),
)
"""Shares of the vocabulary, a tuple for each number of ranks."""

_WAIT_SECONDS = 60.0


class _Meeting:
    """Where the ranks' threads leave a tensor each, and find all of them."""

    def __init__(self, world_size: int) -> None:
        self._left: list[Tensor | None] = [None] * world_size
        self.barrier = threading.Barrier(world_size)

    def exchange(self, rank: int, tensor: Tensor) -> Tensor:
        """All ranks' tensors, stacked."""
        self._left[rank] = tensor
        self.barrier.wait(_WAIT_SECONDS)
        found = torch.stack([t for t in self._left if t is not None])
        self.barrier.wait(_WAIT_SECONDS)
        return found


@dataclass(frozen=True)
class _ThreadShard(Shard):
    """A part whose rank is a thread of this process."""

    rank: int
    meeting: _Meeting

    def gather(self, tensor: Tensor) -> Tensor:
        return self.meeting.exchange(self.rank, tensor)

    def add(self, tensor: Tensor) -> Tensor:
        return self.meeting.exchange(self.rank, tensor).sum(0)


def _parts(split: Sequence[float]) -> tuple[list[int], list[int]]:
    """First token and number of tokens of each rank; the last takes what is left."""
    sizes = [int(share * VOCAB_SIZE) for share in split]
    sizes[-1] += VOCAB_SIZE - sum(sizes)
    return [sum(sizes[:i]) for i in range(len(sizes))], sizes


def _params(rows: int, device: str) -> ptk.RowParams:
    """Each row another filter: none, top_k, top_p, both, min_p, a long top_k, greedy."""
    kinds: list[dict[str, Any]] = [
        {}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.9}, {"min_p": 0.05},
        {"top_k": 5000}, {"temperature": 0.0}, {"top_p": 0.999, "filter_order": "joint"},
    ]  # fmt: skip
    made = [
        ptk.SamplingParams(**{"temperature": 0.8, "seed": row, **kinds[row % len(kinds)]})
        for row in range(rows)
    ]
    return ptk.RowParams.from_sampling_params(made, device=device)


def _columns(logits: Logits, shard: Shard) -> Logits:
    base, expert, anti = (t[:, shard.vocab_start :] for t in logits)
    return base, expert, anti


def _by_threads(split: Sequence[float], backend: str, draw: Callable[[Shard], Any]) -> list[Any]:
    """What each rank gets."""
    starts, sizes = _parts(split)
    meeting = _Meeting(len(split))

    def run(rank: int) -> Any:
        shard = _ThreadShard(
            starts[rank], sizes[rank], tuple(starts), tuple(sizes), backend, None, rank, meeting
        )
        try:
            return draw(shard)
        except BaseException:
            meeting.barrier.abort()  # the others must not wait
            raise

    with ThreadPoolExecutor(len(split)) as pool:
        return list(pool.map(run, range(len(split))))


def _by_group(device: Device, draw: Callable[[Shard], Any]) -> list[Any]:
    """What the only rank of a process group gets: NCCL's on a GPU."""
    name = "nccl" if device.torch_device.startswith("cuda") else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(name, store=store, rank=0, world_size=1)
    try:
        shard = Shard.agree(0, VOCAB_SIZE, device=device.torch_device, backend=device.backend)
        return [draw(shard)]
    finally:
        dist.destroy_process_group()


def _differences(wanted: ptk.SampleOutput, found: ptk.SampleOutput) -> int:
    """Rows with another token, kept set or status."""
    same = torch.ones_like(wanted.status, dtype=torch.bool)
    for name in ("token_ids", "num_kept", "status"):
        same &= getattr(wanted, name) == getattr(found, name)
    return int((~same).sum())


def check_shards(device: Device, rows: int = 32) -> Outcome:
    """Draw from parts of the vocabulary, and from the whole; the tokens must be the same."""
    wrong, drawn = [], 0
    for kind in KINDS:
        logits = make_logits(
            kind, rows, VOCAB_SIZE, torch.bfloat16, seed=5, device=device.torch_device
        )
        params = _params(rows, device.torch_device)
        wanted = ptk.sample(*logits, params, backend=device.backend)

        def draw(shard: Shard, logits: Logits = logits, params: Any = params) -> Any:
            return ptk.sharded.sample(*_columns(logits, shard), params, shard=shard)

        groups = {f"{len(s)} ranks": _by_threads(s, device.backend, draw) for s in SPLITS}
        groups["a process group"] = _by_group(device, draw)
        for name, results in groups.items():
            found = sum(_differences(wanted, result) for result in results)
            drawn += rows * len(results)
            if found:
                wrong.append(f"{kind}, {name}: {found} of {rows * len(results)} rows")
    fields = {"rows": drawn, "wrong": wrong}
    if wrong:
        return Outcome(f"Sharded draws differ from whole ones: {'; '.join(wrong)}", True, fields)
    sentence = f"Sharded draws: {drawn} rows on 1 to {len(SPLITS[-1])} ranks are the whole row's."
    return Outcome(sentence, False, fields)
