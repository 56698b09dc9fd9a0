"""Keyed noise: Philox4x32-10, the contract's Gumbel variate, and the Gumbel-max of tokens.

    g = -log(-log1p(-u)),    token = argmax(fl(fl((x - max) * fl(1 / T)) + g))

A draw is the maximum of packed scores, so the order of blocks and programs does not matter. Nothing
is read but x: noise is a function of the key and the token (docs/contracts.md, Randomness).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from proxytune_kernels.kernels.common import INF, LANES, LN2, TILE, block_ids, cleaned, combined

HIGHEST_U = tl.constexpr(1.0 - 2.0**-24)
WORD_ULP = tl.constexpr(2.0**-32)
MOST_TOKENS = tl.constexpr(1 << 19)


class NoiseKey(NamedTuple):
    """What a row's noise depends on, but for the token."""

    seed: Any  # int64
    position: Any  # int64
    stream: Any  # one of rng.STREAMS


@triton.jit
def noise_key(row_params, b, t, stream):
    """The key of request b at position t."""
    return NoiseKey(tl.load(row_params.seed + b), tl.load(row_params.position + b) + t, stream)


@triton.jit
def philox(c0, noise, retry):
    """Four words, uint32, of each counter c0, uint32."""
    seed, position = noise.seed, noise.position
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c1 = tl.zeros_like(c0) + position.to(tl.uint32)
    c2 = tl.zeros_like(c0) + (position >> 32).to(tl.uint32)
    c3 = (tl.zeros_like(c0) + (noise.stream + (retry << 8))).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def tile_words(first, noise, TILES: tl.constexpr):
    """Words of tokens ``first[i] + 0..127``, first int32 [TILES]: uint32 [TILES, 128]."""
    counters = (first[:, None] >> 2) + tl.arange(0, 32)[None, :]
    w0, w1, w2, w3 = philox(counters.to(tl.uint32), noise, 0)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [TILES, 128])


@triton.jit
def token_words(ids, noise, retry):
    """The word of each token, ids int32."""
    w0, w1, w2, w3 = philox((ids >> 2).to(tl.uint32), noise, retry)
    even, odd = tl.where(ids & 2 != 0, w2, w0), tl.where(ids & 2 != 0, w3, w1)
    return tl.where(ids & 1 != 0, odd, even)


@triton.jit
def uniform(words, ids, noise):
    """u of the tokens' first words, in [2^-97, 1 - 2^-24]; a word of 0 is drawn again, finer."""
    u = tl.fma(words.to(tl.float32), WORD_ULP, 0.5 * WORD_ULP)
    zero = words == 0
    retry = tl.full([], 1, tl.int32)
    scale = tl.full([], WORD_ULP * WORD_ULP, tl.float32)
    while (retry <= 2) & (tl.max(tl.ravel(zero.to(tl.int32)), 0) != 0):  # once in 2^32 tokens
        again = token_words(ids, noise, retry)
        u = tl.where(zero, tl.fma(again.to(tl.float32), scale, 0.5 * scale), u)
        zero = zero & (again == 0)
        scale *= WORD_ULP
        retry += 1
    return tl.minimum(u, HIGHEST_U)


