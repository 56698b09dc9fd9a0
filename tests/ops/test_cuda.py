"""What only a CUDA device shows: graphs, streams, synchronisation, memory, far strides.

Of Triton's kernels and of the CUDA C++ ones. The contract's tests take both up by their names where
they are usable; tests/cluster runs the source of the latter on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels import kernels
from tests.ops import oracle
from tests.ops.conftest import NEEDS_CUDA, move
from tests.ops.test_sample_hidden import integer_heads

needs_device = pytest.mark.skipif(
    not torch.cuda.is_available() or kernels.interpreted() or kernels.unusable() is not None,
    reason="needs a CUDA device that the Triton kernels run on",
)
MARKS: dict[str, Any] = {"triton": [pytest.mark.triton, needs_device], "cuda": NEEDS_CUDA}
each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=marks) for name, marks in MARKS.items()]
)
needs_two_devices = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs a second CUDA device"
)

CUDA = torch.device("cuda")
VOCAB_SIZE = 20_000


Trio = tuple[Tensor, Tensor, Tensor]


def each(function: Callable[[Tensor], Tensor], trio: Trio) -> Trio:
    base, expert, anti = trio
    return function(base), function(expert), function(anti)


def rows(device: torch.device = CUDA) -> tuple[Trio, ptk.RowParams]:
    """Three roles [16, V] and parameters: rows of every kind, the last four flat with top_p 0.9."""
    found = oracle.random_rows(1, 16, VOCAB_SIZE, torch.bfloat16, padding=0)
    roles = found.base, found.expert, found.anti
    for role in roles:
        role[12:] = 0.1 * torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    params = ptk.RowParams(**found.params)
    params.temperature[:2] = 0.0
    params.top_p[12:], params.min_p[12:], params.top_k[12:] = 0.9, 0.0, 0
    params.temperature[10:] = 1.0
    on_device = ptk.RowParams(*(p.to(device) for p in params))
    return each(lambda role: role.to(device), roles), on_device


def requests() -> tuple[Trio, Tensor, Tensor, ptk.RowParams]:
    """The same rows as 4 requests of 4 positions, with drafts and the drafter's logits."""
    roles, params = rows()
    stacked = each(lambda role: role.view(4, 4, VOCAB_SIZE), roles)
    few = ptk.RowParams(*(p[::4].contiguous() for p in params))
    draft_logits = stacked[0][:, :3] + 0.1
    drafts = stacked[0][:, :3].argmax(-1)
    return stacked, drafts, draft_logits.contiguous(), few


