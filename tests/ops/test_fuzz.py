"""Odd shapes, values, layouts and parameters: the contract's result, or an error with a name.

The same examples each run. `make asan` runs them under AddressSanitizer and UBSan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels import kernels, reference, rng
from tests.ops import oracle
from tests.ops.conftest import CLUSTERS, KERNELS, Backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KERNELS, reason="needs a kernel, only the reference runs here"),
]


def few(interpreted: int) -> settings:
    """200 examples; Triton's interpreter gets so many as seconds allow, and shrinks no failure."""
    slow = kernels.interpreted()
    return settings(
        max_examples=interpreted if slow else 200, derandomize=True, database=None, deadline=None,
        phases=(Phase.generate,) if slow else tuple(Phase),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around the vector widths, the 128-token tile and the 4096 tokens that are sorted at once.
SIZES: tuple[int, ...] = (1, 2, 7, 31, 32, 33, 127, 128, 129, 255, 257, 640, 1000, 4097, 5000)
if kernels.interpreted():
    SIZES = (1, 7, 33, 127, 129, 640, 1025)
NAMES = sorted({kernel.name for kernel in KERNELS})
each_kernel = pytest.mark.parametrize("name", NAMES)
# sample and verify, by the cluster kernels' source too
each_or_cluster = pytest.mark.parametrize("name", [*NAMES, *({k.name for k in CLUSTERS})])
SPECIAL = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, -1e-40, 0.0, -0.0, 65504.0)
GOOD = {
    "alpha": (1.0, 0.0, -0.0, -0.5, 2.0, 1e-30, 3e38),
    "temperature": (1.0, 0.0, 1e-40, 0.1, 0.7, 1e4, 1e-30, 1e30),
    "top_k": (0, -1, 1, 2, 50, 2**31 - 1),
    "top_p": (1.0, 0.9, 0.5, 1e-9, 1e-45, 0.9999999),
    "min_p": (0.0, 0.05, 1.0, 1e-6, 1e-45),
    "filter_order": (0, 1, 2),
    "seed": (0, 1, -1, 2**63 - 1, -(2**63)),
    "position": (0, 1, 2**32 - 1, 2**32, 2**62),
}
BAD = {
    "alpha": (math.nan, math.inf, -math.inf),
    "temperature": (-1.0, math.nan, math.inf, -1e-40),
    "top_k": (-2, -(2**31)),
    "top_p": (0.0, -1.0, 1.5, math.nan, 3e38),
    "min_p": (-0.1, 1.5, math.nan),
    "filter_order": (-1, 3, 2**31 - 1),
    "position": (-1, -(2**63)),
}
GUARD = 64  # elements on each side of an output


class Layout(NamedTuple):
    """How a role's logits lie in memory."""

    padding: int  # columns past vocab_size
    step: int  # rows from one to the next; 0: all rows are the first
    offset: int  # elements before the first
    dtype: torch.dtype

    def place(self, values: Tensor, poison: float) -> Tensor:
        """The values [..., V] laid out so, all around them poisoned."""
        *leading, size = values.shape
        shape = [*leading, max(self.step, 1), size + self.padding]
        flat = torch.full((self.offset + math.prod(shape),), poison, dtype=self.dtype)
        view = flat[self.offset :].view(shape)[..., 0, :]
        view[..., :size] = values
        return view[:1].expand_as(view) if self.step == 0 else view


class Case(NamedTuple):
    """One call: values in fp32, how each lies in memory, and everything beside the logits."""

    values: tuple[Tensor, ...]  # base, or base, expert and anti
    layouts: tuple[Layout, ...]
    bias: Tensor | None
    allowed_mask: Tensor | None
    params: ptk.RowParams
    bad: Tensor  # bool [B]

    def inputs(self, poison: float = math.nan) -> dict[str, Any]:
        roles = zip(self.values, self.layouts, strict=True)
        placed = [layout.place(values, poison) for values, layout in roles]
        keys = ("base", "expert", "anti")
        given = dict.fromkeys(keys) | dict(zip(keys, placed, strict=False))
        return given | {"vocab_size": self.values[0].shape[-1]}

    @property
    def constraints(self) -> dict[str, Any]:
        return {"bias": self.bias, "allowed_mask": self.allowed_mask}


