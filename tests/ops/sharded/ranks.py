"""Processes that stand for the ranks: started once a world size, each runs every case."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import proxytune_kernels as ptk
from tests.ops import oracle
from tests.ops.sharded.cases import CASES, SPLITS, sizes_of
from tests.ops.sharded.checks import CHECKS


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
        one, other = (t.nan_to_num(7e7) for t in (values, found[column]))
        differ = oracle.bits(one) != oracle.bits(other)
        if backend == "triton" and "logprobs" in column:
            # The unsharded kernels may take tiles' sums (docs/gpu.md); both are rounded to fp32.
            differ = (one - other).abs() > 4.2e-6 + 2.0**-23 * one.abs()
        different = differ.nonzero()
        if len(different):
            at = tuple(different[0].tolist())
            lines.append(
                f"{column}{list(at)} and {len(different) - 1} more: "
                f"{found[column][at]} where {values[at]} was wanted"
            )
    return "\n".join(lines)


class Found(NamedTuple):
    """What the ranks found."""

    differences: dict[str, list[str]]
    """Per case, what went wrong on any rank and split."""
    checks: list[dict[str, Any]]
    """Per rank, the results of :data:`CHECKS`."""


def _work(
    rank: int, world: int, folder: str, names: list[str], checks: list[str], backend: str
) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    texts: dict[str, list[str]] = {}
    for name in names:
        texts[name] = []
        for split in SPLITS[world]:
            try:
                texts[name].append(differences(name, split, backend))
            except Exception:
                texts[name].append(traceback.format_exc())
    found = {name: CHECKS[name]() for name in checks}
    torch.save((texts, found), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(world: int, names: list[str], checks: list[str], backend: str, folder: Path) -> Found:
    """Start the ranks, and run cases and checks on each."""
    folder.mkdir(parents=True)
    spawn(_work, (world, str(folder), names, checks, backend), nprocs=world)
    wrong: dict[str, list[str]] = {name: [] for name in names}
    results = []
    for rank in range(world):
        by_case, found = torch.load(folder / f"{rank}.pt", weights_only=False)
        results.append(found)
        for name, texts in by_case.items():
            for split, text in zip(SPLITS[world], texts, strict=True):
                if text:
                    wrong[name].append(f"rank {rank} of {world}, split {split}:\n{text}")
    return Found(wrong, results)
