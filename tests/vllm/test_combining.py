"""compute_logits on shards of the vocabulary, with stand-ins for members, ranks and gathers."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

import torch
from torch import Tensor

ROWS = 3


class Ranks:
    """Ranks as threads; a gather joins what all of them bring."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.brought: list[Any] = [None] * count
        self.barrier = threading.Barrier(count)
        self.here = threading.local()
        self.gathers = 0

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self.count == 1:
            return tensor
        self.brought[self.here.rank] = tensor
        if self.barrier.wait() == 0:
            self.gathers += 1
        joined = torch.cat(self.brought, dim=-1)
        self.barrier.wait()
        return joined

    def run(self, function: Any) -> list[Any]:
        results: list[Any] = [None] * self.count

        def call(rank: int) -> None:
            self.here.rank = rank
            results[rank] = function(rank)

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def shard(logits: Tensor, rank: int, count: int) -> Tensor:
    """A rank's part, as vLLM pads: to a multiple of 64, of which each rank has as much."""
    if count == 1:
        return logits
    width = -(-logits.shape[-1] // 64) * 64
    padded = torch.nn.functional.pad(logits, (0, width - logits.shape[-1]))
    return padded.chunk(count, dim=-1)[rank].contiguous()


# Widths of base, expert and anti, the agreed one, ranks, and the gathers that it takes.
CASES = {
    "one-rank": ((300, 300, 300), 300, 1, 0),
    "one-rank-padded": ((320, 384, 300), 262, 1, 0),
    "two-ranks": ((300, 300, 300), 300, 2, 1),
    "two-ranks-padded-to-one-width": ((262, 320, 300), 262, 2, 1),
    "two-ranks-agreed-within-the-last-shard": ((320, 320, 320), 262, 2, 1),
    "two-ranks-padded-differently": ((320, 384, 300), 262, 2, 3),
    "wider-base": ((384, 262, 262), 262, 2, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("widths", "agreed", "count", "gathers"), CASES.values(), ids=CASES)
def test_every_rank_has_the_whole_combination(widths, agreed, count, gathers, dtype, monkeypatch):
    from proxytune_kernels.integrations.vllm_plugin import model

    torch.manual_seed(0)
    logits = [torch.randn(ROWS, width).to(dtype) for width in widths]
    alpha = torch.tensor([1.0, 0.0, -0.37])
    ranks = Ranks(count)
    monkeypatch.setattr(model, "tensor_model_parallel_all_gather", ranks.all_gather)
    monkeypatch.setattr(model, "get_tensor_model_parallel_world_size", lambda: count)

    def rank_logits(rank: int) -> Tensor:
        # A member whose logits are its shard, whatever it is given.
        members = [
            SimpleNamespace(compute_logits=lambda hidden, x=x: shard(x, rank, count))
            for x in logits
        ]
        trio: Any = SimpleNamespace(
            widths=[8, 4, 4, 4 // dtype.itemsize],
            members=dict(zip(("base", "expert", "anti"), members, strict=True)),
            agreed=agreed,
            # A sampler that draws from parts gets whole rows where the parts do not match.
            in_parts=gathers == 3,
            vocab_size=widths[0],
        )
        hidden = torch.cat([torch.zeros(ROWS, 16, dtype=dtype), alpha.view(-1, 1).view(dtype)], -1)
        return model.ProxyTunedForCausalLM.compute_logits(trio, hidden)

    base, expert, anti = (x[:, :agreed].double() for x in logits)
    wanted = base + alpha.double().view(-1, 1) * (expert - anti)
    for x in ranks.run(rank_logits):
        assert x.shape == (ROWS, widths[0])
        # Two roundings in fp32 of numbers below 16: the difference, times alpha, and the sum.
        assert (x[:, :agreed].double() - wanted).abs().max() < 16 * 2**-23
        assert bool((x[:, agreed:] == -torch.inf).all())
        assert torch.equal(x[1, :agreed], logits[0][1, :agreed].float())
    assert ranks.gathers == gathers