@triton.jit
def log_positive(y):
    """log of a positive normal fp32; Cephes logf, within 1 unit in the last place."""
    shifted = y.to(tl.int32, bitcast=True) - 0x3F3504F3  # y = m 2^n, m in [sqrt(1/2), sqrt(2))
    n = shifted >> 23
    f = (y.to(tl.int32, bitcast=True) - (n << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, f, 1.1676998740e-1)
    p = tl.fma(p, f, -1.2420140846e-1)
    p = tl.fma(p, f, 1.4249322787e-1)
    p = tl.fma(p, f, -1.6668057665e-1)
    p = tl.fma(p, f, 2.0000714765e-1)
    p = tl.fma(p, f, -2.4999993993e-1)
    p = tl.fma(p, f, 3.3333331174e-1)
    p = (p * f) * square
    p = tl.fma(n.to(tl.float32), -2.12194440e-4, p)
    p = tl.fma(square, -0.5, p)
    return tl.fma(n.to(tl.float32), 0.693359375, f + p)


@triton.jit
def gumbel(u):
    """-log(-log1p(-u)); u in [2^-97, 1 - 2^-24], so both logs stay finite."""
    y = 1.0 - u
    lost = (1.0 - y) - u  # what rounding y lost, exactly
    e = 0.0 - (log_positive(y) + tl.div_rn(lost, y))
    return 0.0 - log_positive(e)


@triton.jit
def noise_bound(words):
    """An upper bound of log2(e) g by three instructions, at most 0.09 above -log2(u).

    g = -log(-log1p(-u)) <= -log(u) <= -log(word 2^-32), and a float's bits are a lower bound of its
    logarithm: log2(m 2^e) >= e + m - 1, m in [1, 2). A word of 0 (drawn again, u at least 2^-97)
    gives 159. Off by 2^-16 for the rounding of the bits to fp32.
    """
    bits = words.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.fma(bits.to(tl.float32), -(2.0**-23), 159.0)


@triton.jit
def packed_score(score, ids):
    """int64 whose maximum is the highest score, the lowest id on ties; below all where -inf."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def best_of(score, ids):
    """The packed score of the best token."""
    return tl.max(tl.ravel(packed_score(score, ids)), 0)


@triton.jit
def winner(packed, vocab_size=MOST_TOKENS):
    """Token id of a packed score, int64.

    Where none was packed, as where parameters are overwritten between the launches of a call, it is
    still one of the row's: a look-up must not leave the row.
    """
    return tl.minimum(0x7FFFFFFF - (packed & 0x7FFFFFFF), vocab_size - 1)


@triton.jit
def score_of(packed):
    """The score of a packed score; NaN where none was packed."""
    ordered = (packed >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def gumbel_max_tile(logits, alpha, b, t, tile, row_max, inv_t, greedy, noise, vocab_size):
    """Packed score of the best token of one whole tile; greedy rows go by x alone."""
    ids = tile * TILE + tl.arange(0, TILE)
    x = combined(logits, alpha, b, t, ids, ids < vocab_size)
    x = cleaned(x, row_max)
    score = x - row_max
    if greedy == 0:
        first = tl.full([1], 0, tl.int32) + tile * TILE
        words = tl.reshape(tile_words(first, noise, 1), [TILE])
        score = score * inv_t + gumbel(uniform(words, ids, noise))
    return best_of(tl.where(x > -INF, score, -INF), ids)


@triton.jit
def block_words(block, noise, PER: tl.constexpr):
    """Words of a block's tokens, uint32 [128, PER]."""
    first = block * (LANES * PER) + tl.arange(0, PER) * 128
    return tl.reshape(tile_words(first, noise, PER), [LANES, PER])


@triton.jit
def gumbel_max_block(best, shifted, taken, block, inv_t, noise, PER: tl.constexpr):
    """The better of ``best`` (a packed score) and the block's taken tokens.

    Scores are evaluated only where a cheap upper bound of them passes the best so far.
    """
    words = block_words(block, noise, PER)
    scaled = shifted * inv_t
    most = LN2 * noise_bound(words)
    # scaled is at most 0, perhaps -inf: what is added for rounding must not make it NaN.
    bound = (1.0 - 2e-5) * scaled + (most + (2e-4 + 1e-5 * tl.abs(most)))
    highest = tl.max(tl.max(tl.where(taken, bound, -INF), 1), 0)
    if (highest > -INF) & ((highest < score_of(best)) == 0):  # true for NaN: nothing yet
        ids = block_ids(block, PER)
        score = scaled + gumbel(uniform(words, ids, noise))
        best = tl.maximum(best, best_of(tl.where(taken, score, -INF), ids))
    return best
