"""Philox against published vectors and Python integers; the contract's uniform and its ends."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from proxytune_kernels import rng
from tests.ops import oracle

ONES = 2**32 - 1
# Random123's known answers (kat_vectors, philox4x32 10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN, ids=("zeros", "ones", "pi"))
def test_known_answers(counter, key, wanted):
    low, high = (torch.tensor(w) for w in key)
    out = rng.philox(tuple(torch.tensor(w) for w in counter), (low, high))
    assert tuple(int(w) for w in out) == wanted
    assert oracle.philox_words(counter, key) == wanted


def test_philox_broadcasts_and_agrees_with_python_integers():
    g = torch.Generator().manual_seed(0)
    counter = torch.randint(2**32, (4, 200), generator=g)
    key = torch.randint(2**32, (2, 200), generator=g)
    out = torch.stack(rng.philox(tuple(counter), (key[0], key[1])), 1)
    for i in range(200):
        wanted = oracle.philox_words(tuple(counter[:, i].tolist()), tuple(key[:, i].tolist()))
        assert tuple(out[i].tolist()) == wanted


@pytest.mark.parametrize("seed", (0, 5, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF))
@pytest.mark.parametrize("position", (0, 3, 2**32 - 1, 2**32, 2**40 + 9))
def test_counter_layout(seed, position):
    """(token >> 2, position low, position high, stream | retry << 8), word token & 3."""
    tokens = [0, 1, 2, 3, 4, 127, 151_935, 2**19 - 1]
    for stream in rng.STREAMS.values():
        for retry in (0, 2):
            out = rng.words(
                torch.tensor([seed]), torch.tensor([position]), torch.tensor(tokens), stream, retry
            )
            key = (seed % 2**32, (seed >> 32) % 2**32)
            wanted = [
                oracle.philox_words(
                    (t // 4, position % 2**32, position // 2**32, stream + 256 * retry), key
                )[t % 4]
                for t in tokens
            ]
            assert out.tolist() == [wanted]


def test_streams_are_numbered_as_the_contract_says():
    assert list(rng.STREAMS.items()) == [
        ("sample", 0), ("draft", 1), ("accept", 2), ("residual", 3), ("bonus", 4),
    ]  # fmt: skip


def test_words_of_per_row_tokens():
    """ids [B, N] give what ids [N] give each row."""
    seed, position = torch.tensor([1, 2]), torch.tensor([3, 4])
    ids = torch.tensor([5, 6, 9])
    shared = rng.words(seed, position, ids, 1)
    assert torch.equal(shared, rng.words(seed, position, ids.expand(2, -1), 1))
    assert shared.unique().numel() == 6


def test_uniform_is_the_word_and_a_half():
    seed, position, ids = torch.tensor([7, -9]), torch.tensor([0, 2**33]), torch.arange(400)
    u = rng.uniform(seed, position, ids, 2)
    assert u.dtype == torch.float32 and u.shape == (2, 400)
    for b in range(2):
        for t in range(400):
            exact = oracle.uniform(int(seed[b]) % 2**64, int(position[b]), t, 2)
            # two roundings to fp32: the word's and the sum's
            assert abs(Fraction(float(u[b, t])) - exact) <= exact / 2**23


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([1], 1.5 * 2**-32),
        ([0, 0x80000000], (2**31 + 0.5) * 2.0**-64),
        ([0, 1], 1.5 * 2.0**-64),
        ([0, 0, 3], 3.5 * 2.0**-96),
        ([0, 0, 0], 2.0**-97),
        ([ONES], 1 - 2.0**-24),
        ([ONES - 63], 1 - 2.0**-24),
        ([0x7FFFFFFF], 0.5),
        ([0xFFFFFE00], 1 - 2.0**-23),
    ],
)
def test_ends_of_the_uniform(monkeypatch, words, wanted):
    """A word of 0 is drawn again, 2^32 finer, twice at most; the largest words stay below 1."""
    asked = []

    def scripted(seed, position, token_ids, stream, retry=0):
        asked.append(retry)
        return torch.full((1, 1), words[retry])

    monkeypatch.setattr(rng, "words", scripted)
    key = torch.tensor([0]), torch.tensor([0]), torch.tensor([0])
    u = float(rng.uniform(*key, 0))
    assert u == pytest.approx(wanted, rel=2.0**-23) and 2.0**-97 <= u <= 1 - 2.0**-24
    assert asked == list(range(len(words)))
    monkeypatch.setattr(rng, "uniform", lambda *a: torch.tensor([[u]]))
    g = float(rng.gumbel(*key, 0))
    assert math.isfinite(g)
    assert g == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-14)


def test_only_zero_words_are_drawn_again(monkeypatch):
    def scripted(seed, position, token_ids, stream, retry=0):
        return torch.tensor([[5, 0, 9]]) if retry == 0 else torch.tensor([[77, 2**31, 77]])

    monkeypatch.setattr(rng, "words", scripted)
    u = rng.uniform(torch.tensor([0]), torch.tensor([0]), torch.arange(3), 0)
    assert u.tolist() == [[5.5 * 2.0**-32, (2.0**31) * 2.0**-64, 9.5 * 2.0**-32]]


@pytest.mark.parametrize(
    ("seed", "position", "token"),
    [(3, 1757194, 46), (12, 586726, 21), (28, 3713140, 32), (29, 1473643, 6)],
)
def test_real_words_of_0(seed, position, token):
    """Four of the 2^-32 that are: found by search, so that nothing is scripted here."""
    key = torch.tensor([seed]), torch.tensor([position]), torch.tensor([token])
    assert rng.words(*key, 0).item() == 0
    u = rng.uniform(*key, 0).item()
    assert 2.0**-65 < u < 2.0**-32
    assert u == pytest.approx(float(oracle.uniform(seed, position, token, 0)), rel=2.0**-23)
    assert rng.gumbel(*key, 0).item() > 22.18
