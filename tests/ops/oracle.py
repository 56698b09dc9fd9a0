"""What the operators are held to, in numpy, exact fractions and Python integers.

Written from the contract and apart from the package's own reference: the two must agree with the
kernels, not with each other's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = ("vllm", "hf", "joint")

# A mass is right to 2^-23 of itself, and 2^-24 more per nat below the maximum (the rounding of
# x - max). A share of the whole is then off by at most p (1 - p) times the difference of the mean
# errors of two parts, which is under 2^-24 (1 + ln V): 8.5e-7 at the widest vocabulary, 2^19.
SHARE_BAND = 1e-6
# min_p's threshold T log(min_p) and the difference x - max are each rounded to fp32.
THRESHOLD_BAND = 2.0**-22


class Filters(NamedTuple):
    """One value a row, [B]."""

    temperature: Array
    top_k: Ints
    top_p: Array
    min_p: Array
    filter_order: Ints

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> Filters:
        """Those among the rows' parameters by name."""
        columns = [params[name] for name in cls._fields]
        return cls(*((t.double() if t.is_floating_point() else t.long()).numpy() for t in columns))


def exact(t: Tensor) -> Array:
    """The tensor's values in fp64, which holds all of fp32, bf16 and fp16."""
    return t.detach().cpu().double().numpy()


def combined(base: Tensor, expert: Tensor | None, anti: Tensor | None, alpha: Tensor) -> Array:
    """``base + alpha * fl32(expert - anti)`` rounded to fp32 once, but for an 80-bit detour."""
    wide = exact(base).astype(np.longdouble)
    if expert is None or anti is None:
        return wide.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = (exact(expert) - exact(anti)).astype(np.float32).astype(np.longdouble)
        scale = exact(alpha).astype(np.longdouble)
        scale = scale.reshape(scale.shape + (1,) * (wide.ndim - scale.ndim))
        steered = (wide + scale * difference).astype(np.float32).astype(np.float64)
    keeps_base = (scale == 0) | np.isneginf(wide)
    return np.where(keeps_base, wide.astype(np.float64), steered)


def nearest_fp32(value: Fraction) -> float:
    """The fp32 number nearest to an exact value of normal size, the even one on a tie."""
    guess = np.float32(float(value))
    around = [np.nextafter(guess, np.float32(s * np.inf)) for s in (-1, 1)]

    def badness(candidate: np.float32) -> tuple[Fraction, int]:
        distance = abs(Fraction(float(candidate)) - value)
        return distance, int(candidate.view(np.uint32)) & 1

    return float(min((guess, *around), key=badness))


class Kept(NamedTuple):
    """Kept sets as prefixes of ``order``: any size in [low, high] is within rounding."""

    order: Ints  # [B, V]: token ids, highest x first, lower id first on ties
    low: Ints  # [B]
    high: Ints  # [B]


def _first_reaching(cumulative: Array, target: Array) -> Ints:
    return 1 + (cumulative < target[:, None]).sum(-1)


def _prefix(cumulative: Array, whole: Ints, top_p: Array, band: float) -> Ints:
    """Length of the shortest prefix with top_p (moved by band) of the mass of ``whole`` tokens."""
    share = np.take_along_axis(cumulative, np.maximum(whole - 1, 0)[:, None], 1)[:, 0]
    p = np.clip(top_p + band, 0.0, 1.0)
    return np.where(top_p < 1, np.minimum(_first_reaching(cumulative, p * share), whole), whole)


def kept(x: Array, f: Filters) -> Kept:
    """Sort, exponentiate and sum in fp64; sizes for every threshold within its error bound."""
    count = np.isfinite(x).sum(-1)
    order = np.argsort(-x, axis=-1, kind="stable")
    ordered = np.take_along_axis(x, order, 1)
    greedy = f.temperature == 0
    with np.errstate(invalid="ignore"):
        scaled = (ordered - ordered[:, :1]) / np.where(greedy, 1.0, f.temperature)[:, None]
    mass = np.where(np.isfinite(scaled), np.exp(np.maximum(scaled, -1000.0)), 0.0)
    cumulative = np.cumsum(mass, -1)
    k = np.where(f.top_k > 0, np.minimum(f.top_k, count), count)
    sizes = []
    for side in (-1, 1):
        with np.errstate(divide="ignore"):
            threshold = np.log(f.min_p) * (1 + side * THRESHOLD_BAND)
        m = np.where(f.min_p > 0, (scaled >= threshold[:, None]).sum(-1), count)
        m = np.clip(m, 1, np.maximum(count, 1))
        by_order = {
            0: lambda band, m=m: _prefix(cumulative, np.minimum(k, m), f.top_p, band),
            1: lambda band, m=m: np.minimum(_prefix(cumulative, k, f.top_p, band), m),
            2: lambda band, m=m: np.minimum(_prefix(cumulative, count, f.top_p, band), k).clip(
                0, m
            ),
        }
        for band in (-SHARE_BAND, SHARE_BAND):
            size = np.choose(f.filter_order, [by_order[o](band) for o in range(3)])
            sizes.append(np.where(greedy, np.minimum(count, 1), np.minimum(size, count)))
    return Kept(order, np.min(sizes, 0), np.max(sizes, 0))


