"""Cases of the heads benchmark, what runs on each, and how exact it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import proxytune_kernels as ptk
from benchmarks.logits import Logits
from benchmarks.op_cases import DTYPES
from benchmarks.peers import ALPHA
from benchmarks.prompts import make_prompts
from benchmarks.providers import TEMPERATURE, TOP_P
from proxytune_kernels import Trio, reference
from proxytune_kernels.ops.backends import cpu

Heads = tuple[ptk.Head, ptk.Head, ptk.Head]

SHAPES = {
    "shipped": (1_536, (192, 64, 64)),
    "qwen": (151_936, (1_536, 896, 896)),
    "llama-2": (32_000, (5_120, 4_096, 4_096)),
}
"""Vocabulary and hidden sizes of the shipped trio, of Qwen2.5 1.5B + 0.5B + 0.5B, and of Llama 2
13B + 7B + 7B."""

FUSED, APART, PRODUCTS = "sample_hidden", "three heads, sample", "three heads alone"
PROVIDERS = (FUSED, APART, PRODUCTS)
BATCH_SIZES = (1, 4, 16, 64)


_CHUNK = 4_096  # tokens whose weights are widened to fp64 at once
_CHECKED_ROWS = 2


@dataclass(frozen=True)
class HeadCase:
    """One shape, dtype and batch."""

    shape: str
    dtype: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} B={self.batch_size}"

    @property
    def vocab_size(self) -> int:
        """V."""
        return SHAPES[self.shape][0]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the three heads' weights, each read once."""
        return self.vocab_size * sum(SHAPES[self.shape][1]) * DTYPES[self.dtype].itemsize


def random_heads(shape: str, dtype: torch.dtype, batch_size: int, seed: int = 0) -> Heads:
    """Heads whose logits spread by 4, as a real base's do."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size, sizes = SHAPES[shape]

    def make(size: int) -> ptk.Head:
        hidden = torch.randn(batch_size, size, generator=generator)
        weight = torch.randn(vocab_size, size, generator=generator).mul_(4 * size**-0.5)
        return ptk.Head(hidden.to(dtype), weight.to(dtype))

    base, expert, anti = (make(size) for size in sizes)
    return base, expert, anti


@torch.no_grad()
def trio_heads(trio: Trio, batch_size: int, length: int) -> Heads:
    """A trio's heads at every position of English, [batch_size * length, H]."""
    ids = torch.tensor(make_prompts(trio, batch_size, length))
    base, expert, anti = (
        ptk.Head.of(model, model.base_model(ids).last_hidden_state.flatten(0, 1))
        for model in trio.models.values()
    )
    return base, expert, anti


def first_rows(heads: Heads, rows: int) -> Heads:
    """The same heads for fewer rows."""
    base, expert, anti = (head._replace(hidden=head.hidden[:rows]) for head in heads)
    return base, expert, anti


def row_params(rows: int) -> ptk.RowParams:
    """A seed for each row."""
    return ptk.RowParams.make(
        rows, alpha=ALPHA, temperature=TEMPERATURE, top_p=TOP_P, seed=torch.arange(rows)
    )


@torch.no_grad()
def logits_apart(heads: Heads, vocab_size: int) -> Logits:
    """The three roles' logits in the heads' dtype, as models give them."""
    base, expert, anti = (
        linear(head.hidden, head.weight[:vocab_size], head.bias) for head in heads
    )
    return base, expert, anti


def make_calls(
    case: HeadCase, heads: Heads, providers: Sequence[str]
) -> dict[str, Callable[[], object]]:
    """What to time, by provider, after checking that ``sample_hidden`` is right.

    Raises:
        AssertionError: it is not.
    """
    check(case, heads)
    params = row_params(case.batch_size)
    calls: dict[str, Callable[[], object]] = {
        FUSED: lambda: ptk.sample_hidden(*heads, params=params),
        APART: lambda: ptk.sample(*logits_apart(heads, case.vocab_size), params=params),
        PRODUCTS: lambda: logits_apart(heads, case.vocab_size),
    }
    return {name: calls[name] for name in providers}


def check(case: HeadCase, heads: Heads) -> None:
    """Compare the first rows' tokens and kept sets with those of exact heads.

    Rounding may decide where two tokens are a tie to the error of x: kept sets may differ by one
    token, a token's raw logprob by twice the error.

    Raises:
        AssertionError: they differ by more.
    """
    few = first_rows(heads, _CHECKED_ROWS)
    rows = len(few[0].hidden)
    x, error = exact_x(few, case.vocab_size)
    got = ptk.sample_hidden(*few, params=row_params(rows))
    wanted = reference.distribution(x, row_params(rows))
    kept = wanted.kept.sum(-1)
    if not ((got.num_kept - kept).abs() <= 1).all():
        raise AssertionError(f"{case}: keeps {got.num_kept.tolist()}, not {kept.tolist()}")
    raw = wanted.raw_logprobs().gather(-1, got.token_ids[:, None])[:, 0]
    off = (got.raw_logprobs - raw).abs()
    if not (off <= 2 * error + 1e-5).all():
        raise AssertionError(f"{case}: raw logprobs are off by {off.tolist()}")


@torch.no_grad()
def exact_x(heads: Heads, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Combined logits of exact heads, fp64 [B, V], and the bound of fp32's error, fp64 [B].

    The bound is docs/heads.md's, of the largest sum of a product's terms in each row.
    """
    x = torch.empty(len(heads[0].hidden), vocab_size, dtype=torch.float64)
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


def accuracy(heads: Heads, vocab_size: int, rows: int) -> dict[str, Any]:
    """How far x is from exact heads' by both ways, and what that does to tokens.

    Fused: fp32 accumulators, combined in fp32. Apart: logits rounded to the heads' dtype, combined
    in fp32. The roles' alpha is 1, the filter top_p.
    """
    few = first_rows(heads, rows)
    exact, error = exact_x(few, vocab_size)
    params = row_params(len(exact))
    wanted = reference.distribution(exact, params)
    drawn = reference.sample(exact, params)
    apart = reference.combine(*logits_apart(few, vocab_size), params.alpha)
    found: dict[str, Any] = {
        "rows": len(exact),
        "vocab_size": vocab_size,
        "hidden_sizes": [head.hidden.shape[1] for head in few],
        "largest_x": float(exact.abs().max()),
        "bound": float(error.max()),
    }
    for name, x in ((FUSED, fused_x(few, vocab_size)), (APART, apart)):
        off = (x.double() - exact).abs()
        kept = reference.distribution(x, params).kept
        found[name] = {
            "largest_error": float(off.max()),
            "rms_error": float(off.square().mean().sqrt()),
            "greedy_differs": int((x.argmax(-1) != exact.argmax(-1)).sum()),
            "kept_differs": int((kept != wanted.kept).any(-1).sum()),
            "token_differs": int((reference.sample(x, params).token_ids != drawn.token_ids).sum()),
        }
    return found


@torch.no_grad()
def fused_x(heads: Heads, vocab_size: int) -> Tensor:
    """x as ``sample_hidden`` combines it on the CPU, fp32 [B, V]."""
    alpha = torch.full((len(heads[0].hidden),), ALPHA)
    return cpu.combined(heads, alpha, None, vocab_size)
