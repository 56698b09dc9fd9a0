"""What is compiled: the operators, called on CPU tensors as an engine would on a GPU's.

A new kernel is one more entry of :data:`CASES`. Tensors have two requests and nothing in them: only
dtypes, strides, alignment and sizes matter, and Triton treats 1 and multiples of 16 on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.static.figures import Mark, Route
from proxytune_kernels.kernels.common import TILE
from proxytune_kernels.ops.backends.triton_operators import IMPLEMENTATIONS
from proxytune_kernels.rng import STREAMS

BATCH = 2
POSITIONS = 5  # verify and score: four drafts, or five tokens
NUM_TOP = 20
RANKS = 8


@dataclass(frozen=True)
class Shape:
    """The logits of a case."""

    vocab_size: int = 128_256
    padding: int = 0  # columns past the vocabulary
    dtype: torch.dtype = torch.bfloat16
    positions: int | None = None  # None: [B, V]
    steered: bool = True  # False: base alone
    constrained: bool = False  # with a bias and a mask

    @property
    def bytes_per_token(self) -> int:
        """Of the roles' logits."""
        return self.dtype.itemsize * (3 if self.steered else 1)

    def empty(self, width: int, dtype: torch.dtype) -> Tensor:
        """[B, width] or [B, T, width]."""
        middle = () if self.positions is None else (self.positions,)
        return torch.empty((BATCH, *middle, width), dtype=dtype)

    @property
    def roles(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Unwritten logits."""
        base, expert, anti = (
            self.empty(self.vocab_size + self.padding, self.dtype) for _ in range(3)
        )
        return (base, expert, anti) if self.steered else (base, None, None)

    @property
    def constraints(self) -> tuple[Tensor | None, Tensor | None]:
        """Unwritten bias and mask."""
        if not self.constrained:
            return None, None
        bits = -(-self.vocab_size // 32)
        return self.empty(self.vocab_size, torch.float32), self.empty(bits, torch.int32)


def _sample(shape: Shape) -> None:
    arguments = (*ptk.RowParams.make(BATCH), *shape.constraints, shape.vocab_size)
    IMPLEMENTATIONS["sample"](*shape.roles, *arguments, STREAMS["sample"], 0)


def _top(shape: Shape) -> None:
    arguments = (*ptk.RowParams.make(BATCH), *shape.constraints, shape.vocab_size)
    IMPLEMENTATIONS["sample"](*shape.roles, *arguments, STREAMS["sample"], NUM_TOP)


def _combine(shape: Shape) -> None:
    IMPLEMENTATIONS["combine"](
        *shape.roles, torch.empty(BATCH), *shape.constraints, shape.vocab_size
    )


def _score(shape: Shape) -> None:
    token_ids = torch.empty((BATCH, POSITIONS), dtype=torch.int64)
    IMPLEMENTATIONS["score"](*shape.roles, token_ids, torch.empty(BATCH), shape.vocab_size)


def _verify(shape: Shape, draft_logits: Tensor | None, mode: int) -> None:
    draft_ids = torch.empty((BATCH, POSITIONS - 1), dtype=torch.int64)
    arguments = (*ptk.RowParams.make(BATCH), *shape.constraints, shape.vocab_size, mode)
    IMPLEMENTATIONS["verify"](*shape.roles, draft_ids, draft_logits, *arguments)


def _coupled(shape: Shape) -> None:
    _verify(shape, None, 0)


def _rejection(shape: Shape) -> None:
    drafts = torch.empty((BATCH, POSITIONS - 1, shape.vocab_size), dtype=shape.dtype)
    _verify(shape, drafts, 1)


def _hidden(batch_size: int, soft_cap: float | None = None) -> Callable[[Shape], None]:
    """Heads of 13B + 7B + 7B models for a batch: its size chooses the rows of a program."""

    def launch(shape: Shape) -> None:
        heads = [
            ptk.Head(
                torch.empty((batch_size, size), dtype=shape.dtype),
                torch.empty((shape.vocab_size, size), dtype=shape.dtype),
                soft_cap=soft_cap,
            )
            for size in (5120, 4096, 4096)
        ]
        fields = [field for head in heads for field in head]
        bias, mask = (
            None if t is None else t[:1].expand(batch_size, -1) for t in shape.constraints
        )
        arguments = (*ptk.RowParams.make(batch_size), bias, mask, shape.vocab_size)
        IMPLEMENTATIONS["sample_hidden"](*fields, *arguments, STREAMS["sample"], 0)

    return launch


def _shards(shape: Shape) -> None:
    """What a rank runs for rows with filters, the search among flat rows included."""
    params, start, stream = ptk.RowParams.make(BATCH), shape.vocab_size, STREAMS["sample"]
    x = torch.empty((BATCH, shape.vocab_size), dtype=torch.float32)
    summaries = IMPLEMENTATIONS["shard_scan"](x).repeat(RANKS, 1)
    keys = IMPLEMENTATIONS["shard_keys"](x, summaries, start)
    words = IMPLEMENTATIONS["shard_draw"](x, summaries, *params, None, None, start, stream)
    told, lists = torch.stack([words] * RANKS), keys[:, :128].repeat(RANKS, 1, 1)
    IMPLEMENTATIONS["shard_finish"](summaries, told, lists, *params, None, stream)
    edges = torch.empty((BATCH, 1024), dtype=torch.int64)
    IMPLEMENTATIONS["shard_histogram"](keys, summaries, params.temperature, edges)


def _shard_rejection(shape: Shape) -> None:
    drafts, params = POSITIONS - 1, ptk.RowParams.make(BATCH)
    sides: list[Tensor] = []
    for rows in (BATCH * POSITIONS, BATCH * drafts):
        x = torch.empty((rows, shape.vocab_size), dtype=torch.float32)
        cut = torch.empty(rows, dtype=torch.int64)
        sides += [x, cut.repeat(RANKS, 1), cut, cut]
    logprobs = torch.empty((BATCH, POSITIONS))
    ids = torch.empty((BATCH, drafts), dtype=torch.int64)
    _, steps = IMPLEMENTATIONS["shard_accept"](
        logprobs, logprobs.int(), logprobs[:, 1:].contiguous(), ids, params.seed, params.position
    )
    IMPLEMENTATIONS["shard_residual"](*sides, steps, *params, shape.vocab_size)


def _scan_tokens(arguments: Mapping[str, Any]) -> int:
    return int(arguments["TILES"]) * int(TILE.value)


_SCALED = Mark("STG", "tiles.scaled")
_NOISE = Mark("IMAD", "0xD2511F53")  # Philox's multiplier
_SELDOM = (Mark("FSETP", "live = tl.sum("),)  # tiles with masked tokens

SCAN_ROUTES = {
    "scan": (
        Route("one mass", _scan_tokens, avoids=(_SCALED, _NOISE), seldom=_SELDOM),
        Route("mass at T", _scan_tokens, passes=(_SCALED,), avoids=(_NOISE,), seldom=_SELDOM),
        Route("noise", _scan_tokens, passes=(_SCALED, _NOISE), seldom=_SELDOM),
    )
}
"""scan by what a row asks for: greedy, top_k, or temperature 1; top_p or min_p at another
temperature; no filter at another temperature."""


@dataclass(frozen=True)
class Case:
    """One call, and which of its kernels are looked at."""

    name: str
    launch: Callable[[Shape], None]
    kernels: tuple[str, ...]
    shape: Shape = Shape()
    routes: Mapping[str, tuple[Route, ...]] = field(default_factory=dict)
    """By kernel: ways through it whose instructions are counted."""
    aligned: bool = True
    """Rows start at multiples of 16 bytes: wide loads are promised."""


def _scan_case(name: str, shape: Shape, aligned: bool = True) -> Case:
    return Case(name, _sample, ("scan",), shape, SCAN_ROUTES, aligned)


_HIDDEN = ("sample_hidden",)

CASES = (
    Case("sample", _sample, ("scan", "select", "pivots", "draw"), routes=SCAN_ROUTES),
    _scan_case("sample V=32000", Shape(32_000)),
    _scan_case("sample V=151936", Shape(151_936)),
    _scan_case("sample V=50257", Shape(50_257), aligned=False),
    _scan_case("sample V=50257+15", Shape(50_257, padding=15)),
    _scan_case("sample fp32", Shape(dtype=torch.float32)),
    _scan_case("sample base alone", Shape(steered=False)),
    _scan_case("sample bias+mask", Shape(constrained=True)),
    Case("top_logprobs", _top, ("top_logprobs",)),
    Case("hidden B=16", _hidden(16), _HIDDEN, Shape(32_000)),
    Case("hidden B=32", _hidden(32), _HIDDEN, Shape(32_000)),
    Case("hidden B=64", _hidden(64), _HIDDEN, Shape(32_000)),
    Case("hidden cap+bias+mask", _hidden(64, 30.0), _HIDDEN, Shape(32_000, constrained=True)),
    Case("hidden fp32", _hidden(16), _HIDDEN, Shape(32_000, dtype=torch.float32)),
    Case(
        "combine",
        _combine,
        ("combine",),
        routes={"combine": (Route("all", lambda arguments: int(arguments["BLOCK"])),)},
    ),
    Case(
        "score",
        _score,
        ("scan", "score"),
        Shape(positions=POSITIONS),
        {"scan": (Route("all", _scan_tokens),)},
    ),
    Case("coupled", _coupled, ("scan", "coupled"), Shape(positions=POSITIONS), SCAN_ROUTES),
    Case("rejection", _rejection, ("rejection", "residual"), Shape(positions=POSITIONS)),
    Case(
        "shards",
        _shards,
        ("shard_scan", "shard_keys", "shard_draw", "shard_finish", "shard_histogram"),
        Shape(16_032),
    ),
    Case("shards rejection", _shard_rejection, ("shard_accept", "shard_residual"), Shape(16_032)),
)
"""All logits are bf16 of V=128256 unless the name says otherwise; ``+15`` is padding."""