def log_probabilities(x: Array, temperature: Array, order: Ints, size: Ints) -> Array:
    """Log of the probability of each token, the first ``size`` of ``order`` kept: [B, V]."""
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(x.shape[1])[None].repeat(len(x), 0), 1)
    inside = rank < size[:, None]
    divisor = np.where(temperature == 0, 1.0, temperature)[:, None]
    with np.errstate(invalid="ignore"):
        scaled = (x - x.max(-1, keepdims=True)) / divisor
    scaled = np.where(inside, scaled, -np.inf)
    with np.errstate(divide="ignore"):
        return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def law(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    min_p: float = 0.0, filter_order: str = "vllm",
) -> Array:  # fmt: skip
    """Filtered probabilities of logits [..., V], by the same parameters in each row."""
    x = exact(logits).reshape(-1, logits.shape[-1])
    ones = np.ones(len(x))
    f = Filters(
        ones * float(np.float32(temperature)), (ones * top_k).astype(int),
        ones * float(np.float32(top_p)), ones * float(np.float32(min_p)),
        (ones * ORDERS.index(filter_order)).astype(int),
    )  # fmt: skip
    found = kept(x, f)
    assert (found.low == found.high).all()
    logs = log_probabilities(x, f.temperature, found.order, found.low)
    return np.exp(logs).reshape(logits.shape)


_MASK = 2**32 - 1


def philox_words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers."""
    a, b, c, d = counter
    for i in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        k = [(key[j] + i * w) & _MASK for j, w in enumerate((0x9E3779B9, 0xBB67AE85))]
        a, b, c, d = (right >> 32) ^ b ^ k[0], right & _MASK, (left >> 32) ^ d ^ k[1], left & _MASK
    return a, b, c, d


def uniform(seed: int, position: int, token_id: int, stream: int) -> Fraction:
    """The contract's u before its rounding to fp32."""
    scale = Fraction(1, 2**32)
    for retry in range(3):
        counter = (token_id >> 2, position & _MASK, position >> 32, stream | retry << 8)
        word = philox_words(counter, (seed & _MASK, seed >> 32 & _MASK))[token_id & 3]
        if word:
            break
        if retry < 2:
            scale /= 2**32
    return (word + Fraction(1, 2)) * scale


def gumbel(seed: int, position: int, token_id: int, stream: int = 0) -> float:
    """``-log(-log1p(-u))`` in fp64."""
    u = min(np.float64(np.float32(float(uniform(seed, position, token_id, stream)))), 1 - 2.0**-24)
    return float(-np.log(-np.log1p(-u)))


class Rows(NamedTuple):
    """A random batch: three roles [B, V + padding], parameters, and what is masked."""

    base: Tensor
    expert: Tensor
    anti: Tensor
    vocab_size: int
    params: dict[str, Tensor]

    @property
    def filters(self) -> Filters:
        return Filters.of(self.params)

    @property
    def x(self) -> Array:
        """Combined logits, [B, V]."""
        base, expert, anti = (t[:, : self.vocab_size] for t in (self.base, self.expert, self.anti))
        return combined(base, expert, anti, self.params["alpha"])


def _pick(generator: torch.Generator, values: tuple[float, ...], n: int) -> Tensor:
    return torch.tensor(values)[torch.randint(len(values), (n,), generator=generator)]


def random_params(
    g: torch.Generator, n: int, vocab_size: int, order: str | None = None
) -> dict[str, Tensor]:
    """Parameters with every filter off, at its ends and in between."""
    some = torch.rand(n, generator=g)
    top_p = _pick(g, (1.0, 0.9999, 0.95, 0.9, 0.5, 0.1, 1e-6, -1.0, -1.0), n)
    min_p = _pick(g, (0.0, 0.0, 0.0, 0.001, 0.05, 0.5, 1.0, -1.0), n)
    top_k = _pick(g, (0, 0, 0, -1, 1, 2, 5, 40, vocab_size, vocab_size + 5), n)
    orders = torch.randint(3, (n,), generator=g)
    return {
        "alpha": _pick(g, (0.0, 1.0, 1.0, 0.5, -1.5, 2.0), n),
        "temperature": _pick(g, (0.0, 0.05, 0.7, 1.0, 1.0, 2.5, 50.0), n),
        "top_k": top_k.int(),
        "top_p": torch.where(top_p < 0, some.clamp(min=1e-3), top_p).float(),
        "min_p": torch.where(min_p < 0, some**3, min_p).float(),
        "filter_order": (orders if order is None else torch.full((n,), ORDERS.index(order))).int(),
        "seed": torch.randint(-(2**62), 2**62, (n,), generator=g),
        "position": torch.randint(0, 2**40, (n,), generator=g),
    }


