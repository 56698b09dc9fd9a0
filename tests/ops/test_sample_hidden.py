"""``sample_hidden`` is ``sample`` of the heads' logits.

To the bit where those are exact, and within the bound of docs/heads.md where they are not.
Small integers make every product and sum of a head exact in fp32, in any order: what is left is the
contract, and the result must be ``sample``'s bit for bit.
"""

# ruff: noqa: E501 (a table: one case a line)
from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels.ops.backends import cpu
from tests.ops import oracle
from tests.ops.conftest import BACKENDS, KERNELS, WIDEST, Backend, move, sized

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (72, 40, 33)  # hidden sizes of the three roles: not multiples of a block, and an odd one

# CUDA C++ has no kernel for it.
backends = pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if b.name != "cuda"], ids=str, indirect=True
)


def integers(g: torch.Generator, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] of -3 to 3, every row further from the next than it is wide, NaN between."""
    memory = torch.full((rows + 1, columns + 7), torch.nan)
    memory[:rows, 3 : 3 + columns] = torch.randint(-3, 4, (rows, columns), generator=g).float()
    return memory.to(dtype)[:rows, 3 : 3 + columns]


def integer_heads(
    seed: int, batch: int, width: int, dtype: torch.dtype = torch.bfloat16,
    sizes: tuple[int, int, int] = SIZES,
) -> tuple[ptk.Head, ptk.Head, ptk.Head]:  # fmt: skip
    """Heads whose logits are integers of at most 9 * 72 = 648: products of at most 9, exact."""
    g = torch.Generator().manual_seed(seed)
    base, expert, anti = (
        ptk.Head(integers(g, batch, size, dtype), integers(g, width, size, dtype)) for size in sizes
    )
    return base, expert, anti


def exact_logits(head: ptk.Head) -> Tensor:
    """[B, V] in fp64: exact where the head holds small integers, else to 2^-53 a step."""
    logits = head.hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    if head.logit_scale is not None:
        logits = logits * head.logit_scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return logits


def params_of(seed: int, batch: int, width: int) -> ptk.RowParams:
    """Random ones; temperatures from 0 to 50, as logits of hundreds ask for."""
    g = torch.Generator().manual_seed(seed)
    values = oracle.random_params(g, batch, width)
    return ptk.RowParams(**{**values, "temperature": values["temperature"] * 30})


def assert_same_as_sample(
    backend: Backend, heads: Any, params: ptk.RowParams, **keywords: Any
) -> None:
    logits = [None if h is None else exact_logits(h).float() for h in heads]
    wanted = backend.sample(*logits, params, **keywords)
    oracle.assert_same(backend.sample_hidden(*heads, params, **keywords), wanted)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_heads_draw_what_sample_draws(backend, dtype):
    """Around the ends of tiles, chunks and blocks of rows."""
    shapes = [(1, 1), (3, 127), (17, 129), (33, 300), (70, 1000), (130, 70), (2, 9000)]
    for i, (batch, width) in enumerate(sized(backend, shapes, [(1, 1), (3, 129), (2, 1100)])):
        heads = integer_heads(i, batch, width, dtype)
        assert_same_as_sample(backend, heads, params_of(i, batch, width))


@backends
def test_more_rows_than_a_program_takes(backend):
    """Greedy: Triton's interpreter takes long for other rows. Rows end inside a block of them."""
    heads = integer_heads(0, 70, 150)
    params = params_of(0, 70, 150)
    assert_same_as_sample(backend, heads, params._replace(temperature=torch.zeros(70)))


@backends
def test_dtypes_may_differ_by_role(backend):
    mixed = [integer_heads(1, 5, 200, dtype)[i] for i, dtype in enumerate(DTYPES)]
    assert_same_as_sample(backend, mixed, params_of(2, 5, 200))


@backends
def test_hidden_sizes_from_one_to_several_blocks(backend):
    for sizes in ((1, 1, 1), (64, 128, 192), (1, 64, 65), (2100, 1030, 16)):
        heads = integer_heads(3, 4, 150, sizes=sizes)
        assert_same_as_sample(backend, heads, params_of(3, 4, 150))


@backends
def test_base_alone(backend):
    base, _, _ = integer_heads(4, 6, 260)
    assert_same_as_sample(backend, (base, None, None), params_of(4, 6, 260))


