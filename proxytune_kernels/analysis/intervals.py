"""How sure a figure is: bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """A figure and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean(sample: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean along an axis, as `bootstrap` calls a statistic."""
    result: np.ndarray = np.mean(sample, axis=axis)
    return result


def bootstrap(
    *samples: ArrayLike,
    statistic: Callable[..., np.ndarray] = mean,
    level: float = 0.95,
    repeats: int = 2000,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap's interval of a statistic.

    Percentiles, since they are defined for any sample (all prompts right, say), where BCa's
    correction is not.

    Args:
        samples: arrays [n], one value per prompt. Several belong together prompt by prompt and are
            drawn together, so that a difference or a ratio of them is a paired one.
        statistic: takes as many arrays and `axis`, and reduces that axis.
        level: probability that the interval covers, in (0, 1).
        repeats: draws of n prompts with replacement.
        seed: the same seed gives the same interval.

    Returns:
        The statistic of the samples, with the interval's ends. With one prompt nothing is known of
        the spread: both ends are NaN.

    Raises:
        ValueError: no samples, empty ones, or some of different lengths.
    """
    arrays = [np.asarray(sample, dtype=float) for sample in samples]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1 or not arrays[0].size:
        shapes = [array.shape for array in arrays]
        raise ValueError(f"samples: got arrays of shapes {shapes}, want all [n] with one n > 0")
    value = float(statistic(*arrays, axis=-1))
    if arrays[0].size == 1:
        return Interval(value, float("nan"), float("nan"))
    from scipy import stats

    ends = stats.bootstrap(
        arrays,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=repeats,
        confidence_level=level,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return Interval(value, float(ends.low), float(ends.high))
