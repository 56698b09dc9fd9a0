"""What can't be meant is an error that names the argument; what is odd but clear is not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk

pytestmark = pytest.mark.slow

ROWS, DRAFTS, SIZE = 2, 2, 40


def good(op: str) -> dict[str, Any]:
    """Arguments of one call that is right."""
    leading = (ROWS,) if op in ("sample", "combine") else (ROWS, DRAFTS + 1)
    roles = {name: torch.randn(*leading, SIZE) for name in ("base", "expert", "anti")}
    if op == "score":
        return roles | {"token_ids": torch.zeros(leading, dtype=torch.int64)}
    constraints = {
        "bias": torch.zeros(*leading, SIZE),
        "allowed_mask": torch.full((*leading, 2), -1, dtype=torch.int32),
    }
    if op != "verify":
        return roles | constraints
    ids = torch.zeros(ROWS, DRAFTS, dtype=torch.int64)
    drafts = {"draft_token_ids": ids, "draft_logits": torch.randn(ROWS, DRAFTS, SIZE)}
    return roles | constraints | drafts | {"mode": "rejection"}


TENSORS = {op: [n for n, v in good(op).items() if isinstance(v, Tensor)]
           for op in ("sample", "combine", "score", "verify")}  # fmt: skip

WRONG = {
    "dtype": lambda t: t.double() if t.is_floating_point() else t.to(torch.int16),
    "complex": lambda t: t.to(torch.complex64),
    "dimension": lambda t: t[None],
    "rows": lambda t: torch.cat([t, t]),
    "narrow": lambda t: t[..., : t.shape[-1] // 2],
    "column stride": lambda t: torch.stack([t, t], -1)[..., 0],
    "list": lambda t: t.tolist(),
    "meta": lambda t: t.to("meta"),
}
# Token ids may be strided: these run.
MAY_BE = {("column stride", "token_ids"), ("column stride", "draft_token_ids")}
CASES = [(op, name, kind) for op, names in TENSORS.items() for name in names for kind in WRONG
         if (kind, name) not in MAY_BE]  # fmt: skip


@pytest.mark.filterwarnings("ignore:proxytune_kernels runs its slow reference:RuntimeWarning")
@pytest.mark.parametrize(("op", "name", "kind"), CASES)
def test_a_wrong_tensor_is_named(op, name, kind):
    arguments = good(op) | {"vocab_size": SIZE}
    arguments[name] = WRONG[kind](arguments[name])
    # One of the others may be the one that disagrees with base.
    names = "|".join(TENSORS[op]) if name == "base" else name
    if kind == "narrow":
        names += "|vocab_size"  # it is the given vocab_size that the role is too narrow for
    with pytest.raises((ValueError, TypeError), match=rf"{op}: ({names})\b"):
        getattr(ptk, op)(**arguments)


@pytest.mark.parametrize("size", [1, 40, 20_000])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_empty_batch_gives_empty_results(size, threads):
    torch.set_num_threads(threads)
    rows, grid = torch.zeros(0, size), torch.zeros(0, 3, size)
    ids = torch.zeros(0, 3, dtype=torch.int64)
    assert ptk.sample(rows, rows, rows).token_ids.shape == (0,)
    assert ptk.combine(rows, rows, rows).shape == (0, size)
    assert ptk.score(grid, None, None, ids).shape == (0, 3)
    for mode, drafts in (("coupled", None), ("rejection", grid[:, :2])):
        out = ptk.verify(grid, None, None, ids[:, :2], mode=mode, draft_logits=drafts)
        assert out.token_ids.shape == (0, 3)


def test_the_last_position_is_the_last():
    # One more would be 2^63: out of range, as any negative position.
    logits = torch.zeros(1, 2, 1)
    out = ptk.verify(logits, None, None, torch.zeros(1, 1, dtype=torch.int64), position=2**63 - 1)
    assert out.token_ids.tolist() == [[0, -1]]
    assert out.num_accepted.tolist() == [1] and out.status.tolist() == [8]


def test_bias_on_a_token_that_steering_masked():
    base, expert = torch.zeros(1, 2), torch.tensor([[-torch.inf, 0.0]])
    bias = torch.tensor([[torch.inf, 0.0]])
    outputs = [ptk.sample(base, expert, base, bias=bias, backend=name)
               for name, reason in ptk.backends().items() if reason is None]  # fmt: skip
    assert len(outputs) > 1
    assert all(torch.equal(out.status, outputs[0].status) for out in outputs)


def test_messages_hold_no_source_lines():
    with pytest.raises(ValueError) as caught:
        ptk.sample(torch.zeros(1, 4), bias=torch.zeros(2, 4))
    assert not re.search(r"\.(cpp|py|h):\d", str(caught.value))
