"""The check of the sharded path on one device, with a processor in the place of the GPU."""

import threading

import pytest
import torch.distributed as dist

import proxytune_kernels as ptk
from benchmarks.gpu import shards
from tests.benchmarks.gpu_device import CpuDevice

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
    pytest.mark.skipif(ptk.backends()["cpu"] is not None, reason="needs the C++ extension"),
]


def test_parts_draw_what_the_whole_row_draws():
    outcome = shards.check_shards(CpuDevice(), rows=8)
    # 1 + 2 + 4 + 8 ranks and a group of 1, two kinds of logits
    assert not outcome.failed and outcome.fields == {"rows": 8 * 16 * 2, "wrong": []}
    assert "256 rows on 1 to 8 ranks" in outcome.sentence
    assert not dist.is_initialized()


def test_a_difference_is_named(monkeypatch):
    whole = ptk.sample

    def shifted(*args, **kwargs):
        out = whole(*args, **kwargs)
        out.token_ids[3] += 1
        return out

    monkeypatch.setattr(ptk, "sample", shifted)
    outcome = shards.check_shards(CpuDevice(), rows=8)
    assert outcome.failed
    assert "flat, 4 ranks: 4 of 32 rows" in outcome.sentence


def test_an_error_of_one_rank_ends_the_others(monkeypatch):
    draw = ptk.sharded.sample

    def fails_on_the_second(*args, shard, **kwargs):
        if shard.vocab_start == shards._parts(shards.SPLITS[1])[0][1]:
            raise RuntimeError("out of memory")
        return draw(*args, shard=shard, **kwargs)

    monkeypatch.setattr(ptk.sharded, "sample", fails_on_the_second)
    with pytest.raises((RuntimeError, threading.BrokenBarrierError)):
        shards.check_shards(CpuDevice(), rows=2)
