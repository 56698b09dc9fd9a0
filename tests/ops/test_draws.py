"""Draws follow the filtered distribution: 1.2 * 10^7 of them, from fixed seeds.

Seeds are fixed, so a right kernel passes for ever; each bound is one that a right kernel, whose
p-values are uniform, would miss with the probability named beside it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.ops import oracle

# Per test; about a dozen such tests are made.
SIGNIFICANCE = 1e-5


def draw(backend, row, draws, **params):
    """Tokens at positions 0 to draws - 1."""
    position = torch.arange(draws)
    return backend.sample(row.expand(draws, -1), position=position, **params).token_ids.numpy()


def g_test(counts, expected):
    """p-value of the log-likelihood ratio; cells under 10 expected draws are pooled."""
    assert counts[expected == 0].sum() == 0  # no draw outside the kept set
    small = expected < 10
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    g = 2 * np.where(counts > 0, counts * np.log(np.maximum(counts, 1) / expected), 0).sum()
    return stats.chi2.sf(g, len(counts) - 1)


CASES: dict[str, dict[str, Any]] = {
    "whole": dict(vocab_size=64, spread=2.0),
    "flat": dict(vocab_size=100, spread=0.3),
    "top_p": dict(vocab_size=130, spread=2.5, temperature=0.7, top_p=0.9),
    "top_k and min_p": dict(vocab_size=64, spread=1.5, temperature=1.6, top_k=20, min_p=0.02),
    "joint": dict(vocab_size=64, spread=1.0, top_k=30, top_p=0.8, filter_order="joint"),
    "hf": dict(vocab_size=64, spread=1.0, top_k=30, top_p=0.8, min_p=0.1, filter_order="hf"),
}


@pytest.mark.slow
def test_pooled_g_test(fast):
    """8.4 * 10^6 draws over six distributions: each p-value, and all of them together."""
    draws, p_values = 1_400_000, []
    for i, case in enumerate(CASES.values()):
        case = dict(case)
        g = torch.Generator().manual_seed(i)
        row = torch.randn(case.pop("vocab_size"), generator=g) * case.pop("spread")
        tokens = draw(fast, row, draws, seed=1000 + i, **case)
        counts = np.bincount(tokens, minlength=len(row))
        p_values.append(g_test(counts, draws * oracle.law(row, **case)))
    assert min(p_values) > SIGNIFICANCE / len(p_values), p_values
    assert stats.combine_pvalues(p_values).pvalue > SIGNIFICANCE, p_values


@pytest.mark.slow
def test_tails_14_to_22_nats_down(fast):
    """Tokens that far below the maximum are drawn as often as they should be.

    Noise from floats near 1 ends at 16.6 nats, from 32-bit words without finer ones at 22.2.
    """
    levels = {14: 64, 16: 256, 18: 1024, 20: 2800, 22: 4047}  # nats down: tokens
    row = torch.cat([torch.zeros(1)] + [torch.full((n,), -float(d)) for d, n in levels.items()])
    level = np.concatenate([[0]] + [np.full(n, d) for d, n in levels.items()])
    draws, batch = 600_000, 200_000
    counts = dict.fromkeys(levels, 0)
    for start in range(0, draws, batch):
        out = fast.sample(
            row.expand(batch, -1), position=torch.arange(start, start + batch), seed=77
        )
        for d in levels:
            counts[d] += int((level[out.token_ids.numpy()] == d).sum())
    total = 1 + sum(n * math.exp(-d) for d, n in levels.items())
    expected = {d: draws * n * math.exp(-d) / total for d, n in levels.items()}
    for d, n in counts.items():  # Poisson: the z-test's exact form, for few draws
        low, high = stats.poisson.cdf(n, expected[d]), stats.poisson.sf(n - 1, expected[d])
        assert min(low, high) > SIGNIFICANCE, (d, n, expected[d])
    deep = (
        sum(n for d, n in counts.items() if d >= 18),
        sum(v for d, v in expected.items() if d >= 18),
    )
    assert stats.poisson.cdf(*deep) > 1e-3 and stats.poisson.sf(deep[0] - 1, deep[1]) > 1e-3, deep


def test_p_values_of_200_seeds_are_uniform(fast):
    """Each seed's draws are a sample of its own: Kolmogorov-Smirnov over 200 chi-square tests."""
    row = torch.randn(24, generator=torch.Generator().manual_seed(3))
    p = oracle.law(row)
    draws, p_values = 5000, []
    for seed in range(200):
        counts = np.bincount(draw(fast, row, draws, seed=seed), minlength=24)
        p_values.append(stats.chisquare(counts, draws * p).pvalue)
    assert stats.kstest(p_values, "uniform").pvalue > SIGNIFICANCE


def _independent(one, other, size):
    table = np.zeros((size, size))
    np.add.at(table, (one, other), 1)
    return stats.chi2_contingency(table, correction=False).pvalue


@pytest.mark.parametrize(
    "apart", ("position", "position high", "seed", "seed high", "stream", "row shift")
)
def test_draws_are_independent(fast, apart):
    """Of a neighbour in position, seed or stream, and of the same logits eight tokens on."""
    draws = 100_000
    row = torch.randn(6, generator=torch.Generator().manual_seed(4)) * 0.5
    position = torch.arange(draws) * 2
    batch = row.expand(draws, -1)
    one = fast.sample(batch, position=position, seed=5).token_ids
    changed = {
        "position": dict(position=position + 1, seed=5),
        "position high": dict(position=position + 2**32, seed=5),
        "seed": dict(position=position, seed=6),
        "seed high": dict(position=position, seed=5 + 2**32),
        "stream": dict(position=position, seed=5, noise_stream="draft"),
        "row shift": dict(position=position, seed=5),
    }[apart]
    if apart == "row shift":  # the same logits at ids 8 on: other counters
        batch = torch.nn.functional.pad(row, (8, 0), value=-torch.inf).expand(draws, -1)
    other = fast.sample(batch, **changed).token_ids - (8 if apart == "row shift" else 0)
    assert _independent(one.numpy(), other.numpy(), 6) > SIGNIFICANCE


def test_the_four_words_of_a_counter_are_independent(fast):
    """Four tokens share a Philox call, one word each: all 24 orders of their noise are alike."""
    draws = 240_000
    position = torch.arange(draws)
    ranks = []
    # Which of the four wins, which of the other three, and so on, gives the order of their noise.
    left = torch.zeros(draws, 4)
    for _ in range(4):
        token = fast.sample(left, position=position, seed=9).token_ids
        left = left.scatter(1, token[:, None], -torch.inf)
        ranks.append(token)
    order = sum(r * 4**i for i, r in enumerate(ranks)).numpy()
    counts = np.unique(order, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE
