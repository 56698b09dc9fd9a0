"""Keyed noise: Philox4x32-10 with the contract's key and counter layout, in plain PyTorch.

Key: the request's 64-bit seed. Counter: ``(token_id >> 2, position low, position high,
stream | retry << 8)``; token ``token_id`` uses word ``token_id & 3``. Source: Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"; docs/contracts.md, Randomness.
"""

from __future__ import annotations

import torch
from torch import Tensor

STREAMS = {"sample": 0, "draft": 1, "accept": 2, "residual": 3, "bonus": 4}
"""Noise streams by number: uses of the noise that must not share a word."""

MAX_RETRIES = 2
"""A word of 0 is drawn again at most so often: u stays above 2^-97, an fp32 normal."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in halves of b so that int64 never overflows."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors that hold 32-bit words, of shapes that broadcast.
        key: two such tensors.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def words(
    seed: Tensor, position: Tensor, token_ids: Tensor, noise_stream: int, retry: int = 0
) -> Tensor:
    """The 32-bit word of each token: int64 [B, N] from seed, position [B], ids [N] or [B, N]."""
    seed, position = seed[:, None], position[:, None]
    shape = torch.broadcast_shapes(seed.shape, token_ids.shape)
    counter = (
        token_ids >> 2,
        position & _LOW,
        (position >> 32) & _LOW,
        torch.full_like(position, noise_stream | retry << 8),
    )
    out = philox(counter, (seed & _LOW, (seed >> 32) & _LOW))
    stacked = torch.stack([word.broadcast_to(shape) for word in out], -1)
    return stacked.gather(-1, (token_ids & 3).broadcast_to(shape)[..., None])[..., 0]


def uniform(seed: Tensor, position: Tensor, token_ids: Tensor, noise_stream: int) -> Tensor:
    """The keyed uniform of each token: fp32 [B, N], in [2^-97, 1 - 2^-24].

    ``u = (word + 0.5) * 2^-32`` rounded to fp32 as ``fma(float(word), 2^-32, 2^-33)``; a word of 0
    is drawn again at ``retry + 1``, 2^32 finer, at most :data:`MAX_RETRIES` times.
    """
    word = words(seed, position, token_ids, noise_stream)
    scale = torch.full(word.shape, 2.0**-32, dtype=torch.float64, device=word.device)
    for retry in range(1, MAX_RETRIES + 1):
        again = word == 0
        if not again.any():
            break
        word = torch.where(again, words(seed, position, token_ids, noise_stream, retry), word)
        scale = torch.where(again, scale * 2.0**-32, scale)
    # word.float() rounds as the kernels' conversion does; the product and sum are exact in fp64.
    u = ((word.float().double() + 0.5) * scale).float()
    return u.clamp(max=1 - 2.0**-24)


def gumbel(seed: Tensor, position: Tensor, token_ids: Tensor, noise_stream: int) -> Tensor:
    """The keyed Gumbel noise ``-log(-log1p(-u))`` of each token: fp64 [B, N]."""
    return -torch.log(-torch.log1p(-uniform(seed, position, token_ids, noise_stream).double()))
