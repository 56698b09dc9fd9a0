"""Logits and heads to time the operators on, cases made of them, and the checks of samplers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import proxytune_kernels as ptk
from proxytune_kernels import reference

Logits = tuple[Tensor, Tensor, Tensor]
"""Base, expert and anti, [B, V] each."""

ALPHA, TEMPERATURE, TOP_P = 1.0, 0.7, 0.9
"""Parameters of what is timed, unless told."""

KINDS = ("peaked", "middling", "flat")
VOCAB_SIZES = (32_000, 128_256, 151_936)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Peaked rows, fitted to the Qwen trio of scripts/qwen_trio.py (base 1.5B, pair 0.5B, V = 151,936)
# on the English of the benchmarks' prompts, 152 positions. Sorted logits there fall by the same
# 4 nats from rank 1 to 10 to 100 to 1,000 to 10,000 (Zipf) and bend down at the end: the quantile
# function -HEAD ln u + TAIL ln(1 - u), u uniform. docs/benchmarks.md has both sides' figures.
_HEAD, _TAIL = 1.6, 1.3
_SMALL_SHARE, _SMALL_STD = 0.57, 2.0  # anti = share * base + noise: correlation 0.59
_TUNING_STD = 0.43  # expert = anti + noise: correlation 0.98

_CHECKED_ROWS = 2  # rows are alike and independent; the oracle sorts each in fp64
# fp32 logprobs of at most 20 nats, two roundings of 2^-24 each way, and the op's own exp and log:
# 20 * 2^-24 * 4 is 5e-6; twice that.
_LOGPROB_TOLERANCE = 1e-5


def make_logits(
    kind: str, rows: int, vocab_size: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> Logits:
    """Logits of the three roles; another seed, or another kind of device, gives other rows.

    ``"peaked"`` rows are like a real trio's, see above: a handful of tokens is kept at top_p 0.9.
    ``"middling"`` ones are normal, standard deviation 2.5: at top_p 0.9 and temperature 0.7 some
    2,000 of 128,256 are kept. ``"flat"`` ones are uniform noise in [0, 1), the worst case for
    pruning: most tokens are kept.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (rows, vocab_size)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if kind == "middling":
        base = (2.5 * normal()).to(dtype)
        return base, torch.zeros_like(base), torch.zeros_like(base)
    if kind == "flat":
        noise = torch.rand(3, *shape, generator=generator, device=device)
        return noise[0].to(dtype), noise[1].to(dtype), noise[2].to(dtype)
    if kind != "peaked":
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    # The ends of the float grid would give infinities.
    u = torch.rand(shape, generator=generator, device=device).clamp_(2.0**-25, 1 - 2.0**-24)
    base = _TAIL * torch.log1p(-u) - _HEAD * u.log()
    anti = _SMALL_SHARE * base + _SMALL_STD * normal()
    expert = anti + _TUNING_STD * normal()
    return base.to(dtype), expert.to(dtype), anti.to(dtype)


@dataclass(frozen=True)
class Filters:
    """Sampling parameters of a case, the same for all rows."""

    temperature: float = TEMPERATURE
    top_k: int = 0
    top_p: float = 1.0


FILTERS = {
    "none": Filters(),
    "top_p": Filters(top_p=TOP_P),
    "top_k+top_p": Filters(top_k=50, top_p=TOP_P),
}


@dataclass(frozen=True)
class OpCase:
    """One shape and kind of logits with its filters."""

    kind: str = "peaked"
    dtype: str = "float32"
    filters: str = "top_p"
    vocab_size: int = 128_256
    batch_size: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype} {self.filters} V={self.vocab_size} B={self.batch_size}"

    @property
    def logits_bytes(self) -> int:
        """Bytes of the three roles' logits, each read once."""
        return 3 * self.batch_size * self.vocab_size * DTYPES[self.dtype].itemsize

    def logits(self, seed: int = 0) -> Logits:
        """Rows of this case; another seed gives other rows."""
        return make_logits(self.kind, self.batch_size, self.vocab_size, DTYPES[self.dtype], seed)

    def row_params(self, device: torch.device | str = "cpu") -> ptk.RowParams:
        """The filters as prepared parameters; row i has seed i."""
        seed, filters = torch.arange(self.batch_size), asdict(FILTERS[self.filters])
        return ptk.RowParams.make(self.batch_size, device=device, alpha=ALPHA, seed=seed, **filters)


class Candidates(NamedTuple):
    """A filtered distribution: probabilities [B, K], zero outside the kept set, not normalised.

    ``token_ids`` int64 [B, K] says which token each column is; None where the columns are the
    vocabulary.
    """

    probabilities: Any
    token_ids: Any

    def tokens(self, column: Tensor) -> Tensor:
        """The token of a column of each row, [B, 1]: [B]."""
        ids = self.token_ids
        return column[:, 0] if ids is None else ids.gather(-1, column)[:, 0]