def random_rows(
    seed: int, batch: int, vocab_size: int, dtype: torch.dtype = torch.float32,
    order: str | None = None, padding: int = 3,
) -> Rows:  # fmt: skip
    """Rows smooth and peaked, a third quantised to quarters (ties), a third with -inf tokens.

    What lies in the padding is NaN: reading it would show in the status.
    """
    g = torch.Generator().manual_seed(seed)
    width = _pick(g, (0.3, 1.0, 3.0, 8.0), batch)[:, None]
    roles = [torch.randn(batch, vocab_size, generator=g) * s for s in (width, width / 3, width / 3)]
    quantised = (torch.rand(batch, generator=g) < 1 / 3)[:, None]
    roles = [torch.where(quantised, (r * 4).round() / 4, r) for r in roles]
    masked = torch.rand(batch, vocab_size, generator=g) < 0.15
    masked &= (torch.rand(batch, generator=g) < 1 / 3)[:, None]
    masked[torch.arange(batch), torch.randint(vocab_size, (batch,), generator=g)] = False
    roles[0] = roles[0].masked_fill(masked, -torch.inf)
    base, expert, anti = (
        torch.nn.functional.pad(r, (0, padding), value=torch.nan).to(dtype) for r in roles
    )
    params = random_params(g, batch, vocab_size, order)
    return Rows(base, expert, anti, vocab_size, params)


def rows_at_the_ends_of_fp32(vocab_size: int) -> Tensor:
    """Logits whose differences leave fp32, or whose cutoffs are its lowest number: fp32 [8, V]."""
    most = float(np.finfo(np.float32).max)
    rows = torch.full((8, vocab_size), -most)
    rows[1] = most
    rows[2, vocab_size // 2] = most  # all other tiles lie further below it than fp32 reaches
    rows[3, :128], rows[3, 128:200] = most, 0.0
    rows[4, 130:] = float(np.nextafter(np.float32(-most), np.float32(0)))
    rows[5] = torch.linspace(-1, 1, vocab_size).roll(vocab_size // 3) * most
    rows[6, ::5], rows[6, 130:260], rows[6, 7] = 0.0, -torch.inf, most
    rows[7, 300:] = -torch.inf
    return rows


MANY = ((1, 40), (2, 100), (33, 400), (127, 500), (128, 500), (300, 800), (1000, 500), (2085, 300))
"""Over 3,000 rows, about as wide as the places where tiles and vectors end: (width, rows)."""

FEW = ((1, 2), (33, 6), (127, 6), (128, 6), (129, 6), (1023, 4), (1024, 4), (1025, 4), (2085, 2))
"""What Triton's interpreter gets: 40 rows, around the ends of its tiles and of its programs."""


def batches(
    seed: int, dtype: torch.dtype, order: str, sizes: tuple[tuple[int, int], ...] = MANY
) -> Iterator[Rows]:
    """Random rows of the given widths and numbers."""
    for i, (vocab_size, batch) in enumerate(sizes):
        yield random_rows(seed * 100 + i, batch, vocab_size, dtype, order)


def tensors(result: Any, prefix: str = "") -> dict[str, Tensor]:
    """An operator's tensors by name, those of nested tuples too; None is left out."""
    if isinstance(result, Tensor):
        return {prefix: result}
    fields = () if result is None else zip(result._fields, result, strict=True)
    return {n: t for name, field in fields for n, t in tensors(field, f"{prefix}.{name}").items()}


def each(function: Callable[[Tensor], Tensor], result: Any) -> Any:
    """An operator's result with the function applied to each of its tensors."""
    if isinstance(result, Tensor):
        return function(result)
    return None if result is None else type(result)(*(each(function, field) for field in result))


def assert_same(one: Any, other: Any) -> None:
    """Two results are the same bits, field by field."""
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, a in one.items():
        differ = bits(a) != bits(other[name])
        assert not differ.any(), (name, a[differ], other[name][differ])


def bits(t: Tensor) -> Tensor:
    """Integers that are equal where the tensors are bitwise equal."""
    return t.contiguous().view(torch.int32) if t.dtype == torch.float32 else t
