"""What only a device shows of the CUDA C++ kernels: graphs, streams, memory, several devices.

The contract's tests take the backend up by its name where it is usable; tests/cluster runs the same
source on a CPU. None of this has run yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from tests.ops import oracle
from tests.ops.conftest import NEEDS_CUDA
from tests.ops.test_cuda import (
    CUDA,
    VOCAB_SIZE,
    at,
    captured,
    each,
    far,  # noqa: F401  (a fixture)
    no_synchronisation,  # noqa: F401  (a fixture)
    requests,
    rows,
)

pytestmark = NEEDS_CUDA

NAMES = ("sample", "top_logprobs", "coupled", "rejection")
WIDTHS = (2000, 30_000, 50_257, 128_256)
"""For clusters of 1, 2, 4 and 8 blocks; of 16 where few rows are drawn at the last."""


def operators() -> dict[str, Callable[[], Any]]:
    """A call of each operator, all of its inputs made before."""
    roles, params = rows()
    stacked, drafts, draft_logits, few = requests()
    given: Any = {"mode": "rejection", "draft_logits": draft_logits, "backend": "cuda"}
    return {
        "sample": lambda: ptk.sample(*roles, params, backend="cuda"),
        "top_logprobs": lambda: ptk.sample(*roles, params, top_logprobs=20, backend="cuda"),
        "coupled": lambda: ptk.verify(*stacked, drafts, few, backend="cuda"),
        "rejection": lambda: ptk.verify(*stacked, drafts, few, **given),
    }


# torch's own: this check does not find every wait
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_no_call_waits_for_the_device(name, no_synchronisation):  # noqa: F811
    call = operators()[name]
    wanted = call()
    torch.cuda.synchronize()
    no_synchronisation()
    found = call()
    torch.cuda.set_sync_debug_mode("default")
    oracle.assert_same(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_can_be_captured(name):
    call = operators()[name]
    wanted = call()
    graph, result = captured(call)
    for _ in range(3):  # the counters of verify are zero again
        for tensor in oracle.tensors(result).values():
            tensor.fill_(-7)
        graph.replay()
        oracle.assert_same(result, wanted)


@pytest.mark.parametrize("batch_size", (1, 3, 64))
@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_every_size_of_cluster_draws_what_the_cpu_draws(vocab_size, batch_size):
    found = oracle.random_rows(5, batch_size, vocab_size, torch.bfloat16)
    params = ptk.RowParams(**found.params)
    roles = (found.base, found.expert, found.anti)
    wanted = ptk.sample(*roles, params, vocab_size=vocab_size, backend="cpu")
    device = each(lambda role: role.to(CUDA), roles)
    on_device = ptk.RowParams(*(p.to(CUDA) for p in params))
    got = ptk.sample(*device, on_device, vocab_size=vocab_size, backend="cuda")
    for name in ("token_ids", "num_kept", "status"):
        assert torch.equal(getattr(got, name).cpu(), getattr(wanted, name)), name


def test_two_streams_at_once():
    """Each call of verify has a workspace of its own."""
    stacked, drafts, _, params = requests()
    inputs = [at(params, i) for i in range(12)]
    wanted = [ptk.verify(*stacked, drafts, given, backend="cuda") for given in inputs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = []
    for i, given in enumerate(inputs):
        with torch.cuda.stream(streams[i % 2]):
            found.append(ptk.verify(*stacked, drafts, given, backend="cuda"))
    torch.cuda.synchronize()
    for one, other in zip(found, wanted, strict=True):
        oracle.assert_same(one, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_tensors_on_another_device_than_the_current_one():
    roles, params = rows()
    wanted = ptk.sample(*roles, params, backend="cuda")
    roles, params = rows(torch.device("cuda", 1))
    with torch.cuda.device(0):
        found = ptk.sample(*roles, params, backend="cuda")
        assert torch.cuda.current_device() == 0
    oracle.assert_same(oracle.each(Tensor.cpu, found), oracle.each(Tensor.cpu, wanted))


def test_direct_callers_are_kept_on_one_device():
    roles, params = rows()
    cpu = params._replace(seed=params.seed.cpu())
    with pytest.raises(RuntimeError, match="all tensors must be on the device of base"):
        torch.ops.proxytune_cuda.sample(*roles, *cpu, None, None, VOCAB_SIZE, 0)


def test_no_rows():
    base = torch.zeros((0, 1000), device=CUDA)
    assert ptk.sample(base, backend="cuda").token_ids.shape == (0,)
    drafts = torch.zeros((0, 2), dtype=torch.int64, device=CUDA)
    out = ptk.verify(torch.zeros((0, 3, 1000), device=CUDA), None, None, drafts, backend="cuda")
    assert out.token_ids.shape == (0, 3)


def test_nothing_but_the_results_is_allocated():
    base = torch.randn(64, 131_072, device=CUDA).bfloat16()
    params = ptk.RowParams.make(64, device=CUDA, top_p=0.9)
    out = ptk.sample(base, base, base, params, backend="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ptk.sample(base, base, base, params, out=out, backend="cuda")
    assert torch.cuda.max_memory_allocated() == before


def test_rows_more_than_2_31_elements_apart(far):  # noqa: F811
    near = torch.randn(3, 5000, device=CUDA).half()
    far[:, :5000].copy_(near)
    params = ptk.RowParams.make(3, device=CUDA, top_p=torch.tensor([1.0, 0.9, 0.5]), seed=3)
    found, wanted = (ptk.sample(t, None, None, params, vocab_size=5000, backend="cuda")
                     for t in (far, near))  # fmt: skip
    oracle.assert_same(found, wanted)


# torch's own, of its compiler
@pytest.mark.filterwarnings("default")
def test_compiled_with_cuda_graphs():
    roles, params = rows()

    def step(base: Tensor, expert: Tensor, anti: Tensor, params: ptk.RowParams) -> Any:
        out = ptk.sample(base * 2, expert, anti, params, backend="cuda")
        return out.token_ids + 1, out.logprobs

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for i in range(4):
        given = at(params, i)
        found = [t.clone() for t in compiled(*roles, given)]
        for one, other in zip(found, step(*roles, given), strict=True):
            assert torch.equal(oracle.bits(one), oracle.bits(other))
