"""What the ranks measure and refuse, run on each of them beside the cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import proxytune_kernels as ptk
from proxytune_kernels.ops.sharded import shard as shard_module
from tests.ops import oracle
from tests.ops.sharded.cases import Call, flat, speculative

ROWS, DRAFTS = 6, 3


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this rank gives to each collective."""
    sent: list[int] = []
    gather, reduce = shard_module._all_gather, dist.all_reduce

    def counted_gather(out: Tensor, tensor: Tensor, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return gather(out, tensor, **kwargs)

    def counted_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return reduce(tensor, *args, **kwargs)

    shard_module._all_gather = counted_gather
    dist.all_reduce = counted_reduce
    try:
        yield sent
    finally:
        shard_module._all_gather, dist.all_reduce = gather, reduce


class HostReads(TorchDispatchMode):
    """Counts what would wait for a device: values read by the host, shapes that depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero")
        self.number += func.overloadpacket.__name__ in waiting
        return func(*args, **(kwargs or {}))


def even_shard(vocab_size: int, backend: str = "cpu") -> ptk.sharded.Shard:
    """This rank's part of about the same size as the others'."""
    world, rank = dist.get_world_size(), dist.get_rank()
    start, end = vocab_size * rank // world, vocab_size * (rank + 1) // world
    return ptk.sharded.Shard.agree(start, end - start, backend=backend)


def _unfiltered(**values: Any) -> Call:
    """Peaked logits; parameters that turn all filters off but those named."""
    call = flat(1, ROWS, 5000, spread=6.0)
    return replace(call, params=ptk.RowParams.make(ROWS, **values))


def _verified(mode: str) -> Call:
    call = speculative(2, ROWS, DRAFTS, 5000, mode)
    return replace(call, params=ptk.RowParams.make(ROWS), sharded={"max_top_k": 0})


def _promised(call: Call, max_top_k: int) -> Call:
    return replace(call, sharded={"max_top_k": max_top_k})


TRAFFIC: dict[str, Callable[[], Call]] = {
    "none": lambda: _unfiltered(),
    "promised-none": lambda: _promised(_unfiltered(), 0),
    "greedy": lambda: _unfiltered(temperature=0.0, top_p=0.9, top_k=50),
    "min-p": lambda: _unfiltered(min_p=0.1),
    "top-k": lambda: _unfiltered(top_k=20, top_p=0.9),
    "promised-top-k": lambda: _promised(_unfiltered(top_k=20, top_p=0.9), 20),
    "top-p": lambda: _unfiltered(top_p=0.9),
    "flat": lambda: flat(1, ROWS, 5000, top_p=0.9),
    "coupled": lambda: _verified("coupled"),
    "rejection": lambda: _verified("rejection"),
}


def traffic() -> dict[str, tuple[list[int], int]]:
    """Per call, the bytes of each collective and the number of host reads."""
    found = {}
    for name, make in TRAFFIC.items():
        call = make()
        shard = even_shard(call.vocab_size)
        with counted() as sent, HostReads() as reads:
            call.on(shard)
        found[name] = (sent, reads.number)
    return found


def _refusal(run: Callable[[], Any]) -> str:
    try:
        run()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals() -> dict[str, str]:
    """What this rank says where the ranks do not agree."""
    rank, world = dist.get_rank(), dist.get_world_size()
    agree = ptk.sharded.Shard.agree
    last = rank == world - 1
    return {
        "gap": _refusal(lambda: agree(rank * 10 + rank, 10)),
        "overlap": _refusal(lambda: agree(rank * 9, 10)),
        "none": _refusal(lambda: agree(0, 0)),
        "wide": _refusal(lambda: agree(rank * 2**19, 2**19)),
        "one-is-wrong": _refusal(lambda: agree(-1 if last else rank * 10, 10)),
        "one-can-not": _refusal(lambda: agree(rank * 10, 10, backend="cuda" if last else "cpu")),
        "backends": _refusal(lambda: agree(rank * 10, 10, backend="reference" if last else "cpu")),
    }


def _rows_differ(one: Any, other: Any) -> list[list[bool]]:
    """Per column, which requests have other bits."""
    differ = []
    for name, wanted in oracle.tensors(other).items():
        pair = (t.nan_to_num(7).view(len(t), -1) for t in (oracle.tensors(one)[name], wanted))
        left, right = (oracle.bits(t) for t in pair)
        differ.append((left != right).any(-1).tolist())
    return differ


def promises() -> dict[str, Any]:
    """Rows that break the promise of max_top_k, and those beside them that keep it."""
    top_k = torch.tensor([5, 0, 40, 5, 0, 3], dtype=torch.int32)
    top_p = torch.tensor([1.0, 0.999, 1.0, 0.5, 1.0, 1.0])
    call = _promised(_unfiltered(top_k=top_k, top_p=top_p), 5)
    shard = even_shard(call.vocab_size)
    drawn = call.on(shard)
    logits = call.roles[0].view(ROWS, 1, -1)
    twice = replace(
        call, roles=(logits.expand(-1, 2, -1),), drafts=torch.zeros(ROWS, 1, dtype=torch.int64),
        options={"mode": "rejection", "draft_logits": torch.zeros(ROWS, 1, call.vocab_size)},
    )  # fmt: skip
    verified = twice.on(shard)
    # The target needs one candidate; the drafter's row alone breaks the promise.
    peaked = torch.zeros(ROWS, 2, call.vocab_size)
    peaked[..., 7] = 1000.0
    drafted = replace(twice, roles=(peaked,)).on(shard)
    return {
        "status": drawn.status.tolist(), "tokens": drawn.token_ids.tolist(),
        "differ": _rows_differ(drawn, call.whole("cpu")),
        "verified": verified.status.tolist(), "accepted": verified.num_accepted.tolist(),
        "verify differs": _rows_differ(verified, twice.whole("cpu")),
        "drafted": drafted.status.tolist(), "drafts accepted": drafted.num_accepted.tolist(),
    }  # fmt: skip


def requests() -> dict[str, Any]:
    """Parameters as an engine has them: requests, one or one a row, and keywords."""
    call = _unfiltered()
    shard = even_shard(call.vocab_size)
    one = ptk.SamplingParams(temperature=0.8, top_p=0.9, seed=5)
    many = [ptk.SamplingParams(top_k=i, seed=i) for i in range(ROWS)]
    found = {}
    for name, given in (("one", one), ("many", many)):
        asked = replace(call, params=given)
        found[name] = _rows_differ(asked.on(shard), asked.whole("cpu"))
    base = call.roles[0]
    part = base[:, shard.vocab_start : shard.vocab_start + shard.size]
    values: dict[str, Any] = {"temperature": 0.7, "top_k": torch.arange(ROWS), "seed": 3}
    drawn = ptk.sharded.sample(part, shard=shard, **values)
    whole = ptk.sample(base, vocab_size=call.vocab_size, backend="cpu", **values)
    found["keywords"] = _rows_differ(drawn, whole)
    return found


CHECKS: dict[str, Callable[[], Any]] = {
    "traffic": traffic,
    "refusals": refusals,
    "promises": promises,
    "requests": requests,
}
