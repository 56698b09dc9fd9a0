"""What Triton compiles: the operators, called on CPU tensors as an engine would on a GPU's.

A new kernel is one more entry of :data:`CASES`. Tensors have two requests and nothing in them: only
dtypes, strides, alignment and sizes matter, and Triton treats 1 and multiples of 16 on their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels.ops.backends.triton_operators import IMPLEMENTATIONS as OPS
from proxytune_kernels.ops.backends.triton_operators import add_lora, decode_attention
from proxytune_kernels.ops.checks import VERIFY_MODES
from proxytune_kernels.rng import STREAMS

BATCH = 2
POSITIONS = 5  # verify and score: four drafts, or five tokens
RANKS = 8
STREAM = STREAMS["sample"]


@dataclass(frozen=True)
class Case:
    """One call, its logits, and which of its kernels are looked at."""

    name: str
    launch: Callable[[Case], object]
    kernels: tuple[str, ...] = ("scan",)
    vocab_size: int = 128_256
    padding: int = 0  # columns past the vocabulary
    dtype: torch.dtype = torch.bfloat16
    positions: int | None = None  # None: [B, V]
    steered: bool = True  # False: base alone
    constrained: bool = False  # with a bias and a mask

    def empty(self, width: int, dtype: torch.dtype) -> Tensor:
        """[B, width] or [B, T, width]."""
        middle = () if self.positions is None else (self.positions,)
        return torch.empty((BATCH, *middle, width), dtype=dtype)

    @property
    def roles(self) -> tuple[Tensor | None, ...]:
        """Unwritten logits."""
        width = self.vocab_size + self.padding
        base, expert, anti = (self.empty(width, self.dtype) for _ in range(3))
        return (base, expert, anti) if self.steered else (base, None, None)

    def arguments(self, batch_size: int = BATCH) -> tuple[Any, ...]:
        """Parameters, bias, mask, no edits, and width, in the operators' order."""
        bias = mask = None
        if self.constrained:
            bias = torch.empty((batch_size, self.vocab_size), dtype=torch.float32)
            mask = torch.empty((batch_size, -(-self.vocab_size // 32)), dtype=torch.int32)
        return (*ptk.RowParams.make(batch_size), bias, mask, None, None, self.vocab_size)


def _sample(top_logprobs: int, attributed: bool = False) -> Callable[[Case], object]:
    def launch(case: Case) -> None:
        ids = torch.empty(BATCH, dtype=torch.int64) if attributed else None
        OPS["sample"](*case.roles, *case.arguments(), STREAM, top_logprobs, ids)

    return launch


def _edits(case: Case) -> None:
    *arguments, _, _, width = case.arguments()
    edits = ptk.Edits.make(torch.empty((BATCH, 256), dtype=torch.int32))
    OPS["sample"](*case.roles, *arguments, *edits, width, STREAM, 0, None)


def _combine(case: Case) -> None:
    OPS["combine"](*case.roles, torch.empty(BATCH), None, None, None, None, case.vocab_size)


def _score(case: Case) -> None:
    token_ids = torch.empty((BATCH, POSITIONS), dtype=torch.int64)
    OPS["score"](*case.roles, token_ids, torch.empty(BATCH), case.vocab_size)


def _verify(mode: str) -> Callable[[Case], object]:
    def launch(case: Case) -> None:
        ids = torch.empty((BATCH, POSITIONS - 1), dtype=torch.int64)
        drafts = torch.empty((*ids.shape, case.vocab_size), dtype=case.dtype)
        given = drafts if mode == "rejection" else None
        OPS["verify"](*case.roles, ids, given, *case.arguments(), VERIFY_MODES.index(mode))

    return launch


def _hidden(batch_size: int, soft_cap: float | None = None) -> Callable[[Case], None]:
    """Heads of 13B + 7B + 7B models for a batch: its size chooses the rows of a program."""

    def launch(case: Case) -> None:
        fields: list[Any] = []
        for size in (5120, 4096, 4096):
            hidden = torch.empty((batch_size, size), dtype=case.dtype)
            weight = torch.empty((case.vocab_size, size), dtype=case.dtype)
            fields += ptk.Head(hidden, weight, soft_cap=soft_cap)
        *arguments, _, _, width = case.arguments(batch_size)
        OPS["sample_hidden"](*fields, *arguments, width, STREAM, 0)

    return launch


def _shards(case: Case) -> None:
    """What a rank runs for rows with filters, the search among flat rows included."""
    params, start = ptk.RowParams.make(BATCH), case.vocab_size
    x = torch.empty((BATCH, case.vocab_size), dtype=torch.float32)
    summaries = OPS["shard_scan"](x).repeat(RANKS, 1)
    keys = OPS["shard_keys"](x, summaries, start)
    words = OPS["shard_draw"](x, summaries, *params, None, None, start, STREAM)
    told, lists = torch.stack([words] * RANKS), keys[:, :128].repeat(RANKS, 1, 1)
    OPS["shard_finish"](summaries, told, lists, *params, None, STREAM)
    edges = torch.empty((BATCH, 1024), dtype=torch.int64)
    OPS["shard_histogram"](keys, summaries, params.temperature, edges)


def _shard_rejection(case: Case) -> None:
    drafts, params = POSITIONS - 1, ptk.RowParams.make(BATCH)
    sides: list[Tensor] = []
    for rows in (BATCH * POSITIONS, BATCH * drafts):
        x = torch.empty((rows, case.vocab_size), dtype=torch.float32)
        cut = torch.empty(rows, dtype=torch.int64)
        sides += [x, cut.repeat(RANKS, 1), cut, cut]
    logprobs = torch.empty((BATCH, POSITIONS))
    ids = torch.empty((BATCH, drafts), dtype=torch.int64)
    _, steps = OPS["shard_accept"](
        logprobs, logprobs.int(), logprobs[:, 1:].contiguous(), ids, params.seed, params.position
    )
    OPS["shard_residual"](*sides, steps, *params, case.vocab_size)


def _attention(
    groups: int, queries: int, size: int, soft_cap: float | None = None, window: int | None = None
) -> Callable[[Case], None]:
    """Two key-value heads of 2,048 keys each; new tokens of ``groups`` heads share one's."""

    def launch(case: Case) -> None:
        query = torch.empty((BATCH, 2 * groups, queries, size), dtype=case.dtype)
        cache = torch.empty((BATCH, 2048, 2, size), dtype=case.dtype).transpose(1, 2)
        out = torch.empty((BATCH, queries, 2 * groups, size), dtype=case.dtype)
        seq_lens = torch.empty(BATCH, dtype=torch.int32)
        decode_attention(query, cache, cache, seq_lens, out, 0.1, window, soft_cap, None)

    return launch


def _lora(case: Case) -> None:
    """Queries, keys and values of two rows a request, the first of which has adapters."""
    widths = [4096, 1024, 1024]
    y, x = (torch.empty((2 * BATCH, 1, n), dtype=case.dtype) for n in (sum(widths), 4096))
    lora_A = torch.empty((3 * 16, 4096), dtype=case.dtype)
    lora_B = torch.empty((sum(widths), 16), dtype=case.dtype)
    add_lora(y, x, lora_A, lora_B, widths, 2.0, 2)


_ATTENTION = ("decode_attention",)
_SCAN, _HIDDEN = ("scan",), ("sample_hidden",)
_SHARDS = ("shard_scan", "shard_keys", "shard_draw", "shard_finish", "shard_histogram")

_CASES = (
    Case("sample", _sample(0), ("scan", "select", "pivots", "draw")),
    Case("sample V=32000", _sample(0), _SCAN, vocab_size=32_000),
    Case("sample V=151936", _sample(0), _SCAN, vocab_size=151_936),
    Case("sample V=50257", _sample(0), _SCAN, vocab_size=50_257),
    Case("sample V=50257+15", _sample(0), _SCAN, vocab_size=50_257, padding=15),
    Case("sample V=262208", _sample(0), ("select", "pivots", "draw"), vocab_size=262_208),
    Case("sample fp32", _sample(0), _SCAN, dtype=torch.float32),
    Case("sample base alone", _sample(0), _SCAN, steered=False),
    Case("sample bias+mask", _sample(0), _SCAN, constrained=True),
    Case("sample edits", _edits, ("table", "scan")),
    Case("top_logprobs", _sample(20), ("top_logprobs",)),
    Case("attribution", _sample(0, True), ("attribution_scan", "attribution")),
    Case("hidden B=16", _hidden(16), _HIDDEN, vocab_size=32_000),
    Case("hidden B=32", _hidden(32), _HIDDEN, vocab_size=32_000),
    Case("hidden B=64", _hidden(64), _HIDDEN, vocab_size=32_000),
    Case("hidden B=128", _hidden(128), _HIDDEN, vocab_size=32_000),
    Case("hidden cap+bias+mask", _hidden(64, 30.0), _HIDDEN, vocab_size=32_000, constrained=True),
    Case("hidden fp32", _hidden(16), _HIDDEN, vocab_size=32_000, dtype=torch.float32),
    Case("combine", _combine, ("combine",)),
    Case("attention", _attention(1, 1, 128), _ATTENTION),
    Case("attention R=48 D=256", _attention(8, 6, 256, 50.0, 1024), _ATTENTION),
    Case("attention R=16 fp32", _attention(4, 4, 128), _ATTENTION, dtype=torch.float32),
    Case("lora", _lora, ("add_lora",)),
    Case("score", _score, ("scan", "score"), positions=POSITIONS),
    Case("coupled", _verify("coupled"), ("scan", "coupled"), positions=POSITIONS),
    Case("rejection", _verify("rejection"), ("rejection", "residual"), positions=POSITIONS),
    Case("shards", _shards, _SHARDS, vocab_size=16_032),
    Case(
        "shards rejection", _shard_rejection, ("shard_accept", "shard_residual"), vocab_size=16_032
    ),
)

CASES = {case.name: case for case in _CASES}
"""By name. All logits are bf16 of V=128256 unless the name says otherwise; ``+15`` is padding."""
