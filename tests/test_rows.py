"""The rows that tests and counts of routes use are what their names say."""

from __future__ import annotations

import pytest
import torch

from tests import rows

V = 20_000


@pytest.mark.parametrize("kind", list(rows.KINDS))
def test_rows_come_again(kind):
    made, again = (rows.make(kind, 2, V, torch.bfloat16, seed=4) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))
    assert all(role.shape == (2, V) and role.dtype == torch.bfloat16 for role in made)


def test_likely_ids_lie_together_or_not():
    near, far = (rows.make(kind, 1, V, torch.float32)[0][0] for kind in ("together", "peaked"))
    assert torch.equal(near.sort().values, far.sort().values)
    # The r-th likeliest has an id within a factor of four of r.
    rank = torch.arange(1000)
    ids = near.argsort(descending=True)[:1000]
    assert (ids <= 4 * rank + 4).all() and (rank <= 4 * ids + 4).all()
    assert far.argsort(descending=True)[:1000].max() > V // 2


def test_normal_rows_have_their_deviations():
    for kind, deviation in (("middling", 2.5), ("flat", 0.5)):
        base, expert, anti = rows.make(kind, 1, V, torch.float32)
        assert abs(float(base.std()) / deviation - 1) < 5 / (2 * V) ** 0.5  # five standard errors
        assert not expert.any() and not anti.any()
