"""Penalties and biases of some tokens: against single operations, and as logits like others."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels.ops.backends import resolve
from tests.ops.conftest import registered, sized

INF, NAN = torch.inf, torch.nan
V, M = 389, 60  # three tiles and some


def numpy_x(x: Tensor, edits: ptk.Edits) -> Tensor:
    """One entry after the other, one rounding an operation."""
    out = x.numpy().copy()
    entries, bits = edits.entries.numpy(), edits.entries[..., 3].contiguous().view(torch.float32)
    with np.errstate(all="ignore"):
        for row, penalties in enumerate(edits.penalties.numpy()):
            repetition, presence, frequency = penalties
            for i, (token_id, count, in_prompt, _) in enumerate(entries[row]):
                if not (0 <= token_id < x.shape[1]) or not out[row, token_id] > -np.inf:
                    continue
                y = out[row, token_id] + bits[row, i].numpy()
                if count > 0 or in_prompt:
                    y = y / repetition if y > 0 else y * repetition
                if count > 0:
                    y = y - frequency * np.float32(count)
                    y = y - presence
                out[row, token_id] = y + np.float32(0)
    return torch.from_numpy(out)


def rows(seed: int) -> tuple[Tensor, ptk.Edits]:
    """Logits with all that is odd, entries at the ends and side by side, some that are none."""
    g, count = torch.Generator().manual_seed(seed), 6
    x = torch.randn(count, V, generator=g) * 4
    ids = torch.stack([torch.randperm(V, generator=g)[:M] for _ in range(count)])
    ids[1] = torch.arange(V - M, V)  # of them the last, in the tile that is not whole
    ids[2] = torch.arange(M)
    ids[:, ::7] = -1
    ids[3, ::7] = torch.tensor([V, V + 31, 2**31 - 1, -(2**31), -2, 2**19, V, V, V])
    x[0, ids[0, 1:8]] = torch.tensor([NAN, -INF, -0.0, 0.0, 3e38, -3e38, 1e-45])
    x[4, ids[4, 1]] = INF
    x[5, ids[5, 1]] = 40.0  # the likeliest, until its entry
    bias = torch.randn(ids.shape, generator=g)
    bias[1, 1:9:2], bias[5, 1] = -INF, -90.0
    bias[0, 5:7] = torch.tensor([3e38, -3e38])
    edits = ptk.Edits.make(
        ids,
        counts=torch.randint(0, 4, ids.shape, generator=g),
        in_prompt=torch.randint(0, 2, ids.shape, generator=g),
        bias=bias,
        repetition_penalty=torch.tensor([1.3, 0.7, 1.0, 1.1, 2.0, 1.0]),
        presence_penalty=torch.tensor([0.0, 0.5, -0.3, 2.0, 0.1, 0.0]),
        frequency_penalty=torch.tensor([0.2, 0.0, 1.7, -0.4, 0.0, 0.0]),
    )
    return x, edits


def same(found: Any, wanted: Any) -> None:
    for left, right in zip(found, wanted, strict=True):
        if isinstance(right, Tensor):
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        elif right is not None:
            same(left, right)


@registered
def test_x_is_that_of_single_operations(backend):
    x, edits = rows(1)
    found = backend.combine(x, None, None, edits=edits)
    same([found], [numpy_x(x, edits)])
    assert (found != backend.combine(x, None, None)).sum() > 150
    none = ptk.Edits(edits.entries[:, :0], edits.penalties)
    same([backend.combine(x, None, None, edits=none)], [backend.combine(x, None, None)])


@registered
def test_draws_are_those_of_logits_that_came_so(backend):
    """Bit for bit, of every route that a row can take; the counts differ from place to place."""
    x, edits = rows(2)
    steering = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1))
    alpha = torch.tensor([1.0, 0.0, -0.5, 1.0, 1.0, 0.0])
    plain = backend.combine(x, *steering, alpha, edits=edits)
    ways = [{"top_k": 40, "top_p": 0.9}, {}, {"temperature": 0.0}, {"min_p": 0.05}]
    for filters in ways[: sized(backend, 4, 1)]:
        options: dict[str, Any] = {**filters, "seed": 5, "top_logprobs": 4}
        found = backend.sample(x, *steering, alpha=alpha, edits=edits, **options)
        same(found, backend.sample(plain, **options))

    logits = torch.stack([x, x, x], 1)
    pair = [role[:, None].expand(-1, 3, -1) for role in steering]
    entries = edits.entries[:, None].repeat(1, 3, 1, 1)
    entries[..., 1] += torch.arange(3)[:, None]
    positions = edits._replace(entries=entries)
    each = [
        backend.combine(
            x, *steering, alpha, edits=edits._replace(entries=entries[:, j].contiguous())
        )
        for j in range(3)
    ]
    first = backend.sample(x, *steering, alpha=alpha, edits=edits, seed=5).token_ids
    drafts = torch.stack([first, torch.full_like(first, 3)], 1)
    noise = torch.randn(6, 2, V, generator=torch.Generator().manual_seed(2))
    for mode in ({}, {"mode": "rejection", "draft_logits": logits[:, :2] + noise}):
        options = {"top_p": 0.95, "seed": 5, **mode}
        found = backend.verify(logits, *pair, drafts, alpha=alpha, edits=positions, **options)
        same(found, backend.verify(torch.stack(each, 1), None, None, drafts, **options))
        assert int(found.num_accepted.sum()) > 1


def test_operators_without_edits_say_what_has_them():
    """And that gives what is meant."""
    x, edits = rows(1)
    whole = ptk.combine(x, None, None, edits=edits)
    head, ids = ptk.Head(torch.eye(len(x)), x.T.contiguous()), torch.arange(len(x))[:, None]
    with pytest.raises(ValueError, match="sample_hidden: edits must be None.* sample does, of the"):
        ptk.sample_hidden(head, edits=edits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="score: edits must be None.* combine does, and score"):
        ptk.score(x[:, None], None, None, ids, edits=edits)  # type: ignore[arg-type]
    scored = ptk.score(whole[:, None], None, None, ids)[1:4]
    wanted = whole.log_softmax(-1).gather(1, ids)[1:4]  # the rows without NaN and infinities
    torch.testing.assert_close(scored, wanted, rtol=2e-6, atol=2e-6)

    shard = ptk.sharded.Shard(100, 150, (0, 100, 250), (100, 150, V - 250), "cpu", None)
    part, entries = x[:, 100:250], edits.entries.clone()
    for op in (ptk.sharded.sample, partial(ptk.sharded.verify, draft_token_ids=ids)):
        with pytest.raises(ValueError, match="edits must be None.* combine does: .*vocab_start"):
            op(part, None, None, shard=shard, edits=edits)  # type: ignore[arg-type]
    entries[..., 0] -= 100
    same(
        [ptk.combine(part, None, None, edits=edits._replace(entries=entries))], [whole[:, 100:250]]
    )


X, EDITS = rows(3)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (EDITS._replace(entries=EDITS.entries.long()), "edits.entries must be contiguous .*int32"),
        (EDITS._replace(entries=EDITS.entries[..., :3]), r"edits.entries must .*\[6, 60, 4\], got"),
        (EDITS._replace(entries=EDITS.entries[:, ::2]), "edits.entries must be contiguous"),
        (EDITS._replace(penalties=EDITS.penalties[:1]), r"edits.penalties must .*\[6, 3\], got"),
        (EDITS.entries, "edits must be a Edits, got Tensor"),
    ],
)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_what_can_not_be_edits_is_named(name, edits, message):
    if ptk.backends()[name] is not None:
        pytest.skip(f"backend {name}: {ptk.backends()[name]}")
    with pytest.raises((ValueError, TypeError), match=f"sample: {message}"):
        ptk.sample(X, edits=edits, backend=name)


def test_the_cluster_kernels_refuse_edits(monkeypatch):
    backends = sys.modules["proxytune_kernels.ops.backends"]
    monkeypatch.setattr(backends, "_refusal", lambda *_: None)
    monkeypatch.setattr(backends, "_max_vocab_size", lambda *_: None)
    monkeypatch.setattr(backends, "choose", lambda *_: "cuda")
    monkeypatch.setattr(backends, "_device_name", lambda _: "NVIDIA H200")
    base = torch.empty((1, V), device="meta")
    place = type("On", (), {"device": torch.device("cuda"), "shape": base.shape})()
    assert resolve(None, place, "sample", V) == "cuda"
    assert resolve(None, place, "sample", V, edited=True) == "triton"
    with pytest.raises(RuntimeError, match="backend 'cuda' can't run: it takes no edits"):
        resolve("cuda", place, "sample", V, edited=True)
