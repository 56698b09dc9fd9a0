"""Intervals cover at their rate, and pair what belongs together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from proxytune_kernels.analysis.intervals import bootstrap


def test_an_interval_covers_at_its_rate() -> None:
    # 1,000 repeats at 90%: the share has a standard deviation of .0095. Percentiles of 60 values of
    # an exponential cover about a point less than they say.
    rng = np.random.default_rng(0)
    samples = rng.exponential(size=(1000, 60))
    ends = [bootstrap(sample, level=0.9, repeats=400, seed=i) for i, sample in enumerate(samples)]
    covered = np.mean([end.low <= 1 <= end.high for end in ends])
    assert 0.9 - 0.01 - 3 * 0.0095 < covered < 0.9 + 3 * 0.0095


def test_samples_are_paired() -> None:
    left = np.random.default_rng(0).normal(size=50)
    assert bootstrap(
        left + 1, left, statistic=lambda a, b, axis: (a - b).mean(axis)
    ) == pytest.approx((1, 1, 1))


def test_an_interval_at_its_edges() -> None:
    assert bootstrap([1.0] * 30) == (1, 1, 1)
    assert math.isnan(bootstrap([0.5]).low)
    assert str(bootstrap([0.5, 0.5])) == "0.5 [0.5, 0.5]"
    cases: list[list[Any]] = [[], [[]], [[1.0, 2.0], [1.0]], [[[1.0]]]]
    for wrong in cases:
        with pytest.raises(ValueError, match="samples: got arrays"):
            bootstrap(*wrong)