@backends
def test_bias_mask_and_likeliest_tokens(backend):
    g = torch.Generator().manual_seed(5)
    batch, width = sized(backend, 19, 3), 333
    bias = torch.randint(-40, 41, (batch, width), generator=g).float()
    bias[0, ::3] = -torch.inf
    mask = torch.randint(-(2**31), 2**31, (batch, -(-width // 32)), generator=g).int()
    heads, params = integer_heads(5, batch, width), params_of(5, batch, width)
    for keywords in ({"bias": bias}, {"allowed_mask": mask}, {"bias": bias, "allowed_mask": mask}):
        assert_same_as_sample(backend, heads, params, **keywords)
        assert_same_as_sample(backend, heads, params, top_logprobs=7, **keywords)


@backends
def test_bias_of_a_vocabulary_in_several_chunks(backend):
    """Greedy, as above."""
    width = sized(backend, 9000, 1100)
    bias = torch.arange(2.0 * width).view(2, width) % 3001
    params = params_of(6, 2, width)._replace(temperature=torch.zeros(2))
    assert_same_as_sample(backend, integer_heads(6, 2, width), params, bias=bias)


@backends
def test_stream_and_padding(backend):
    """Weights past vocab_size are NaN: reading them would show in the status."""
    heads = [h._replace(weight=h.weight.clone()) for h in integer_heads(6, 9, 400)]
    for head, width in zip(heads, (400, 391, 388), strict=True):
        head.weight[width - 8 :] = torch.nan
    narrow = [h._replace(weight=h.weight[:380]) for h in heads]
    params = params_of(6, 9, 380)
    got = backend.sample_hidden(*heads, params, vocab_size=380, noise_stream="draft")
    logits = [exact_logits(h).float() for h in narrow]
    oracle.assert_same(got, backend.sample(*logits, params, noise_stream="draft"))


@backends
def test_the_narrowest_role_sets_the_vocabulary(backend):
    base, expert, anti = integer_heads(7, 4, 200)
    anti = anti._replace(weight=anti.weight[:150])
    assert_same_as_sample(backend, (base, expert, anti), params_of(7, 4, 150))


@backends
def test_rows_without_steering_take_nothing_from_the_pair(backend):
    """alpha = 0 in one row of a batch, and in all of it: NaN in the pair is not seen."""
    base, expert, anti = integer_heads(8, 3, 200)
    poisoned = expert._replace(hidden=expert.hidden.clone())
    poisoned.hidden[1] = torch.nan
    params = params_of(8, 3, 200)._replace(alpha=torch.tensor([1.0, -0.0, 0.5]))
    clean = backend.sample_hidden(base, expert, anti, params)
    oracle.assert_same(backend.sample_hidden(base, poisoned, anti, params), clean)
    poisoned.weight.data = torch.full_like(poisoned.weight, torch.nan)
    unsteered = params._replace(alpha=torch.zeros(3))
    alone = backend.sample_hidden(base, None, None, unsteered)
    oracle.assert_same(backend.sample_hidden(base, poisoned, anti, unsteered), alone)


@backends
def test_special_values(backend):
    """NaN, infinities and bad parameters have sample's tokens and status bits."""
    base, expert, anti = integer_heads(9, 6, 140)
    bias = torch.zeros(140)
    bias[5], bias[9], bias[130] = -torch.inf, torch.inf, torch.nan
    params = params_of(9, 6, 140)
    params = params._replace(
        alpha=torch.tensor([1.0, 0.5, torch.nan, 1.0, 2.0, 1.0]),
        top_p=torch.tensor([1.0, 0.9, 0.9, 2.0, 1.0, 0.5]),
    )
    for role in range(3):
        heads = [base, expert, anti]
        heads[role] = heads[role]._replace(bias=bias)
        assert_same_as_sample(backend, heads, params)
    # -inf in base masks a token whatever the pair holds.
    masked, infinite = torch.zeros(140), torch.zeros(140)
    masked[7], infinite[7] = -torch.inf, torch.inf
    masking, boosting = base._replace(bias=masked), expert._replace(bias=infinite)
    assert_same_as_sample(backend, (masking, boosting, anti), params)
    one_nan = torch.zeros(140)
    one_nan[139] = torch.nan
    assert_same_as_sample(backend, (base._replace(bias=one_nan), expert, anti), params)
    nothing = base._replace(bias=torch.full((140,), -torch.inf))
    assert_same_as_sample(backend, (nothing, expert, anti), params)


@backends
@pytest.mark.parametrize("role", range(3))
def test_bias_and_scale_of_a_role(backend, role):
    """By powers of two, and integers: still exact."""
    heads = list(integer_heads(10 + role, 5, 210, sizes=(40, 40, 40)))
    bias = torch.arange(210.0) % 11 - 5
    heads[role] = heads[role]._replace(bias=bias.bfloat16(), logit_scale=0.25)
    assert_same_as_sample(backend, heads, params_of(10, 5, 210))


def normal_heads(seed: int, batch: int, width: int, dtype: torch.dtype) -> list[ptk.Head]:
    """Logits of about 4 nats, nothing exact; each role with a bias, scale and cap of its own."""
    g = torch.Generator().manual_seed(seed)
    heads = []
    for size, scale, cap in zip((320, 200, 96), (None, 0.7, 1.3), (30.0, None, 5.0), strict=True):
        hidden = torch.randn(batch, size, generator=g).to(dtype)
        weight = (torch.randn(width, size, generator=g) * 4 * size**-0.5).to(dtype)
        bias = torch.randn(width, generator=g).to(dtype)
        heads.append(ptk.Head(hidden, weight, bias, scale, cap))
    return heads


def bound(heads: list[ptk.Head], alpha: Tensor) -> Tensor:
    """How far x may be from exact arithmetic, [B, V]; docs/heads.md, Error."""
    errors, logits = [], []
    for h in heads:
        sums = h.hidden.double().abs() @ h.weight.double().abs().T
        sums = sums + (0 if h.bias is None else h.bias.double().abs())
        error = (h.hidden.shape[1] + 4) * 2.0**-23 * sums * abs(h.logit_scale or 1.0)
        if h.soft_cap is not None:
            error = error + 3.1e-7 * h.soft_cap
        errors.append(error)
        logits.append(exact_logits(h).abs())
    a = alpha.double().abs()[:, None]
    rounding = 2.0**-23 * (a * (logits[1] + logits[2]) + logits[0])
    return errors[0] + a * (errors[1] + errors[2]) + rounding


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_is_right_to_its_bound(backend, dtype):
    """Every token's raw logprob is that of exact heads, to the error of x, its own and a logsum's.

    log-softmax moves by at most twice the largest error of x; its own arithmetic is right to
    2e-6 + 2^-23 |logprob| (docs/contracts.md, Logprobs), tile sums add backend.tile_error.
    """
    batch, width = sized(backend, (20, 128), (5, 128))
    heads = normal_heads(20, batch, width, dtype)
    alpha = torch.linspace(-1, 2, batch)
    got = backend.sample_hidden(*heads, alpha=alpha, top_logprobs=128).top
    b, e, a = (exact_logits(h) for h in heads)
    x = b + alpha.double()[:, None] * (e - a)
    wanted = x.log_softmax(-1).gather(-1, got.token_ids)
    allowed = 2 * bound(heads, alpha).amax(-1, keepdim=True)
    allowed = allowed + 2e-6 + backend.tile_error + 2.0**-23 * wanted.abs()
    assert ((got.logprobs.double() - wanted).abs() <= allowed).all()
    # The bound is of use: bf16 logits, of 4 nats to 2^-9 of themselves, are outside of it.
    rounded = [logits.bfloat16().double() for logits in (b, e, a)]
    coarse = rounded[0] + alpha.double()[:, None] * (rounded[1] - rounded[2])
    assert (coarse.log_softmax(-1).gather(-1, got.token_ids) - wanted).abs().max() > allowed.max()


@backends
def test_soft_caps_are_right(backend):
    """Logits that are exact before the cap: 3.1e-7 of it after, and a logprob's own 2e-6."""
    cap, values = 64.0, torch.cat([torch.linspace(-90, 90, 100), torch.linspace(-900, 900, 28)])
    head = ptk.Head(torch.ones(1, 1), values[:, None].contiguous(), soft_cap=cap)
    got = backend.sample_hidden(head, None, None, top_logprobs=128).top
    wanted = (cap * torch.tanh(values.double() / cap)).log_softmax(0)[got.token_ids]
    allowed = 2 * 3.1e-7 * cap + 2e-6 + backend.tile_error + 2.0**-23 * wanted.abs()
    assert ((got.logprobs.double() - wanted).abs() <= allowed).all()


@backends
def test_greedy_tokens_are_the_likeliest_but_for_the_bound(backend):
    batch, width = sized(backend, (64, 3000), (9, 300))
    heads = normal_heads(21, batch, width, torch.bfloat16)
    alpha = torch.ones(batch)
    drawn = backend.sample_hidden(*heads, temperature=0).token_ids
    b, e, a = (exact_logits(h) for h in heads)
    x, error = b + e - a, bound(heads, alpha)
    behind = x.amax(-1) - x.gather(-1, drawn[:, None])[:, 0]
    assert (behind <= 2 * error.amax(-1)).all()


@pytest.mark.parametrize(
    "backend", [b for b in WIDEST if b.device == "cpu"], ids=str, indirect=True
)
def test_weights_are_not_copied(backend):
    """Nothing of their size is allocated, and one fp32 [B, V]: x."""
    batch, width, size = sized(backend, (16, 65_536, 256), (16, 2048, 1024))
    heads = [
        ptk.Head(torch.zeros(batch, size).bfloat16(), torch.zeros(width, size).bfloat16())
        for _ in range(3)
    ]
    params = ptk.RowParams.make(batch)
    backend.sample_hidden(*heads, params)
    with torch.profiler.profile(profile_memory=True) as profile:
        backend.sample_hidden(*heads, params)
    events = profile.profiler.kineto_results.events()
    sizes = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    assert max(sizes) < width * size * 2
    assert sizes.count(batch * width * 4) == 1


CPUS = [k for k in KERNELS if k.name == "cpu"]


@pytest.mark.skipif(not CPUS, reason="the C++ extension is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_on_the_cpu_is_the_same_bits_everywhere(dtype):
    """Whatever the instruction set, the threads, and the rows and tokens beside a token's."""
    heads, alpha = normal_heads(25, 13, 500, dtype), torch.linspace(-1, 2, 13)
    whole = []
    for backend in CPUS:
        backend.use()
        whole.append(cpu.combined((heads[0], heads[1], heads[2]), alpha, None, 500))
    for other in whole[1:]:
        oracle.assert_same(whole[0], other)
    torch.set_num_threads(3)
    for rows, width in ((slice(0, 1), 500), (slice(3, 9), 499), (slice(12, 13), 97)):
        part = [h._replace(hidden=h.hidden[rows]) for h in heads]
        x = cpu.combined((part[0], part[1], part[2]), alpha[rows], None, width)
        oracle.assert_same(x, whole[0][rows, :width])
    CPUS[-1].use()


@backends
def test_out(backend):
    heads, params = integer_heads(22, 4, 100), params_of(22, 4, 100)
    plain = backend.sample_hidden(*heads, params, top_logprobs=3)
    out = oracle.each(lambda t: torch.full_like(t, -7), plain)
    assert backend.sample_hidden(*heads, params, top_logprobs=3, out=out) is out
    oracle.assert_same(out, plain)
    out.top.token_ids.fill_(-7)
    assert backend.sample_hidden(*heads, params, out=out) is out
    assert (out.top.token_ids == -7).all()
    bare = oracle.each(lambda t: torch.full_like(t, -7), plain._replace(top=None))
    backend.sample_hidden(*heads, params, out=bare)
    oracle.assert_same(bare, plain._replace(top=None))


@backends
def test_no_rows(backend):
    heads = integer_heads(23, 0, 50)
    out = backend.sample_hidden(*heads, top_logprobs=2)
    assert out.token_ids.shape == (0,) and out.top.logprobs.shape == (0, 2)


@backends
def test_parameters_need_no_gradient(backend):
    heads = [h._replace(weight=torch.nn.Parameter(h.weight)) for h in integer_heads(24, 2, 40)]
    out = backend.sample_hidden(*heads)
    assert not out.logprobs.requires_grad


GOOD = ptk.Head(torch.zeros(2, 4), torch.zeros(9, 4))
NOTHING: Any = None
META = torch.zeros(2, 4, device="meta")

# what is changed, the error, and what the message holds
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a head": ({"base": GOOD.hidden}, TypeError, "base must be a Head, got Tensor"),
    "half a pair": ({"anti": None}, ValueError, "anti must be given with the other of the pair"),
    "other half": ({"expert": None}, ValueError, "expert must be given with the other of"),
    "no tensor": ({"expert": GOOD._replace(weight=NOTHING)}, TypeError, "expert.weight must be a tensor, got NoneType"),
    "dimensions": ({"base": GOOD._replace(hidden=torch.zeros(4))}, ValueError, "base.hidden must have shape [B, H], got [4]"),
    "dtype": ({"base": GOOD._replace(hidden=torch.zeros(2, 4).double())}, ValueError, "base.hidden must be float32, bfloat16 or float16, got torch.float64"),
    "two dtypes": ({"anti": GOOD._replace(weight=torch.zeros(9, 4).half())}, ValueError, "anti.weight must be torch.float32 of shape ['V', 4] like anti.hidden, got torch.float16"),
    "hidden size": ({"expert": GOOD._replace(weight=torch.zeros(9, 5))}, ValueError, "expert.weight must be torch.float32 of shape ['V', 4] like expert.hidden"),
    "columns": ({"base": GOOD._replace(weight=torch.zeros(4, 9).T)}, ValueError, "base.weight must be contiguous in its last dimension, got stride 9"),
    "batch": ({"expert": GOOD._replace(hidden=torch.zeros(3, 4))}, ValueError, "expert.hidden must have shape [2, 'H'] like base.hidden, got [3, 4]"),
    "device": ({"expert": GOOD._replace(hidden=META)}, ValueError, "expert.weight must be on meta like base, got cpu"),
    "bias": ({"base": GOOD._replace(bias=torch.zeros(8))}, ValueError, "base.bias must be float32, bfloat16 or float16 of shape [9], got torch.float32 of shape"),
    "bias stride": ({"base": GOOD._replace(bias=torch.zeros(18)[::2])}, ValueError, "base.bias must be contiguous, got stride 2"),
    "cap": ({"anti": GOOD._replace(soft_cap=0.0)}, ValueError, "anti.soft_cap must be a positive finite number or None, got 0.0"),
    "scale": ({"base": GOOD._replace(logit_scale=torch.inf)}, ValueError, "base.logit_scale must be a finite number or None, got inf"),
    "vocab_size": ({"vocab_size": 10}, ValueError, "vocab_size must be at most the narrowest role's width 9, got 10"),
    "top_logprobs": ({"top_logprobs": 129}, ValueError, "top_logprobs must be in [0, 128], got 129"),
    "noise stream": ({"noise_stream": "main"}, ValueError, "noise_stream must be one of ['sample', 'draft'"),
    "params": ({"params": [ptk.SamplingParams(seed=1)]}, ValueError, "params must have one entry per row (2), got 1"),
    "both": ({"params": ptk.RowParams.make(2), "alpha": 1.0}, TypeError, "give params or single parameters, not both; got params and ['alpha']"),
    "rows": ({"params": ptk.RowParams.make(3)}, ValueError, "params.alpha must be torch.float32 of shape [2], got torch.float32 of shape [3]"),
    "constraint": ({"bias": torch.zeros(2, 8)}, ValueError, "bias must be torch.float32 of shape [2, 9]"),
    "out": ({"out": ptk.sample(torch.zeros(3, 9))}, ValueError, "out.token_ids must be contiguous torch.int64 of shape [2], got torch.int64 of shape [3]"),
}  # fmt: skip


@backends
@pytest.mark.parametrize("name", REFUSED)
def test_errors(backend, name):
    changed, error, text = REFUSED[name]
    given = {"base": GOOD, "expert": GOOD, "anti": GOOD, **changed}
    with pytest.raises(error, match=re.escape(f"sample_hidden: {text}")):
        ptk.sample_hidden(**move_all(given, backend.device), backend=backend.name)


def move_all(given: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: move(value, device) for name, value in given.items()}