def fresh(array: np.ndarray) -> Tensor:
    """The array as a tensor with torch's strides, also where it is empty."""
    values = torch.from_numpy(array)
    return torch.empty(array.shape, dtype=values.dtype).copy_(values)


@st.composite
def logits(draw: st.DrawFn, shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """A few values all over again, special ones among them, or noise around them."""
    number = st.sampled_from(SPECIAL) | st.sampled_from((0.0, -0.0)) | st.floats(-30, 30, width=16)
    palette = np.array(draw(st.lists(number, min_size=1, max_size=9)), np.float32)
    values = palette[generator.integers(0, len(palette), shape)]
    noise = draw(st.sampled_from((0.0, 0.0, 1.0, 8.0)))
    spread = np.float32(noise) * generator.normal(size=shape)
    if draw(st.sampled_from((False, False, True))):  # the first tokens stand out, all alike
        spread = -np.abs(spread)
        spread[..., :128] = 0
    return fresh(values + spread).float()


@st.composite
def row_params(draw: st.DrawFn, rows: int) -> tuple[ptk.RowParams, Tensor]:
    """Parameters in range, and in some rows one that is not; which rows those are."""
    columns = {n: [draw(st.sampled_from(v)) for _ in range(rows)] for n, v in GOOD.items()}
    bad = torch.zeros(rows, dtype=torch.bool)
    for row in range(rows):
        if draw(st.integers(0, 7)) == 0:
            name = draw(st.sampled_from(sorted(BAD)))
            columns[name][row] = draw(st.sampled_from(BAD[name]))
            bad[row] = True
    fields = ptk.params.ROW_FIELDS
    tensors = {n: torch.tensor(v, dtype=fields[n].dtype) for n, v in columns.items()}
    return ptk.RowParams(**tensors), bad


@st.composite
def cases(draw: st.DrawFn, positions: int | None = None) -> Case:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, size = draw(st.sampled_from((2, 1, 3, 2, 3, 1, 2, 0))), draw(st.sampled_from(SIZES))
    leading = (rows,) if positions is None else (rows, positions)
    shape = (*leading, size)
    values, layouts = [], []
    for _ in range(draw(st.sampled_from((1, 3)))):
        layout = Layout(
            draw(st.sampled_from((0, 1, 5, 130))), draw(st.sampled_from((1, 2, 0))),
            draw(st.sampled_from((0, 1, 3))), draw(st.sampled_from(LOGIT_DTYPES)),
        )  # fmt: skip
        v = draw(logits(shape, generator)).to(layout.dtype)
        values.append(v[:1].expand_as(v) if layout.step == 0 else v)
        layouts.append(layout)
    bias = mask = None
    if draw(st.sampled_from((False, False, True))):
        # Of NaN and +inf: see test_bias_on_a_token_that_steering_masked.
        palette = np.array((0.0, 1.5, -2.0, -math.inf, 3e38), np.float32)
        bias = fresh(palette[generator.integers(0, 5, shape)])
    if draw(st.sampled_from((False, False, True))):
        words = generator.integers(-(2**31), 2**31, (*leading, -(-size // 32)), np.int32)
        mask = fresh(words & generator.integers(-(2**31), 2**31, words.shape, np.int32))
    params, bad = draw(row_params(rows))
    return Case(tuple(values), tuple(layouts), bias, mask, params, bad)


class Choice(NamedTuple):
    """Which of a kernel's instruction sets, or clusters, runs, and on how many threads."""

    isa: int
    threads: int

    def put_to_work(self, name: str) -> Backend:
        named = [kernel for kernel in (*KERNELS, *CLUSTERS) if kernel.name == name]
        kernel = named[self.isa % len(named)]
        kernel.use()
        torch.set_num_threads(1 if kernel.interpreted else self.threads)
        return kernel


choices = st.builds(Choice, st.sampled_from(range(15)), st.sampled_from((1, 2)))


@pytest.fixture(autouse=True, scope="module")
def widest_after() -> Iterator[None]:
    yield
    for kernel in KERNELS:  # the widest comes last
        kernel.use()


class Guarded:
    """Outputs of the caller between guards that nothing may write to."""

    def __init__(self, kind: Any, **fields: tuple[tuple[int, ...], torch.dtype]) -> None:
        self._flat = {n: torch.full((math.prod(s) + 2 * GUARD,), 77, dtype=d)
                      for n, (s, d) in fields.items()}  # fmt: skip
        views = {n: self._flat[n][GUARD:-GUARD].view(s) for n, (s, _) in fields.items()}
        self.out: Any = kind(**views) if hasattr(kind, "_fields") else views["out"]

    def check(self) -> None:
        for name, flat in self._flat.items():
            assert (flat[:GUARD] == 77).all() and (flat[-GUARD:] == 77).all(), name


def same(a: Any, b: Any) -> None:
    """Bit for bit; NaN equals NaN."""
    a, b = ((a,), (b,)) if isinstance(a, Tensor) else (a, b)
    for left, right in zip(a, b, strict=True):
        if left is None or right is None:
            assert left is right
        elif isinstance(left, Tensor):
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        else:
            same(left, right)


def plain(x: Tensor) -> Tensor:
    """Combined logits as fp64 with NaN masked, and +inf alone where there is one."""
    x = x.masked_fill(x.isnan(), -math.inf).double()
    infinite = x == math.inf
    alone = torch.where(infinite, 0.0, -math.inf)
    return torch.where(infinite.any(-1, keepdim=True), alone, x)


def expected_status(x: Tensor, bad: Tensor) -> Tensor:
    status = 1 * x.isnan().any(-1) + 2 * (x == math.inf).any(-1)
    status += 4 * (plain(x) == -math.inf).all(-1)
    return torch.where(bad, 8, status)


def check_kept(x: Tensor, params: ptk.RowParams, num_kept: Tensor) -> np.ndarray:
    """The kept sets' sizes are the oracle's within its bands; returns the order, [B, V]."""
    greedy = params.temperature < 2.0**-126
    columns = params._replace(temperature=params.temperature.masked_fill(greedy, 0))
    kept = oracle.kept(x.numpy(), oracle.Filters.of(columns._asdict()))
    assert (kept.low <= num_kept.numpy()).all() and (num_kept.numpy() <= kept.high).all()
    return kept.order


def check_draw(
    x: Tensor, out: ptk.SampleOutput, params: ptk.RowParams, row: int, order, tile_error: float
) -> None:
    """One row's token is the argmax over its kept set, and its logprobs are right."""
    token = int(out.token_ids[row])
    kept = torch.from_numpy(order[row, : int(out.num_kept[row])].copy())
    assert token in kept
    shifted = x[row] - x[row].max()
    temperature = float(params.temperature[row])
    greedy = temperature < 2.0**-126
    scaled = shifted if greedy else shifted / temperature
    one = params.rows(slice(row, row + 1))
    noise = rng.gumbel(one.seed, one.position, kept, rng.STREAMS["sample"])[0]
    score, chosen = scaled[kept] + noise, kept == token
    # docs/contracts.md, Scores: the bound of one score, for the winner and for its rival.
    bound = 1.8e-7 * scaled[kept].abs() + 1.7e-7 * noise.abs().clamp(min=1) + 6e-8 * score.abs()
    assert bool((score[chosen] + bound[chosen] >= score - bound).all())
    if greedy:
        assert token == order[row, 0] and out.logprobs[row] == 0
    else:
        logprob = scaled[token] - scaled[kept].logsumexp(0)
        close(out.logprobs[row], logprob, scaled[token], tile_error)
    close(out.raw_logprobs[row], shifted.log_softmax(0)[token], shifted[token], tile_error)


def close(logprob: Tensor, wanted: Tensor, scaled: Tensor, tile_error: float) -> None:
    # docs/contracts.md, Logprobs: 2^-23 |s| from x - max and 1 / T, 9e-7 from the mass, and the
    # rounding of the result; -inf where x - max is past fp32.
    error = 1.2e-7 * abs(float(scaled)) + max(1e-6, tile_error) + 6e-8 * abs(float(wanted))
    assert logprob == wanted.float() or abs(float(logprob) - float(wanted)) <= error


@each_kernel
@few(30)
@given(cases(), choices, st.booleans())
def test_combine(name, case, choice, owned):
    kernel = choice.put_to_work(name)
    inputs, rows = case.inputs(), len(case.bad)
    alpha = case.params.alpha
    size = inputs["vocab_size"]
    guarded = Guarded(Tensor, out=((rows, size), torch.float32))
    out = guarded.out if owned else None
    x = kernel.combine(**inputs, alpha=alpha, out=out, **case.constraints)
    guarded.check()
    same(x, kernel.combine(**case.inputs(1e4), alpha=alpha, **case.constraints))
    base, expert, anti = [*case.values, None, None][:3]
    assert base is not None
    wanted = reference.combine(base, expert, anti, alpha, case.bias, case.allowed_mask)
    # The reference rounds twice: the combination is off by a unit in its last place where alpha *
    # (expert - anti) is a tie that base breaks. A bias may cancel most of it, but not that unit.
    near = (x == wanted) | (x.isnan() & wanted.isnan())
    unit = torch.nextafter(wanted, x) == x
    unbiased = reference.combine(base, expert, anti, alpha, None, case.allowed_mask).double().abs()
    last_place = unbiased * 2.0**-23 + 2.0**-149
    cancelled = (x.double() - wanted.double()).abs() <= 2 * last_place
    cancelled &= unbiased.isfinite() & (case.bias is not None)
    assert bool((near | unit | cancelled).all())
    assert not bool((x == 0).logical_and(x.signbit()).any())  # -0 became +0


def check_top(x: Tensor, top: ptk.TopLogprobs, tile_error: float) -> None:
    """The first tokens of x [B, V] in order, with their raw logprobs; -1 and NaN past the last."""
    order = np.argsort(-x.numpy(), axis=-1, kind="stable")
    for row, token_ids, found, logprobs in zip(x, order, *top, strict=True):
        live = int((row > -math.inf).sum())
        wanted = [*token_ids[:live].tolist(), *[-1] * len(found)][: len(found)]
        assert found.tolist() == wanted and torch.equal(logprobs.isnan(), found < 0)
        shifted = row - row.max()
        raw = shifted.log_softmax(0)
        for token, logprob in zip(wanted[:live], logprobs[:live], strict=True):
            close(logprob, raw[token], shifted[token], tile_error)


@each_or_cluster
@few(10)
@given(cases(), choices, st.booleans(), st.sampled_from((0, 1, 5, 128)))
def test_sample(name, case, choice, owned, n):
    kernel = choice.put_to_work(name)
    inputs, rows = case.inputs(), len(case.bad)
    guarded = Guarded(
        ptk.SampleOutput, token_ids=((rows,), torch.int64), logprobs=((rows,), torch.float32),
        raw_logprobs=((rows,), torch.float32), num_kept=((rows,), torch.int32),
        status=((rows,), torch.int32),
    )  # fmt: skip
    guarded_top = Guarded(
        ptk.TopLogprobs, token_ids=((rows, n), torch.int64), logprobs=((rows, n), torch.float32)
    )
    arguments = {"params": case.params, "top_logprobs": n, **case.constraints}
    given_out = guarded.out._replace(top=guarded_top.out if n else None)
    out = kernel.sample(**inputs, **arguments, out=given_out if owned else None)
    guarded.check()
    guarded_top.check()
    same(out, kernel.sample(**case.inputs(1e4), **arguments))
    x = kernel.combine(**inputs, alpha=case.params.alpha, **case.constraints)
    status = expected_status(x, case.bad)
    assert torch.equal(out.status.long(), status.long())
    drawn = (status & 12) == 0
    for values in (out.logprobs, out.raw_logprobs):
        assert torch.equal(values.isnan(), ~drawn)
    assert torch.equal(out.token_ids >= 0, drawn) and torch.equal(out.num_kept > 0, drawn)
    assert (out.top is not None) == (n > 0)
    if out.top is not None:
        live_x = plain(x).masked_fill(~drawn[:, None], -math.inf)
        check_top(live_x, out.top, kernel.tile_error)
    if not drawn.any():
        return
    live, live_out = case.params.rows(drawn), oracle.each(lambda v: v[drawn], out)
    x = plain(x[drawn])
    order = check_kept(x, live, live_out.num_kept)
    for row in range(len(x)):
        check_draw(x, live_out, live, row, order, kernel.tile_error)


@each_kernel
@few(20)
@given(cases(positions=2), choices, st.booleans(), st.integers(0, 2**32 - 1))
def test_score(name, case, choice, owned, seed):
    kernel = choice.put_to_work(name)
    inputs, rows = case.inputs(), len(case.bad)
    size, alpha = inputs["vocab_size"], case.params.alpha
    ids = np.random.default_rng(seed).integers(-2, size + 2, (rows, 2))
    ids[np.random.default_rng(seed).random((rows, 2)) < 0.1] = 2**62
    token_ids = torch.from_numpy(ids)
    guarded = Guarded(Tensor, out=((rows, 2), torch.float32))
    given_out = guarded.out if owned else None
    out = kernel.score(**inputs, token_ids=token_ids, alpha=alpha, out=given_out)
    guarded.check()
    same(out, kernel.score(**case.inputs(1e4), token_ids=token_ids, alpha=alpha))
    flat: dict[str, Any] = {
        n: v.flatten(0, 1) if isinstance(v, Tensor) else v for n, v in inputs.items()
    }
    x = plain(kernel.combine(**flat, alpha=alpha.repeat_interleave(2)))
    for value, row, token in zip(out.flatten(), x, token_ids.flatten().tolist(), strict=True):
        inside = 0 <= token < size and row.max() > -math.inf
        assert bool(value.isnan()) == (not inside)
        if inside:
            shifted = row - row.max()
            close(value, shifted.log_softmax(0)[token], shifted[token], kernel.tile_error)


def drafts(case: Case, kernel: Backend, right: list[bool]) -> Tensor:
    """Draft ids [B, k]: what plain decoding draws where ``right``, else any, also out of range."""
    size, rows = case.values[0].shape[-1], len(case.bad)
    columns = [torch.randint(-1, size + 1, (rows,)) for _ in right]
    for j, use in enumerate(right):
        columns[j] = plain_decoding(case, kernel, j, "sample").token_ids if use else columns[j]
    return torch.stack(columns, 1) if columns else torch.zeros(rows, 0, dtype=torch.int64)


def plain_decoding(case: Case, kernel: Backend, j: int, stream: str) -> ptk.SampleOutput:
    """``sample`` at drafted position j."""
    at = case._replace(
        values=tuple(v[:, j] for v in case.values),
        bias=None if case.bias is None else case.bias[:, j],
        allowed_mask=None if case.allowed_mask is None else case.allowed_mask[:, j],
    )
    params = case.params._replace(position=case.params.position + j)
    out = kernel.sample(**at.inputs(), params=params, noise_stream=stream, **at.constraints)
    assert isinstance(out, ptk.SampleOutput)
    return out


def guarded_verify(rows: int, positions: int) -> Guarded:
    return Guarded(
        ptk.VerifyOutput, token_ids=((rows, positions), torch.int64),
        num_accepted=((rows,), torch.int32), logprobs=((rows, positions), torch.float32),
        raw_logprobs=((rows, positions), torch.float32), status=((rows,), torch.int32),
    )  # fmt: skip


@each_or_cluster
@few(2)
@given(st.data(), choices, st.booleans(), st.lists(st.booleans(), max_size=2))
def test_verify_coupled_is_plain_decoding(name, data, choice, owned, right):
    kernel = choice.put_to_work(name)
    torch.manual_seed(0)
    case = data.draw(cases(positions=len(right) + 1))
    rows, k = len(case.bad), len(right)
    ids = drafts(case, kernel, right)
    guarded = guarded_verify(rows, k + 1)
    arguments = {"draft_token_ids": ids, "params": case.params, **case.constraints}
    out = kernel.verify(**case.inputs(), **arguments, out=guarded.out if owned else None)
    guarded.check()
    same(out, kernel.verify(**case.inputs(1e4), **arguments))
    active = torch.ones(rows, dtype=torch.bool)
    accepted, status = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    for j in range(k + 1):
        drawn = plain_decoding(case, kernel, j, "sample")
        same(out.token_ids[:, j], torch.where(active, drawn.token_ids, -1))
        same(out.logprobs[:, j], torch.where(active, drawn.logprobs, math.nan))
        same(out.raw_logprobs[:, j], torch.where(active, drawn.raw_logprobs, math.nan))
        status |= torch.where(active, drawn.status, 0)
        if j < k:
            active = active & (drawn.token_ids == ids[:, j]) & (drawn.token_ids >= 0)
            accepted += active.int()
    same((out.num_accepted, out.status), (accepted, status))


@each_or_cluster
@few(3)
@given(st.data(), choices, st.booleans(), st.lists(st.booleans(), max_size=2))
def test_verify_rejection(name, data, choice, owned, right):
    kernel = choice.put_to_work(name)
    torch.manual_seed(0)
    case = data.draw(cases(positions=len(right) + 1))
    rows, k, size = len(case.bad), len(right), case.values[0].shape[-1]
    ids = drafts(case, kernel, right)
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    layout = Layout(3, 2, 1, data.draw(st.sampled_from(LOGIT_DTYPES)))
    values = data.draw(logits((rows, k, size), generator)).to(layout.dtype)
    guarded = guarded_verify(rows, k + 1)
    arguments = {"draft_token_ids": ids, "params": case.params, "mode": "rejection",
                 **case.constraints}  # fmt: skip
    out = kernel.verify(**case.inputs(), draft_logits=layout.place(values, math.nan), **arguments,
                        out=guarded.out if owned else None)  # fmt: skip
    guarded.check()
    again = kernel.verify(**case.inputs(1e4), draft_logits=layout.place(values, 1e4), **arguments)
    same(out, again)
    for row in range(rows):
        accepted = int(out.num_accepted[row])
        assert torch.equal(out.token_ids[row, :accepted], ids[row, :accepted])
        assert (out.token_ids[row, accepted + 1 :] == -1).all()
        emitted = out.token_ids[row, : accepted + 1]
        assert ((emitted >= -1) & (emitted < size)).all()
        for numbers in (out.logprobs, out.raw_logprobs):
            assert torch.equal(numbers[row].isnan(), out.token_ids[row] == -1)
        status = 0
        for j in range(accepted + 1):
            bonus = plain_decoding(case, kernel, j, "bonus" if j else "sample")
            status |= int(bonus.status[row])
            if j == k or ids[row, j] < 0:
                same(emitted[j], bonus.token_ids[row])
                same(out.logprobs[row, j], bonus.logprobs[row])
                same(out.raw_logprobs[row, j], bonus.raw_logprobs[row])
        assert int(out.status[row]) == status
