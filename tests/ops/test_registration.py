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
from tests.ops.test_sample_hidden import integer_heads, params_of

OPS = torch.ops.proxytune
CUDA_OPS = torch.ops.proxytune_cuda
CUDA_NAMES = BY_NAME["cuda"].operators
B, T, V = 3, 4, 70
NAMES = ("sample", "combine", "score", "verify", "sample_hidden")
# Triton's interpreter runs on tensors of the CPU, for which torch calls the C++ kernels.
DEVICES = [k for k in WIDEST if not k.interpreted and k.name != "cuda"]
on_device = pytest.mark.parametrize("device", [pytest.param(k.device, id=k.name) for k in DEVICES])
# The CUDA C++ kernels' operators are not those of the public functions' default.
CALLS = [
    *(pytest.param(OPS, name, k.device, id=f"{name}-{k.name}") for name in NAMES for k in DEVICES),
    *(pytest.param(CUDA_OPS, name, "cuda", id=f"{name}-cuda", marks=NEEDS_CUDA)
      for name in CUDA_NAMES),
]  # fmt: skip


def arguments(name: str, optional: bool, device: str) -> tuple[Any, ...]:
    """Arguments of the operator; ``optional``: with all of those that may be absent."""
    return move(_arguments(name, optional), device)


def _arguments(name: str, optional: bool) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    params = ptk.RowParams(**oracle.random_params(g, B, V))
    flat = name in ("sample", "combine", "sample_hidden")
    shape = (B, V) if flat else (B, T, V)
    base = randn(*shape)
    pair = (randn(*shape).half(), randn(*shape).half()) if optional else (None, None)
    bias = randn(*shape) if optional else None
    mask = torch.full((*shape[:-1], -(-V // 32)), -1, dtype=torch.int32) if optional else None
    # They change nothing: the drafts below are those without.
    ids = torch.arange(7).expand(*shape[:-1], 7)
    edits: Any = ptk.Edits.make(ids) if optional else (None, None)
    if name == "sample":
        attributed = torch.arange(-1, B - 1) if optional else None
        # Where alpha is 0 the pair's probabilities are NaN.
        params = params._replace(alpha=params.alpha.masked_fill(params.alpha == 0, 2.0))
        return (base, *pair, *params, bias, mask, *edits, V, 0, 5 * optional, attributed)
    if name == "combine":
        return (base, *pair, params.alpha, bias, mask, *edits, V)
    if name == "sample_hidden":
        first, expert, anti = integer_heads(30, B, V)
        absent: Any = ptk.Head(None, None)  # type: ignore[arg-type]
        anti = anti._replace(bias=torch.arange(float(V)), logit_scale=0.5, soft_cap=9.0)
        others = (*expert, *anti) if optional else (*absent, *absent)
        row = params_of(30, B, V)
        return (*first, *others, *row, bias, mask, V, 0, 5 * optional)
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
    return (base, *pair, drafts, draft_logits, *params, bias, mask, *edits, V, int(optional))


def listed(out: Any) -> tuple[torch.Tensor, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def assert_fakes(run: Any, given: tuple[Any, ...], wanted: Any) -> None:
    """What a call on meta tensors gives has the shapes and dtypes of the results."""
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in given]
    for fake, value in zip(listed(run(*meta)), wanted, strict=True):
        assert (fake.shape, fake.dtype, fake.device.type) == (value.shape, value.dtype, "meta")


@pytest.mark.parametrize("optional", (False, True))
@pytest.mark.parametrize(("operators", "name", "device"), CALLS)
def test_opcheck_fakes_and_out_twin(operators, name, device, optional):
    given = arguments(name, optional, device)
    run, twin = (getattr(operators, n).default for n in (name, f"{name}_out"))
    torch.library.opcheck(run, given)
    results = listed(run(*given))
    assert_fakes(run, given, results)
    names = OPERATORS[name].out_names
    outs = {n: torch.full_like(t, -7) for n, t in zip(names, results, strict=True)}
    torch.library.opcheck(twin, given, outs)
    assert twin(*given, **outs) is None
    for written, value in zip(outs.values(), results, strict=True):
        assert torch.equal(oracle.bits(written), oracle.bits(value))
    if "top_logprobs" in OPERATORS[name].argument_names and not optional:
        alone = {n: t for n, t in outs.items() if not n.startswith(("out_top", "out_attribution"))}
        torch.library.opcheck(twin, given, alone)


@pytest.mark.parametrize("name", [f"{name}{twin}" for name in CUDA_NAMES for twin in ("", "_out")])
def test_the_cuda_operators_are_defined_as_the_others(name):
    schema, other = (str(getattr(ops, name).default._schema) for ops in (CUDA_OPS, OPS))
    assert schema == other.replace("proxytune::", "proxytune_cuda::")


@pytest.mark.parametrize("optional", (False, True))
@pytest.mark.parametrize("name", CUDA_NAMES)
def test_fakes_of_the_cuda_operators(name, optional):
    given = arguments(name, optional, "cpu")
    assert_fakes(getattr(CUDA_OPS, name), given, listed(getattr(OPS, name)(*given)))


def _public(inputs, out):
    """All public operators, in one graph with operations of torch around them."""
    base, expert, anti, bias, params, ids, heads = inputs
    x = ptk.combine(base * 2, expert, anti, params.alpha)
    drawn = ptk.sample(base * 2, expert, anti, params, bias=bias)
    likely = ptk.sample(base * 2, expert, anti, params, top_logprobs=3)
    b, e, a = (torch.stack([t, t + 1, t], 1) for t in (base, expert, anti))
    scored = ptk.score(b, e, a, ids, params.alpha)
    coupled = ptk.verify(b, e, a, drawn.token_ids[:, None].expand(-1, 2).contiguous(), params)
    rejected = ptk.verify(
        b, e, a, ids[:, :2].contiguous(), params, mode="rejection", draft_logits=b[:, :2]
    )
    first, second, third = heads
    first = first._replace(hidden=first.hidden * 1)
    hidden = ptk.sample_hidden(first, second, third, params, top_logprobs=2)
    again = ptk.sample_hidden(first, second, third, temperature=3.0, seed=9, out=out)
    assert drawn.top is None and likely.top is not None and hidden.top is not None
    assert drawn.attribution is None
    return (
        *(x + 1, *drawn[:-2], *likely[:-2], *likely.top, scored, *coupled, *rejected),
        *(*hidden[:-2], *hidden.top, again.logprobs + 1),
    )


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
    inputs = move((base, expert, anti, bias, params, ids, integer_heads(31, B, V)), device)
    out = ptk.sample_hidden(*inputs[-1], temperature=3.0, seed=9)
    written = oracle.each(lambda t: torch.full_like(t, -7), out)
    wanted = _public(inputs, oracle.each(torch.clone, out))
    for a, b in zip(compiled(inputs, written), wanted, strict=True):
        assert torch.equal(oracle.bits(a), oracle.bits(b))
    oracle.assert_same(written, out)


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

    hidden = (*integer_heads(22, 4, 100), params_of(22, 4, 100))
    calls: list[tuple[Any, Any, dict[str, int]]] = [
        (backend.sample, (*rows[:3], params), {}),
        (backend.sample, (*rows[:3], params), {"top_logprobs": 6}),
        (backend.sample_hidden, hidden, {}),
        (backend.sample_hidden, hidden, {"top_logprobs": 6}),
        (backend.combine, (*rows[:3], params.alpha), {}),
        (backend.score, (*stacked, ids, few.alpha), {}),
        (backend.verify, (*stacked, ids[:, 1:], few), {}),
    ]
    for op, args, options in calls:
        plain = op(*args, **options)
        out = oracle.each(lambda t: torch.full_like(t, -7), plain)
        assert op(*args, **options, out=out) is out
        oracle.assert_same(out, plain)
        if options:  # without top_logprobs it is left alone
            out.top.token_ids.fill_(-7)
            assert op(*args, out=out) is out
            assert (out.top.token_ids == -7).all()


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
