"""Heads to time ``sample_hidden`` on: their shapes, and exact heads to hold it to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

import proxytune_kernels as ptk
from benchmarks.harness.logits import ALPHA, Logits
from proxytune_kernels import reference

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