@dataclass(frozen=True)
class Peer:
    """Another way to sample, bound to its filters: one token id per row from the roles' logits.

    ``distribution``, where it can be had, is the filtered distribution, which is compared with the
    contract before anything is timed; ``reseed`` makes the next call draw other numbers.
    """

    name: str
    sample: Callable[[Logits], Any]
    distribution: Callable[[Logits], Candidates] | None = None
    reseed: Callable[[int], object] = torch.manual_seed

    @classmethod
    def of(
        cls,
        name: str,
        distribution: Callable[[Logits], Candidates],
        draw: Callable[[Candidates], Any],
    ) -> Peer:
        """What draws from a distribution; both halves are timed."""
        return cls(name, lambda logits: draw(distribution(logits)), distribution)


def top_p_prefix(falling: Tensor, total: Tensor | float, top_p: float) -> Tensor:
    """Zero what lies past the shortest prefix that holds top_p of the total mass."""
    before = falling.cumsum(-1) - falling
    return torch.where(before < top_p * total, falling, 0.0)


def transformers_peer(filters: Filters) -> Peer:
    """The chain of transformers' ``generate``: combination, warpers, softmax, multinomial."""
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain: list[Any] = [TemperatureLogitsWarper(filters.temperature)]
    if filters.top_k:
        chain.append(TopKLogitsWarper(filters.top_k))
    if filters.top_p < 1:
        chain.append(TopPLogitsWarper(filters.top_p))
    warpers = LogitsProcessorList(chain)
    no_ids: Any = None  # these warpers don't look at the text

    def distribution(logits: Logits) -> Candidates:
        base, expert, anti = (x.float() for x in logits)
        scores = base + ALPHA * (expert - anti)
        return Candidates(torch.softmax(warpers(no_ids, scores), dim=-1), None)

    def draw(candidates: Candidates) -> Tensor:
        return torch.multinomial(candidates.probabilities, num_samples=1)[:, 0]

    return Peer.of("transformers", distribution, draw)


def contract_distribution(
    case: OpCase, logits: Logits, rows: int = _CHECKED_ROWS
) -> reference.Distribution:
    """The contract's distribution of the first rows, in fp64, where the logits are."""
    base, expert, anti = (x[:rows] for x in logits)
    params = case.row_params(base.device).rows(slice(0, rows))
    return reference.distribution(reference.combine(base, expert, anti, params.alpha), params)


def check_outputs(what: str, got: Any, wanted: Any) -> None:
    """Compare an operator's first rows with what the reference gives for them."""
    for name in ("token_ids", "num_kept", "num_accepted", "status", "logprobs", "raw_logprobs"):
        if not hasattr(wanted, name):
            continue
        want = getattr(wanted, name)
        have = getattr(got, name)[: len(want)]
        tolerance = _LOGPROB_TOLERANCE if want.is_floating_point() else 0.0
        if not torch.isclose(have, want, rtol=0.0, atol=tolerance, equal_nan=True).all():
            raise AssertionError(f"{what}: ours has {name} {have.tolist()}, not {want.tolist()}")


def check_peer(case: OpCase, peer: Peer, logits: Logits, target: reference.Distribution) -> None:
    """Compare a peer's distribution with the contract's, by total variation distance.

    Three things may differ, and bound the distance allowed: where the cut falls, by the error of
    summing V fp32 masses one after another, V * 2^-24; which of the tokens tied at the cut are
    kept, which the contract settles by id and the peers leave open; and whether all that are tied
    with the last of top_k are kept, as transformers does: that adds their mass, and moves the cut
    of top_p by as much and one token.
    """
    wanted = target.logprobs().exp().masked_fill(~target.kept, 0.0)
    if peer.distribution is None:
        return
    probabilities, ids = peer.distribution(logits)
    rows = len(wanted)
    first = Candidates(probabilities[:rows], None if ids is None else ids[:rows])
    got = dense(first, case.vocab_size)
    distance = (got - wanted).abs().sum(-1) / 2
    lowest = target.shifted.masked_fill(~target.kept, torch.inf).amin(-1, keepdim=True)
    ties = (target.shifted == lowest).sum(-1) - 1
    extra, share = ties_past_top_k(case, target)
    smallest = wanted.masked_fill(~target.kept, torch.inf).amin(-1)
    allowed = case.vocab_size * 2.0**-24 + ties * smallest
    allowed += 2 * extra * share + (extra > 0) * smallest
    if not (distance <= allowed).all():
        raise AssertionError(
            f"{case}: {peer.name} differs from the contract by {distance.tolist()} in total "
            f"variation, more than {allowed.tolist()}"
        )