def at(params: ptk.RowParams, step: int) -> ptk.RowParams:
    """The parameters ``step`` positions on, in tensors of their own."""
    return params._replace(position=params.position + step)


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call and the tensors that it writes; warmed up aside, as torch wants it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[], None]]:
    """From its call on, what makes the host wait for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def operators() -> dict[str, Callable[..., Any]]:
    """A call of each operator, all of its inputs made before."""
    roles, params = rows()
    stacked, drafts, draft_logits, few = requests()
    ids = torch.zeros((4, 4), dtype=torch.int64, device=CUDA)
    heads: Any = (*move(integer_heads(3, 16, VOCAB_SIZE), "cuda"), params)
    rejection: Any = {"mode": "rejection", "draft_logits": draft_logits}
    return {
        "sample": partial(ptk.sample, *roles, params),
        "top_logprobs": partial(ptk.sample, *roles, params, top_logprobs=20),
        "coupled": partial(ptk.verify, *stacked, drafts, few),
        "rejection": partial(ptk.verify, *stacked, drafts, few, **rejection),
        "sample_hidden": partial(ptk.sample_hidden, *heads, top_logprobs=5),
        "combine": partial(ptk.combine, *roles, params.alpha),
        "score": partial(ptk.score, *stacked, ids, few.alpha),
    }


OF_CUDA = ("sample", "top_logprobs", "coupled", "rejection")
each_operator = pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(backend, name, marks=MARKS[backend])
        for backend in MARKS
        for name in (*OF_CUDA, *(("sample_hidden", "combine", "score") * (backend == "triton")))
    ],
)


# torch's own: this check does not find every wait
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@each_operator
def test_no_call_waits_for_the_device(backend, name, no_synchronisation):
    call = partial(operators()[name], backend=backend)
    wanted = call()  # compiles
    torch.cuda.synchronize()
    no_synchronisation()
    found = call()
    torch.cuda.set_sync_debug_mode("default")
    oracle.assert_same(found, wanted)


@each_operator
def test_every_operator_can_be_captured(backend, name):
    call = partial(operators()[name], backend=backend)
    wanted = call()
    graph, result = captured(call)
    for _ in range(3):  # verify's counters are zero again
        for tensor in oracle.tensors(result).values():
            tensor.fill_(-7)
        graph.replay()
        oracle.assert_same(result, wanted)


@NEEDS_CUDA
@pytest.mark.parametrize("batch_size", (1, 3, 64))
@pytest.mark.parametrize("vocab_size", (2000, 30_000, 50_257, 128_256))
def test_every_size_of_cluster_draws_what_the_cpu_draws(vocab_size, batch_size):
    """Clusters of 1, 2, 4 and 8 blocks; of 16 where few rows are drawn at the last width."""
    found = oracle.random_rows(5, batch_size, vocab_size, torch.bfloat16)
    params = ptk.RowParams(**found.params)
    roles = (found.base, found.expert, found.anti)
    wanted = ptk.sample(*roles, params, vocab_size=vocab_size, backend="cpu")
    device = each(lambda role: role.to(CUDA), roles)
    on_device = ptk.RowParams(*(p.to(CUDA) for p in params))
    got = ptk.sample(*device, on_device, vocab_size=vocab_size, backend="cuda")
    for name in ("token_ids", "num_kept", "status"):
        assert torch.equal(getattr(got, name).cpu(), getattr(wanted, name)), name


@each_backend
def test_replays_draw_at_the_positions_that_are_written_between(backend):
    roles, params = rows()
    graph, result = captured(lambda: ptk.sample(*roles, params, backend=backend))
    first, drawn = at(params, 0), []
    for step in range(6):
        params.position.copy_(first.position + step)
        graph.replay()
        oracle.assert_same(result, ptk.sample(*roles, at(first, step), backend=backend))
        drawn.append(result.token_ids.tolist())
    flat = [tokens[12:] for tokens in drawn]
    assert len({tuple(tokens) for tokens in flat}) == 6  # of thousands of tokens each
    assert len({tuple(tokens[:2]) for tokens in drawn}) == 1  # greedy


@each_backend
def test_replays_see_other_logits_and_parameters(backend):
    """Also those that send a row another way: no launch depends on what was captured."""
    roles, params = rows()
    graph, result = captured(lambda: ptk.sample(*roles, params, backend=backend))
    order = torch.arange(15, -1, -1, device=CUDA)  # the flat rows first
    others, other_params = each(lambda role: role[order], roles), params.rows(order)
    for tensor, value in zip((*roles, *params), (*others, *other_params), strict=True):
        tensor.copy_(value)
    graph.replay()
    oracle.assert_same(result, ptk.sample(*others, other_params, backend=backend))
    params.temperature.fill_(0.0)
    graph.replay()
    greedy = other_params._replace(temperature=torch.zeros(16, device=CUDA))
    oracle.assert_same(result, ptk.sample(*others, greedy, backend=backend))


@each_backend
@pytest.mark.parametrize("mode", ("coupled", "rejection"))
def test_replays_of_verify(backend, mode):
    roles, drafts, draft_logits, params = requests()
    given: Any = {"mode": mode, "backend": backend}
    given |= {} if mode == "coupled" else {"draft_logits": draft_logits}
    graph, result = captured(lambda: ptk.verify(*roles, drafts, params, **given))
    first = at(params, 0)
    for step in range(4):
        params.position.copy_(first.position + 4 * step)
        if step == 2:
            drafts.fill_(-1)
        graph.replay()
        wanted = ptk.verify(*roles, drafts, at(first, 4 * step), **given)
        oracle.assert_same(result, wanted)


@each_backend
@pytest.mark.parametrize("op", ("sample", "verify"))
def test_two_streams_at_once(backend, op):
    """Each call of verify has a workspace of its own."""
    roles, params = rows()
    call: Any = partial(ptk.sample, *roles, backend=backend)
    if op == "verify":
        stacked, drafts, _, params = requests()
        call = partial(ptk.verify, *stacked, drafts, backend=backend)
    inputs = [at(params, i) for i in range(12)]
    wanted = [call(given) for given in inputs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = []
    for i, given in enumerate(inputs):
        with torch.cuda.stream(streams[i % 2]):
            found.append(call(given))
    torch.cuda.synchronize()
    for one, other in zip(found, wanted, strict=True):
        oracle.assert_same(one, other)


@needs_two_devices
@each_backend
def test_tensors_on_another_device_than_the_current_one(backend):
    second = torch.device("cuda", 1)
    roles, params = rows()
    wanted = ptk.sample(*roles, params, top_logprobs=3, backend=backend)
    roles, params = rows(second)
    with torch.cuda.device(0):
        found = ptk.sample(*roles, params, top_logprobs=3, backend=backend)
        assert torch.cuda.current_device() == 0
    assert found.token_ids.device == second
    oracle.assert_same(oracle.each(Tensor.cpu, found), oracle.each(Tensor.cpu, wanted))


@NEEDS_CUDA
def test_direct_callers_are_kept_on_one_device():
    roles, params = rows()
    cpu = params._replace(seed=params.seed.cpu())
    with pytest.raises(RuntimeError, match="all tensors must be on the device of base"):
        torch.ops.proxytune_cuda.sample(*roles, *cpu, None, None, None, None, VOCAB_SIZE, 0)


@NEEDS_CUDA
def test_no_rows():
    base = torch.zeros((0, 1000), device=CUDA)
    assert ptk.sample(base, backend="cuda").token_ids.shape == (0,)
    drafts = torch.zeros((0, 2), dtype=torch.int64, device=CUDA)
    out = ptk.verify(torch.zeros((0, 3, 1000), device=CUDA), None, None, drafts, backend="cuda")
    assert out.token_ids.shape == (0, 3)


@each_backend
def test_outputs_are_used_again_and_inputs_left_alone(backend):
    roles, params = rows()
    copies = [t.clone() for t in (*roles, *params)]
    out = ptk.sample(*roles, params, backend=backend)
    places = {name: t.data_ptr() for name, t in oracle.tensors(out).items()}
    for step in range(3):
        given = at(params, step)
        wanted = ptk.sample(*roles, given, backend=backend)
        assert ptk.sample(*roles, given, out=out, backend=backend) is out
        oracle.assert_same(out, wanted)
    assert {name: t.data_ptr() for name, t in oracle.tensors(out).items()} == places
    for tensor, copy in zip((*roles, *params), copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.triton
@needs_device
def test_triton_is_the_default_and_the_registered_operator():
    roles, params = rows()
    assert ptk.backends()["triton"] is None
    wanted = ptk.sample(*roles, params, backend="triton")
    oracle.assert_same(ptk.sample(*roles, params), wanted)
    given = *params, None, None, None, None, VOCAB_SIZE, 0, 0, None
    direct = torch.ops.proxytune.sample(*roles, *given)
    oracle.assert_same(ptk.SampleOutput(*direct[:5]), wanted)


@pytest.mark.parametrize(
    ("backend", "most"),
    [
        # docs/gpu.md: 18 bytes per 128 tokens and 78 KB a row, here 0.7 of the 2 bytes of a logit.
        pytest.param("triton", 131_072 // 128 * 18 + 80_000, marks=MARKS["triton"]),
        pytest.param("cuda", 0, marks=NEEDS_CUDA),
    ],
)
def test_nothing_of_the_size_of_the_logits_is_allocated(backend, most):
    base = torch.randn(64, 131_072, device=CUDA).bfloat16()
    params = ptk.RowParams.make(64, device=CUDA, top_p=0.9)
    out = ptk.sample(base, base, base, params, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ptk.sample(base, base, base, params, out=out, backend=backend)
    assert torch.cuda.max_memory_allocated() - before <= 64 * most


# torch's own, of its compiler
@pytest.mark.filterwarnings("default")
@each_backend
def test_compiled_with_cuda_graphs(backend):
    roles, params = rows()

    def step(base: Tensor, expert: Tensor, anti: Tensor, params: ptk.RowParams) -> Any:
        out = ptk.sample(base * 2, expert, anti, params, backend=backend)
        return out.token_ids + 1, out.logprobs

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for i in range(4):
        given = at(params, i)
        found = [t.clone() for t in compiled(*roles, given)]
        for one, other in zip(found, step(*roles, given), strict=True):
            assert torch.equal(oracle.bits(one), oracle.bits(other))


FAR = 2**30 + 8  # elements from one row to the next: the third begins past 2^31
FAR_BYTES = 3 * FAR * 2


@pytest.fixture
def far() -> Iterator[Tensor]:
    """fp16 [3, FAR], unwritten."""
    if torch.cuda.mem_get_info()[0] < FAR_BYTES + 2**30:
        pytest.skip(f"needs {(FAR_BYTES + 2**30) / 1e9:.0f} GB of free device memory")
    yield torch.empty((3, FAR), dtype=torch.float16, device=CUDA)
    torch.cuda.empty_cache()


@each_backend
def test_rows_more_than_2_31_elements_apart(far, backend):
    """Of each role, of sample's batch, and of verify's and score's positions."""
    size = 5000
    base, expert, anti = torch.randn(3, 3, size, device=CUDA).half()
    near = base, expert, anti
    roles = far[:, :size], far[:, size : 2 * size], far[:, 2 * size : 3 * size]
    for role, values in zip(roles, near, strict=True):
        role.copy_(values)
    params = ptk.RowParams.make(3, device=CUDA, top_p=torch.tensor([1.0, 0.9, 0.5]), seed=3)
    found, wanted = (ptk.sample(*trio, params, backend=backend) for trio in (roles, near))
    oracle.assert_same(found, wanted)
    assert torch.equal(ptk.combine(*roles), ptk.combine(*near))
    ids = torch.tensor([[1, 2, 3]], device=CUDA)
    one = params.rows(slice(0, 1))
    apart, close = each(lambda t: t[None], roles), each(lambda t: t[None], near)
    assert torch.equal(ptk.score(*apart, ids), ptk.score(*close, ids))
    for far_drafts, near_drafts in ((None, None), (apart[1][:, :2], close[1][:, :2])):
        mode = "coupled" if far_drafts is None else "rejection"
        verified = (
            ptk.verify(*trio, ids[:, :2], one, mode=mode, draft_logits=drafts, backend=backend)
            for trio, drafts in ((apart, far_drafts), (close, near_drafts))
        )
        oracle.assert_same(*verified)


@pytest.mark.triton
@needs_device
def test_a_view_keeps_its_place_when_it_moves():
    """The fixture of the other tests: strides, misalignment and what lies around come along."""
    store = torch.arange(30.0)
    view = move(store[3:27].view(2, 12)[:, :5], "cuda")
    assert (view.stride(), view.storage_offset()) == ((12, 1), 3)
    assert view.untyped_storage().nbytes() == store.untyped_storage().nbytes()
    assert torch.equal(view.cpu(), store[3:27].view(2, 12)[:, :5])
