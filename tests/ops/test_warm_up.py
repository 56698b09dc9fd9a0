"""warm_up where nothing is compiled, and its errors; tests/ptx/test_launches.py has the kernels."""

from __future__ import annotations

import pytest
import torch

import proxytune_kernels as ptk

BF16 = torch.bfloat16


def test_a_backend_that_compiles_nothing_is_not_called(monkeypatch):
    def called(*args: object, **kwargs: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr("proxytune_kernels.ops.operators.sample", called)
    operators = ("sample", "combine", "score", "verify")
    made = ptk.warm_up(
        "cpu", [BF16] * 3, 1000, operators=operators, backend="reference", progress=True
    )
    assert made == dict.fromkeys(operators, 0)
    assert ptk.warm_up("cpu", [BF16], 1000) == {"sample": 0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(operators=["draw"]), "operators must be of .* got 'draw'"),
        (dict(dtypes=[BF16] * 2), "of one role or of three, got 2"),
        (dict(widths=[1000]), "of one role or of three, got 3 and 1"),
        (dict(backend="cud"), "backend must be one of .* got 'cud'"),
    ],
)
def test_errors(settings, words):
    given = dict(device="cpu", dtypes=BF16, vocab_size=1000) | settings
    with pytest.raises(ValueError, match=words):
        ptk.warm_up(**given)


@pytest.mark.skipif(ptk.backends()["triton"] is None, reason="triton runs here")
def test_a_backend_that_cannot_run_is_refused():
    with pytest.raises(RuntimeError, match="backend 'triton' can't run"):
        ptk.warm_up("cpu", BF16, 1000, backend="triton")