def ties_past_top_k(case: OpCase, target: reference.Distribution) -> tuple[Tensor, Tensor]:
    """Tokens past the first top_k that are tied with the last of them, by row.

    Returns:
        How many, and the mass of each as a share of the top_k's, fp64 [rows]; 0 without a top_k.
    """
    k = FILTERS[case.filters].top_k
    if not k:
        none = target.scaled.new_zeros(len(target.kept))
        return none, none
    top = target.scaled.topk(k, dim=-1).values
    last = top[:, -1:]
    extra = (target.scaled == last).sum(-1) - (top == last).sum(-1)
    return extra.double(), last[:, 0].exp() / top.exp().sum(-1)


def dense(candidates: Candidates, vocab_size: int) -> Tensor:
    """Candidates as normalised probabilities, fp64 [B, V]."""
    mass: Tensor = torch.as_tensor(candidates.probabilities).double()
    mass = mass / mass.sum(-1, keepdim=True)
    if candidates.token_ids is None:
        return mass
    ids: Any = torch.as_tensor(candidates.token_ids)
    return mass.new_zeros(len(mass), vocab_size).scatter_(-1, ids, mass)


# sample_hidden

Heads = tuple[ptk.Head, ptk.Head, ptk.Head]
"""Base, expert and anti."""

SHAPES = {
    "shipped": (1_536, (192, 64, 64)),
    "qwen": (151_936, (1_536, 896, 896)),
    "llama-2": (32_000, (5_120, 4_096, 4_096)),
}
"""Vocabulary and hidden sizes of the shipped trio, of Qwen2.5 1.5B + 0.5B + 0.5B, and of Llama 2
13B + 7B + 7B."""

_CHUNK = 4_096  # tokens whose weights are widened to fp64 at once


def random_heads(
    shape: str,
    dtype: torch.dtype,
    batch_size: int,
    seed: int = 0,
    *,
    device: str = "cpu",
    vocab_size: int | None = None,
) -> Heads:
    """Heads whose logits spread by 4, as a real base's do, made on the device they are used on.

    ``vocab_size`` is another than the shape's.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape_vocab_size, sizes = SHAPES[shape]
    tokens = vocab_size or shape_vocab_size

    def normal(rows: int, size: int, std: float) -> Tensor:
        return torch.randn(rows, size, generator=generator, device=device).mul_(std).to(dtype)

    base, expert, anti = (
        ptk.Head(normal(batch_size, size, 1.0), normal(tokens, size, 4 * size**-0.5))
        for size in sizes
    )
    return base, expert, anti


def first_rows(heads: Heads, rows: int) -> Heads:
    """The same heads for fewer rows."""
    base, expert, anti = (head._replace(hidden=head.hidden[:rows]) for head in heads)
    return base, expert, anti


@torch.no_grad()
def logits_apart(heads: Heads, vocab_size: int) -> Logits:
    """The three roles' logits in the heads' dtype, as models give them: three products."""
    base, expert, anti = (
        linear(head.hidden, head.weight[:vocab_size], head.bias) for head in heads
    )
    return base, expert, anti


@torch.no_grad()
def exact_x(heads: Heads, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Combined logits of exact heads, fp64 [B, V], and the bound of fp32's error, fp64 [B].

    The bound is docs/heads.md's, of the largest sum of a product's terms in each row.
    """
    x = heads[0].hidden.new_empty(len(heads[0].hidden), vocab_size, dtype=torch.float64)
    error = x.new_zeros(len(x))
    for start in range(0, vocab_size, _CHUNK):
        part = slice(start, min(start + _CHUNK, vocab_size))
        logits, terms = [], x.new_zeros(len(x), part.stop - start)
        for head in heads:
            hidden, weight = head.hidden.double(), head.weight[part].double()
            logits.append(hidden @ weight.T)
            terms += (weight.shape[1] + 6) * 2.0**-23 * (hidden.abs() @ weight.abs().T)
        base, expert, anti = logits
        x[:, part] = base + ALPHA * (expert - anti)
        error = torch.maximum(error, terms.amax(-1))
    return x, error


def check_heads(
    heads: Heads,
    vocab_size: int,
    params: ptk.RowParams,
    got: ptk.SampleOutput,
    rows: int,
    rounding: float = 0.0,
) -> None:
    """Compare the first rows of what was drawn with exact heads, fp64.

    Tokens may tie to the error of x: kept sets may differ by one token, a token's raw logprob by
    twice the error. ``rounding`` is what logits of a lower dtype add to the error of x.
    """
    x, error = exact_x(first_rows(heads, rows), vocab_size)
    first = slice(0, len(x))
    wanted = reference.distribution(x, params.rows(first))
    raw = wanted.raw_logprobs().gather(-1, got.token_ids[first, None])[:, 0]
    off = (got.raw_logprobs[first] - raw).abs()
    kept = got.num_kept[first] - wanted.kept.sum(-1)
    if not rounding and not (kept.abs() <= 1).all():
        raise AssertionError(f"sample_hidden: kept sets differ by {kept.tolist()} tokens")
    if not (off <= 2 * (error + rounding) + 1e-5).all():
        raise AssertionError(f"sample_hidden: raw logprobs off by {off.tolist()}")
