"""The heads on a GPU: ``sample_hidden`` beside three products of torch and our ``sample``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

import proxytune_kernels as ptk
from benchmarks.head_cases import SHAPES, Heads, exact_x, first_rows
from proxytune_kernels import reference

SHAPE = "llama-2"
VOCAB_SIZE, HIDDEN_SIZES = SHAPES[SHAPE]

_CHECKED_ROWS = 4


def make_heads(batch_size: int, vocab_size: int, count: int, device: str) -> list[Heads]:
    """``count`` sets of heads in bf16, made on the device; logits spread by 4."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, size: int, scale: float) -> Tensor:
        numbers = torch.randn(rows, size, generator=generator, device=device)
        return numbers.mul_(scale).bfloat16()

    def make() -> Heads:
        base, expert, anti = (
            ptk.Head(normal(batch_size, size, 1.0), normal(vocab_size, size, 4 * size**-0.5))
            for size in HIDDEN_SIZES
        )
        return base, expert, anti

    return [make() for _ in range(count)]


def fused(heads: Heads, params: ptk.RowParams, backend: str) -> Callable[[Heads], ptk.SampleOutput]:
    """``sample_hidden`` into outputs of its own."""
    out = ptk.sample_hidden(*heads, params=params, backend=backend)
    return lambda heads: ptk.sample_hidden(*heads, params=params, backend=backend, out=out)


def apart(heads: Heads, params: ptk.RowParams, backend: str) -> Callable[[Heads], ptk.SampleOutput]:
    """Three products in bf16 by torch, which writes their logits, then ``sample``."""

    def logits(heads: Heads) -> list[Tensor]:
        return [linear(head.hidden, head.weight) for head in heads]

    base, expert, anti = logits(heads)
    out = ptk.sample(base, expert, anti, params, backend=backend)

    def run(heads: Heads) -> ptk.SampleOutput:
        base, expert, anti = logits(heads)
        return ptk.sample(base, expert, anti, params, backend=backend, out=out)

    return run


def check_heads(
    what: str, heads: Heads, params: ptk.RowParams, got: ptk.SampleOutput, *, rounded: bool
) -> None:
    """Compare the first rows' raw logprobs with those of exact heads.

    ``rounded``: logits went through bf16, 2^-9 of up to 32 a role, so that x is off by at most
    3/16; a log-softmax moves by twice the largest error of x.

    Raises:
        AssertionError: they differ by more than rounding explains.
    """
    few = first_rows(heads, _CHECKED_ROWS)
    x, error = exact_x(few, heads[0].weight.shape[0])
    rows = slice(0, len(x))
    exact = reference.distribution(x, params.rows(rows)).raw_logprobs()
    wanted = exact.gather(-1, got.token_ids[rows, None])[:, 0]
    off = (got.raw_logprobs[rows] - wanted).abs()
    allowed = 2 * (error + (3 / 16 if rounded else 0.0)) + 1e-5
    if not (off <= allowed).all():
        raise AssertionError(f"{what} has raw logprobs off by {off.tolist()}")
