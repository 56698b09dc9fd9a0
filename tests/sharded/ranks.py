"""Processes that stand for the ranks: started once a world size, each runs every case."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import proxytune_kernels as ptk
from proxytune_kernels.sharded import shard as shard_module
from tests.ops import oracle
from tests.sharded.cases import CASES, SPLITS, sizes_of


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this rank gives to each collective."""
    sent: list[int] = []
    gather, reduce = shard_module._all_gather, dist.all_reduce

    def note(tensor: Tensor) -> None:
        sent.append(tensor.numel() * tensor.element_size())

    def counted_gather(out: Tensor, tensor: Tensor, **kwargs: Any) -> Any:
        note(tensor)
        return gather(out, tensor, **kwargs)

    def counted_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        note(tensor)
        return reduce(tensor, *args, **kwargs)

    shard_module._all_gather, dist.all_reduce = counted_gather, counted_reduce
    try:
        yield sent
    finally:
        shard_module._all_gather, dist.all_reduce = gather, reduce


def agree(split: tuple[float, ...], vocab_size: int, backend: str) -> ptk.sharded.Shard:
    """This rank's part; in half of the splits the last rank has the first tokens."""
    sizes = sizes_of(split, vocab_size)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    rank = dist.get_rank()
    at = len(sizes) - 1 - rank if sizes[0] > sizes[-1] else rank
    return ptk.sharded.Shard.agree(starts[at], sizes[at], backend=backend)


def differences(name: str, split: tuple[float, ...], backend: str) -> str:
    """What this rank gets otherwise than the unsharded call; nothing where all is the same."""
    call = CASES[name]()
    shard = agree(split, call.vocab_size, backend)
    wanted, found = oracle.tensors(call.whole(backend)), oracle.tensors(call.on(shard))
    lines = []
    for column, values in wanted.items():
        one, other = (oracle.bits(t.nan_to_num(7e7)) for t in (values, found[column]))
        different = (one != other).nonzero()
        if len(different):
            at = tuple(different[0].tolist())
            lines.append(
                f"{column}{list(at)} and {len(different) - 1} more: "
                f"{found[column][at]} where {values[at]} was wanted"
            )
    return "\n".join(lines)


def _work(rank: int, world: int, store: str, names: list[str], backend: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results: dict[str, list[str]] = {}
    for name in names:
        results[name] = []
        for split in SPLITS[world]:
            try:
                results[name].append(differences(name, split, backend))
            except Exception:
                results[name].append(traceback.format_exc())
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(world: int, names: list[str], backend: str, folder: Path) -> dict[str, list[str]]:
    """Per case, what went wrong on any rank and split."""
    folder.mkdir(parents=True)
    arguments = (world, str(folder / "store"), names, backend, str(folder))
    spawn(_work, arguments, nprocs=world)
    found: dict[str, list[str]] = {name: [] for name in names}
    for rank in range(world):
        for name, texts in torch.load(folder / f"{rank}.pt").items():
            for split, text in zip(SPLITS[world], texts, strict=True):
                if text:
                    found[name].append(f"rank {rank} of {world}, split {split}:\n{text}")
    return found
