"""The operators as torch sees them: schemas, fakes, out twins, compiled and exported graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import proxytune_kernels as ptk
from proxytune_kernels import reference
from proxytune_kernels.ops.backends import BY_NAME
from proxytune_kernels.ops.table import OPERATORS
from tests.ops import oracle
from tests.ops.conftest import NEEDS_CUDA, WIDEST, move

# Triton's interpreter runs on tensors of the CPU, for which torch calls the C++ kernels. The CUDA
# C++ kernels' operators are not those of the public functions' default.
on_device = pytest.mark.parametrize(
    "device",
    [pytest.param(k.device, id=k.name) for k in WIDEST if not k.interpreted and k.name != "cuda"],
)

OPS = torch.ops.proxytune
B, T, V = 3, 4, 70
NAMES = ("sample", "combine", "score", "verify")


def arguments(name: str, optional: bool, device: str) -> tuple[Any, ...]:
    """Arguments of the operator; ``optional``: with all of those that may be absent."""
    return move(_arguments(name, optional), device)


def _arguments(name: str, optional: bool) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    params = ptk.RowParams(**oracle.random_params(g, B, V))
    flat = name in ("sample", "combine")
    shape = (B, V) if flat else (B, T, V)
    base = randn(*shape)
    pair = (randn(*shape).half(), randn(*shape).half()) if optional else (None, None)
    bias = randn(*shape) if optional else None
    mask = torch.full((*shape[:-1], -(-V // 32)), -1, dtype=torch.int32) if optional else None
    if name == "sample":
        return (base, *pair, *params, bias, mask, V, 0, 5 * optional)
    if name == "combine":
        return (base, *pair, params.alpha, bias, mask, V)
    if name == "score":
        return (base, *pair, torch.zeros(B, T, dtype=torch.int64), params.alpha, V)
    # Drafts that are accepted, so that no output is NaN: opcheck takes that for a difference.
    draft_logits: Any = None
    if optional:
        rows: Any = [t.flatten(0, 1) for t in (base, *pair, bias, mask)]
        alpha = params.alpha.repeat_interleave(T)
        x = reference.combine(rows[0], rows[1], rows[2], alpha, rows[3], rows[4])
        draft_logits = x.view(B, T, V)[:, : T - 1].contiguous()
    steps = [params._replace(position=params.position + j) for j in range(T - 1)]
    drawn = [reference.sample((draft_logits if optional else base)[:, j], p)
             for j, p in enumerate(steps)]  # fmt: skip
    drafts = torch.stack([d.token_ids for d in drawn], 1)
    return (base, *pair, drafts, draft_logits, *params, bias, mask, V, int(optional))


def results(name: str, given: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    out = getattr(OPS, name)(*given)
    out = out if isinstance(out, (tuple, list)) else (out,)
    return dict(zip(OPERATORS[name].out_names, out, strict=True))


@on_device
@pytest.mark.parametrize("optional", (False, True))
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, optional, device):
    given = arguments(name, optional, device)
    torch.library.opcheck(getattr(OPS, name).default, given)
    outs = {n: torch.empty_like(t) for n, t in results(name, given).items()}
    torch.library.opcheck(getattr(OPS, f"{name}_out").default, given, outs)


@on_device
@pytest.mark.parametrize("name", NAMES)
def test_out_twins_write_the_same(name, device):
    given = arguments(name, True, device)
    plain = results(name, given)
    outs = {n: torch.full_like(t, -7) for n, t in plain.items()}
    assert getattr(OPS, f"{name}_out")(*given, **outs) is None
    for n, t in plain.items():
        assert torch.equal(oracle.bits(outs[n]), oracle.bits(t))


@on_device
@pytest.mark.parametrize("name", NAMES)
def test_meta_shapes(name, device):
    given = arguments(name, True, device)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in given]
    fake = getattr(OPS, name)(*meta)
    fake = fake if isinstance(fake, (tuple, list)) else (fake,)
    for f, t in zip(fake, results(name, given).values(), strict=True):
        assert (f.shape, f.dtype, f.device.type) == (t.shape, t.dtype, "meta")


CUDA_OPS = torch.ops.proxytune_cuda
CUDA_NAMES = BY_NAME["cuda"].operators


@pytest.mark.parametrize("name", [f"{name}{twin}" for name in CUDA_NAMES for twin in ("", "_out")])
def test_the_cuda_operators_are_defined_as_the_others(name):
    schema, other = (str(getattr(ops, name).default._schema) for ops in (CUDA_OPS, OPS))
    assert schema == other.replace("proxytune::", "proxytune_cuda::")


@pytest.mark.parametrize("optional", (False, True))
@pytest.mark.parametrize("name", CUDA_NAMES)
def test_meta_shapes_of_the_cuda_operators(name, optional):
    given = arguments(name, optional, "cpu")
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in given]
    fake, wanted = getattr(CUDA_OPS, name)(*meta), getattr(OPS, name)(*meta)
    assert [(f.shape, f.dtype, f.device) for f in fake] == [
        (w.shape, w.dtype, w.device) for w in wanted
    ]


@NEEDS_CUDA
@pytest.mark.parametrize("optional", (False, True))
@pytest.mark.parametrize("name", CUDA_NAMES)
def test_opcheck_of_the_cuda_operators(name, optional):
    given = arguments(name, optional, "cuda")
    run, twin = (getattr(CUDA_OPS, n).default for n in (name, f"{name}_out"))
    torch.library.opcheck(run, given)
    names = OPERATORS[name].out_names
    outs = {n: torch.full_like(t, -7) for n, t in zip(names, run(*given), strict=True)}
    torch.library.opcheck(twin, given, outs)
    twin(*given, **outs)
    for written, plain in zip(outs.values(), run(*given), strict=True):
        assert torch.equal(oracle.bits(written), oracle.bits(plain))


def _public(base, expert, anti, bias, params, ids):
    """All four public operators, in one graph with operations of torch around them."""
    x = ptk.combine(base * 2, expert, anti, params.alpha)
    drawn = ptk.sample(base * 2, expert, anti, params, bias=bias)
    listed = ptk.sample(base * 2, expert, anti, params, top_logprobs=3)
    b, e, a = (torch.stack([t, t + 1, t], 1) for t in (base, expert, anti))
    scored = ptk.score(b, e, a, ids, params.alpha)
    coupled = ptk.verify(b, e, a, drawn.token_ids[:, None].expand(-1, 2).contiguous(), params)
    rejected = ptk.verify(
        b, e, a, ids[:, :2].contiguous(), params, mode="rejection", draft_logits=b[:, :2]
    )
    assert drawn.top is None and listed.top is not None
    return (x + 1, *drawn[:-1], *listed[:-1], *listed.top, scored, *coupled, *rejected)


# torch's own, at the import of its compiler
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@on_device
@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_compile_fullgraph(compiler, device):
    g = torch.Generator().manual_seed(2)
    base, expert, anti, bias = (torch.randn(B, V, generator=g) for _ in range(4))
    params = ptk.RowParams(**oracle.random_params(g, B, V))
    ids = torch.randint(V, (B, 3), generator=g)
    compiled = torch.compile(_public, fullgraph=True, backend=compiler)
    inputs = move((base, expert, anti, bias, params, ids), device)
    for a, b in zip(compiled(*inputs), _public(*inputs), strict=True):
        assert torch.equal(oracle.bits(a), oracle.bits(b))


@on_device
@pytest.mark.parametrize("top_logprobs", (0, 4))
def test_compile_with_single_parameters_and_out(top_logprobs, device):
    values: Any = dict(temperature=0.7, top_p=0.9, seed=5, position=2, top_logprobs=top_logprobs)

    def step(base, out):
        ptk.sample(base, **values, out=out)
        return out.token_ids + 1

    base = move(torch.randn(B, V, generator=torch.Generator().manual_seed(3)), device)
    plain = ptk.sample(base, **values)
    out = oracle.each(lambda t: torch.full_like(t, -9), plain)
    tokens = torch.compile(step, fullgraph=True, backend="aot_eager")(base, out)
    assert torch.equal(tokens, plain.token_ids + 1)
    oracle.assert_same(out, plain)


def test_out_is_written_and_returned(backend):
    """What is returned is ``out`` itself: the fixture asserts that of the operator."""
    rows = oracle.random_rows(4, B * T, V, padding=0)
    stacked = [t.view(B, T, V) for t in rows[:3]]
    params = ptk.RowParams(**rows.params)
    few = params.rows(slice(0, B))
    ids = torch.zeros(B, T, dtype=torch.int64)

    calls: list[Any] = [
        (backend.sample, (*rows[:3], params)),
        (backend.combine, (*rows[:3], params.alpha)),
        (backend.score, (*stacked, ids, few.alpha)),
        (backend.verify, (*stacked, ids[:, 1:], few)),
    ]
    for op, args in calls:
        plain = op(*args)
        out = oracle.each(lambda t: torch.full_like(t, -7), plain)
        assert op(*args, out=out) is out
        oracle.assert_same(out, plain)


def test_results_share_no_memory_between_calls(backend):
    row = torch.zeros(2, 5)
    first = backend.sample(row, seed=1)
    copy = oracle.each(torch.clone, first)
    backend.sample(row + 1, seed=2, top_k=1)
    oracle.assert_same(first, copy)


def test_inputs_are_not_written(backend):
    rows = oracle.random_rows(9, 20, 300)
    copies = [t.clone() for t in (*rows[:3], *rows.params.values())]
    backend.sample(*rows[:3], ptk.RowParams(**rows.params), vocab_size=300)
    for a, b in zip((*rows[:3], *rows.params.values()), copies, strict=True):
        assert torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
