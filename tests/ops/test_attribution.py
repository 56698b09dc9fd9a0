"""sample with attribution: what steering did to a row, against numpy in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels.ops.backends import BY_NAME, choose
from tests.ops import oracle
from tests.ops.conftest import BACKENDS, sized

INF, NAN = torch.inf, torch.nan

attributing = pytest.mark.parametrize(
    "backend",
    [b for b in BACKENDS if "attribution" in BY_NAME[b.name].operators],
    ids=str,
    indirect=True,
)


def softmax(logits: oracle.Array) -> oracle.Array:
    """Log-probabilities of rows; of +inf logits those share all. NaN is no token."""
    v = np.where(np.isnan(logits), -np.inf, logits)
    infinite = (v == np.inf).any(-1, keepdims=True)
    v = np.where(infinite, np.where(v == np.inf, 0.0, -np.inf), v)
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = v - v.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def first(logits: oracle.Array) -> oracle.Ints:
    """The likeliest token of each row, the lowest id among equals."""
    return np.where(np.isnan(logits), -np.inf, logits).argmax(-1)


def check(
    found: ptk.SampleOutput, roles: list[Tensor | None], alpha: Tensor, x: Tensor, ids: Tensor
) -> None:
    """The bounds of docs/contracts.md, Attribution; ``ids`` are -1 where a row has none."""
    a = found.attribution
    assert a is not None
    there = (ids >= 0).numpy()
    at = ids.clamp(min=0).numpy()[:, None]
    wide = [None if r is None else r.double().numpy() for r in roles]
    proxy = softmax(x.double().numpy())
    # Logits are rounded to fp32, and 2^t to |t| 2^-24 of itself: of the row's largest.
    sizes = [np.where(np.isfinite(r), np.abs(r), 0.0).max(-1) for r in wide if r is not None]
    relative = 2e-5 + 2.0**-22 * np.max(sizes, axis=0)
    for name, role in zip(("base", "expert", "anti"), wide, strict=True):
        value = getattr(a, name).numpy()
        if role is None:
            assert np.isnan(value).all()
            continue
        live = there & ((name == "base") | (alpha != 0).numpy())
        with np.errstate(invalid="ignore"):
            wanted = np.exp(np.take_along_axis(softmax(role), at, -1)[:, 0])
            off = np.abs(value - wanted)[live]
        nan = np.isnan(wanted[live])  # a role that knows no token
        assert ((off <= (relative * wanted)[live] + 1e-30) | nan).all(), (name, value, wanted)
        assert (np.isnan(value[live]) == nan).all() and np.isnan(value[~live]).all(), name
    wanted = np.exp(np.take_along_axis(proxy, at, -1)[:, 0])
    np.testing.assert_allclose(a.proxy.numpy()[there], wanted[there], rtol=2e-5, atol=1e-30)

    base = wide[0]
    assert base is not None
    order = np.argsort(-np.where(np.isnan(base), -np.inf, base), axis=-1, kind="stable")
    rank = (order == at).argmax(-1) + 1
    np.testing.assert_array_equal(a.base_rank.numpy(), np.where(there, rank, 0))
    changed = (first(base) != first(x.numpy())) & there
    np.testing.assert_array_equal(a.changed.numpy(), changed)

    own = softmax(base)
    with np.errstate(invalid="ignore"):
        terms = np.where(proxy > -700, np.exp(proxy) * (proxy - own), 0.0)
        near = np.isfinite(proxy - own) & (proxy - proxy.max(-1, keepdims=True) > -45 * np.log(2))
        moved = np.where(near, np.abs(proxy - own), 0.0).max(-1)
    kl = np.maximum(terms.sum(-1), 0.0)
    # Of each share, and of x - base.
    bound = 2 * relative * (1 + moved)
    finite = there & np.isfinite(kl)
    assert (np.abs(a.kl.numpy() - kl)[finite] <= bound[finite]).all(), (a.kl, kl)
    np.testing.assert_array_equal(a.kl.numpy()[there & ~finite], np.inf)
    assert np.isnan(a.kl.numpy()[~there]).all()
    assert a.base_rank.dtype == torch.int32 and a.changed.dtype == torch.bool


def run(backend: Any, roles: list[Tensor | None], params: ptk.RowParams, **options: Any) -> None:
    found = backend.sample(*roles, params, attribution=True, **options)
    V = options.get("vocab_size", roles[0].shape[1])  # type: ignore[union-attr]
    cut = [None if r is None else r[:, :V] for r in roles]
    constraints = [options.get(name) for name in ("bias", "allowed_mask")]
    x = BY_NAME["reference"].implementation("combine", torch.device("cpu"))(
        *roles, params.alpha, *constraints, *(options.get("edits") or (None, None)), V
    )
    check(found, cut, params.alpha, x, found.token_ids)
    alone = backend.sample(*roles, params, **options)
    assert alone.attribution is None
    oracle.assert_same(found._replace(attribution=None), alone)


@attributing
@pytest.mark.parametrize("vocab_size", (1, 127, 129, 5000))
@pytest.mark.parametrize("dtypes", ("fff", "bbb", "hhh", "bfh"))
def test_random_rows(backend, dtypes, vocab_size):
    if backend.interpreted and (dtypes, vocab_size) != ("bfh", 129):
        pytest.skip("0.1 s a row and more in the interpreter: tests/ptx has wider rows")
    B = sized(backend, 3, 2)
    kinds = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
    g = torch.Generator().manual_seed(vocab_size)
    roles: list[Any] = [
        (3 * torch.randn(B, vocab_size + 3, generator=g)).to(kinds[d]) for d in dtypes
    ]
    params = ptk.RowParams.make(
        B, temperature=0.7, seed=torch.arange(B), alpha=torch.arange(B) * 0.75 - 0.75
    )
    options: dict[str, Any] = {"vocab_size": vocab_size}
    run(backend, roles, params, **options)
    run(backend, [roles[0], None, None], params, **options)
    if vocab_size > 1:
        mask = torch.randint(-(2**31), 2**31, (B, -(-vocab_size // 32)), generator=g)
        options["bias"] = torch.randn(B, vocab_size, generator=g)
        options["allowed_mask"] = mask.int()
        run(backend, roles, params, **options)
        # Of the likeliest tokens, too: the divergence is that of x after the edits.
        ids = roles[0][:, :vocab_size].float().topk(3).indices
        bias = torch.tensor([-20.0, 3.0, 0.5]).expand(B, 3)
        options["edits"] = ptk.Edits.make(ids.int(), bias=bias, presence_penalty=0.5)
        run(backend, roles, params, **options)


def awkward(V: int) -> list[Tensor]:
    """Rows with NaN, infinities, nothing left, outliers, equal logits."""
    g = torch.Generator().manual_seed(7)
    base, expert, anti = torch.randn(3, 13, V, generator=g)
    base[0, 3], expert[1, 4], anti[2, 5] = NAN, NAN, NAN
    base[3, 6], base[4, [2, 9]], expert[5, 8] = -INF, INF, INF
    base[6] = -INF
    base[7, V - 2], expert[7, V - 3], anti[7, 1] = 300.0, 500.0, 400.0
    base[8, :128], expert[8, :128] = -INF, -900.0
    base[9, 0], expert[9, V - 1] = 3e38, -3e38
    base[10], expert[10], anti[10] = 1.0, 0.5, 0.5
    base[11, :130], anti[11] = NAN, -INF
    expert[12, 200] = -3e38  # as models write into what they never give
    return [base, expert, anti]


@attributing
def test_awkward_rows(backend):
    roles: list[Tensor | None] = [*awkward(700)]
    for alpha in (1.0, 0.0):
        run(backend, roles, ptk.RowParams.make(13, alpha=alpha, seed=3))


@attributing
def test_rows_with_nothing_to_draw(backend):
    base, expert, anti = torch.randn(3, 2, 300)
    base[1] = -INF
    params = ptk.RowParams.make(2, top_p=torch.tensor([2.0, 1.0]))
    a = backend.sample(base, expert, anti, params, attribution=True).attribution
    for name in ("base", "expert", "anti", "proxy", "kl"):
        assert getattr(a, name).isnan().all()
    assert a.base_rank.tolist() == [0, 0] and a.changed.tolist() == [False, False]


@attributing
def test_given_tokens(backend):
    V = 400
    roles: list[Any] = [*torch.randn(3, 7, V, generator=torch.Generator().manual_seed(1))]
    roles[0][3, 17] = -INF
    params = ptk.RowParams.make(7, alpha=1.0, seed=2)
    given = torch.tensor([5, -1, V - 1, 17, V, 2**40, 0])
    found = backend.sample(*roles, params, attribution=given)
    x = ptk.combine(roles[0], roles[1], roles[2], 1.0)
    ids = torch.where(given < 0, found.token_ids, given)
    check(found, roles, params.alpha, x, torch.where(ids >= V, -1, ids))
    none = backend.sample(*[r[:0] for r in roles], attribution=True).attribution
    assert len(none.columns) == len(none.changed) == 0


@pytest.mark.skipif(BY_NAME["cpu"].unusable() is not None, reason="the C++ extension is not built")
def test_threads_that_share_a_row_change_no_bit():
    roles: Any = torch.randn(3, 1, 40_001)
    params = ptk.RowParams.make(1, seed=4)
    alone = ptk.sample(roles[0], roles[1], roles[2], params, attribution=True, backend="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shared = ptk.sample(roles[0], roles[1], roles[2], params, attribution=True, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    oracle.assert_same(alone, shared)


def test_what_is_refused():
    x, device = torch.zeros(2, 8), torch.device("cuda", 0)
    out = ptk.sample(x)
    with pytest.raises(ValueError, match="sample: out must be None with attribution"):
        ptk.sample(x, attribution=True, out=out)
    for wrong in (torch.zeros(3, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"sample: attribution must be torch.int64 of shape"):
            ptk.sample(x, attribution=wrong)
    with pytest.raises(ValueError, match="sample: attribution must be contiguous, got stride 2"):
        ptk.sample(x, attribution=torch.zeros(4, dtype=torch.int64)[::2])
    with pytest.raises(TypeError, match="sample: attribution must be a tensor, got str"):
        ptk.sample(x, attribution="drawn")  # type: ignore[arg-type]
    reason = "it has no kernel for attribution, backend 'triton' has one"
    assert BY_NAME["cuda"].refusal("attribution", device) == reason
    assert choose("NVIDIA H200", "attribution", 32_000, 8) == "triton"
