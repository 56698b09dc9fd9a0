"""What Triton compiles: the operators, called on CPU tensors as an engine would on a GPU's.

A new kernel is one more entry of :data:`CASES`. Tensors have two requests and nothing in them: only
dtypes, strides, alignment and sizes matter, and Triton treats 1 and multiples of 16 on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.static.sass import Instruction
from proxytune_kernels.kernels.common import TILE
from proxytune_kernels.ops.backends.triton_operators import IMPLEMENTATIONS
from proxytune_kernels.rng import STREAMS

BATCH = 2
POSITIONS = 5  # verify and score: four drafts, or five tokens
NUM_TOP = 20
RANKS = 8
STREAM = STREAMS["sample"]


class Mark(NamedTuple):
    """Instructions of one name that were made for source lines with this text."""

    stem: str
    text: str

    def holds(self, i: Instruction) -> bool:
        """Whether an instruction is one of them."""
        return i.stem == self.stem and self.text in i.source


@dataclass(frozen=True)
class Route:
    """A way through a kernel: of those that fit, with the fewest masked loads, the longest.

    All of a row but its end is read without a mask. A compiler may make predicates of branches, so
    that loads without a mask look like others; but the way by them still has fewer.
    """

    name: str
    tokens: Callable[[Mapping[str, Any]], int]
    """Tokens that a block reads, of what the launcher passed by name."""
    passes: tuple[Mark, ...] = ()
    avoids: tuple[Mark, ...] = ()
    seldom: tuple[Mark, ...] = ()
    """What few rows need: avoided where there is a way around it."""


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
    """One call, its logits, and which of its kernels are looked at."""

    name: str
    launch: Callable[[Case], object]
    kernels: tuple[str, ...] = ("scan",)
    routes: Mapping[str, tuple[Route, ...]] = field(default_factory=dict)
    """By kernel: ways through it whose instructions are counted."""
    vocab_size: int = 128_256
    padding: int = 0  # columns past the vocabulary
    dtype: torch.dtype = torch.bfloat16
    positions: int | None = None  # None: [B, V]
    steered: bool = True  # False: base alone
    constrained: bool = False  # with a bias and a mask

    @property
    def aligned(self) -> bool:
        """Rows start at multiples of 16 elements: wide loads are promised."""
        return (self.vocab_size + self.padding) % 16 == 0

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
        width = self.vocab_size + self.padding
        base, expert, anti = (self.empty(width, self.dtype) for _ in range(3))
        return (base, expert, anti) if self.steered else (base, None, None)

    def arguments(self) -> tuple[Any, ...]:
        """Parameters, bias, mask and width, in the operators' order."""
        bias = mask = None
        if self.constrained:
            bias = self.empty(self.vocab_size, torch.float32)
            mask = self.empty(-(-self.vocab_size // 32), torch.int32)
        return (*ptk.RowParams.make(BATCH), bias, mask, self.vocab_size)


def _sample(case: Case) -> None:
    IMPLEMENTATIONS["sample"](*case.roles, *case.arguments(), STREAM, 0)


def _top(case: Case) -> None:
    IMPLEMENTATIONS["sample"](*case.roles, *case.arguments(), STREAM, NUM_TOP)


def _combine(case: Case) -> None:
    IMPLEMENTATIONS["combine"](*case.roles, torch.empty(BATCH), None, None, case.vocab_size)


def _score(case: Case) -> None:
    token_ids = torch.empty((BATCH, POSITIONS), dtype=torch.int64)
    IMPLEMENTATIONS["score"](*case.roles, token_ids, torch.empty(BATCH), case.vocab_size)


def _coupled(case: Case) -> None:
    draft_ids = torch.empty((BATCH, POSITIONS - 1), dtype=torch.int64)
    IMPLEMENTATIONS["verify"](*case.roles, draft_ids, None, *case.arguments(), 0)


def _rejection(case: Case) -> None:
    draft_ids = torch.empty((BATCH, POSITIONS - 1), dtype=torch.int64)
    drafts = torch.empty((BATCH, POSITIONS - 1, case.vocab_size), dtype=case.dtype)
    IMPLEMENTATIONS["verify"](*case.roles, draft_ids, drafts, *case.arguments(), 1)


def _hidden(batch_size: int, soft_cap: float | None = None) -> Callable[[Case], None]:
    """Heads of 13B + 7B + 7B models for a batch: its size chooses the rows of a program."""

    def launch(case: Case) -> None:
        fields: list[Any] = []
        for size in (5120, 4096, 4096):
            hidden = torch.empty((batch_size, size), dtype=case.dtype)
            weight = torch.empty((case.vocab_size, size), dtype=case.dtype)
            fields += ptk.Head(hidden, weight, soft_cap=soft_cap)
        *_, bias, mask, vocab_size = case.arguments()
        rows = (None if t is None else t[:1].expand(batch_size, -1) for t in (bias, mask))
        params = ptk.RowParams.make(batch_size)
        IMPLEMENTATIONS["sample_hidden"](*fields, *params, *rows, vocab_size, STREAM, 0)

    return launch


def _shards(case: Case) -> None:
    """What a rank runs for rows with filters, the search among flat rows included."""
    params, start = ptk.RowParams.make(BATCH), case.vocab_size
    x = torch.empty((BATCH, case.vocab_size), dtype=torch.float32)
    summaries = IMPLEMENTATIONS["shard_scan"](x).repeat(RANKS, 1)
    keys = IMPLEMENTATIONS["shard_keys"](x, summaries, start)
    words = IMPLEMENTATIONS["shard_draw"](x, summaries, *params, None, None, start, STREAM)
    told, lists = torch.stack([words] * RANKS), keys[:, :128].repeat(RANKS, 1, 1)
    IMPLEMENTATIONS["shard_finish"](summaries, told, lists, *params, None, STREAM)
    edges = torch.empty((BATCH, 1024), dtype=torch.int64)
    IMPLEMENTATIONS["shard_histogram"](keys, summaries, params.temperature, edges)


def _shard_rejection(case: Case) -> None:
    drafts, params = POSITIONS - 1, ptk.RowParams.make(BATCH)
    sides: list[Tensor] = []
    for rows in (BATCH * POSITIONS, BATCH * drafts):
        x = torch.empty((rows, case.vocab_size), dtype=torch.float32)
        cut = torch.empty(rows, dtype=torch.int64)
        sides += [x, cut.repeat(RANKS, 1), cut, cut]
    logprobs = torch.empty((BATCH, POSITIONS))
    ids = torch.empty((BATCH, drafts), dtype=torch.int64)
    _, steps = IMPLEMENTATIONS["shard_accept"](
        logprobs, logprobs.int(), logprobs[:, 1:].contiguous(), ids, params.seed, params.position
    )
    IMPLEMENTATIONS["shard_residual"](*sides, steps, *params, case.vocab_size)


_SCAN, _HIDDEN = ("scan",), ("sample_hidden",)
_SCORE_ROUTES = {"scan": (Route("all", _scan_tokens),)}
_COMBINE_ROUTES = {"combine": (Route("all", lambda arguments: int(arguments["BLOCK"])),)}
_SHARDS = ("shard_scan", "shard_keys", "shard_draw", "shard_finish", "shard_histogram")

_CASES = (
    Case("sample", _sample, ("scan", "select", "pivots", "draw"), SCAN_ROUTES),
    Case("sample V=32000", _sample, _SCAN, SCAN_ROUTES, 32_000),
    Case("sample V=151936", _sample, _SCAN, SCAN_ROUTES, 151_936),
    Case("sample V=50257", _sample, _SCAN, SCAN_ROUTES, 50_257),
    Case("sample V=50257+15", _sample, _SCAN, SCAN_ROUTES, 50_257, padding=15),
    Case("sample fp32", _sample, _SCAN, SCAN_ROUTES, dtype=torch.float32),
    Case("sample base alone", _sample, _SCAN, SCAN_ROUTES, steered=False),
    Case("sample bias+mask", _sample, _SCAN, SCAN_ROUTES, constrained=True),
    Case("top_logprobs", _top, ("top_logprobs",)),
    Case("hidden B=16", _hidden(16), _HIDDEN, vocab_size=32_000),
    Case("hidden B=32", _hidden(32), _HIDDEN, vocab_size=32_000),
    Case("hidden B=64", _hidden(64), _HIDDEN, vocab_size=32_000),
    Case("hidden cap+bias+mask", _hidden(64, 30.0), _HIDDEN, vocab_size=32_000, constrained=True),
    Case("hidden fp32", _hidden(16), _HIDDEN, vocab_size=32_000, dtype=torch.float32),
    Case("combine", _combine, ("combine",), _COMBINE_ROUTES),
    Case("score", _score, ("scan", "score"), _SCORE_ROUTES, positions=POSITIONS),
    Case("coupled", _coupled, ("scan", "coupled"), SCAN_ROUTES, positions=POSITIONS),
    Case("rejection", _rejection, ("rejection", "residual"), positions=POSITIONS),
    Case("shards", _shards, _SHARDS, vocab_size=16_032),
    Case("shards rejection", _shard_rejection, ("shard_accept", "shard_residual"), {}, 16_032),
)

CASES = {case.name: case for case in _CASES}
"""By name. All logits are bf16 of V=128256 unless the name says otherwise; ``+15`` is padding."""
