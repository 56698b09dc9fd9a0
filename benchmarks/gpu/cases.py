"""What is measured, most important first, so that a budget drops from the end."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.gpu import head_units
from benchmarks.head_cases import Heads
from benchmarks.logits import Logits, make_logits
from benchmarks.op_cases import FILTERS, VOCAB_SIZES, OpCase
from benchmarks.peers import ALPHA

OURS, CUDA = "ours", "cuda"
OWN = (OURS, CUDA)
"""Our Triton kernels, and our CUDA C++ ones: peers' times are over the former's."""

EAGER, COMPILED = "eager", "torch.compile"
TRANSFORMERS, FLASHINFER = "transformers", "flashinfer"
PROVIDERS = (*OWN, EAGER, COMPILED, TRANSFORMERS, FLASHINFER)
"""Names of providers, in the order of tables."""

BATCH_SIZES = (1, 8, 64, 256)
DRAFTS = (4, 8)
MAIN_VOCAB_SIZE = 128_256
DTYPE = "bfloat16"

SAMPLE, VERIFY, REJECTION = "sample", "verify", "verify-rejection"
SCORE, COMBINE = "score", "combine"
HEADS = "sample_hidden"
"""Ours beside ``eager``: three products by torch, then our ``sample``."""

_MEMORY_SHARE = 0.25  # of the device's for inputs; the eager chain's temporaries take the rest


@dataclass(frozen=True)
class Case:
    """One operator on one shape and kind of logits."""

    op: str = SAMPLE
    kind: str = "peaked"
    filters: str = "top_p"
    vocab_size: int = MAIN_VOCAB_SIZE
    batch_size: int = 256
    positions: int = 1
    """Rows of a request: k + 1 for ``verify``, T for ``score``, 1 for the others."""

    def __str__(self) -> str:
        positions = f" x {self.positions}" if self.positions > 1 else ""
        filters = "" if self.op in (SCORE, COMBINE) else f" {self.filters}"
        return f"{self.op} {self.kind}{filters} V={self.vocab_size} B={self.batch_size}{positions}"

    @property
    def rows(self) -> int:
        """Rows of logits of each role."""
        return self.batch_size * self.positions

    @property
    def as_rows(self) -> OpCase:
        """The same logits as a batch of independent rows."""
        return OpCase(self.kind, DTYPE, self.filters, self.vocab_size, self.rows)

    @property
    def logits_bytes(self) -> int:
        """Bytes of the three roles' logits, each read once; of the weights that make them."""
        if self.op == HEADS:
            return 2 * self.vocab_size * sum(head_units.HIDDEN_SIZES)
        return self.as_rows.logits_bytes

    def params(self, device: str) -> ptk.RowParams:
        """One row of parameters a request."""
        return replace(self.as_rows, batch_size=self.batch_size).row_params(device)

    def record(self) -> dict[str, Any]:
        """The case's fields of a line of results."""
        filters = FILTERS[self.filters]
        return {
            "op": self.op,
            "kind": self.kind,
            "dtype": DTYPE,
            "filters": self.filters,
            "vocab_size": self.vocab_size,
            "batch_size": self.batch_size,
            "positions": self.positions,
            "sampling": {
                "alpha": ALPHA,
                "temperature": filters.temperature,
                "top_k": filters.top_k,
                "top_p": filters.top_p,
            },
        }


class Inputs(NamedTuple):
    """One set of inputs of a case."""

    logits: Logits
    """Base, expert and anti, [rows, V] each."""
    token_ids: Tensor
    """int64: drafts [B, k] for ``verify``, tokens [B, T] for ``score``; empty for the others."""
    heads: Heads | None = None
    """For ``sample_hidden``, which has no logits."""


@dataclass(frozen=True)
class Unit:
    """A case and what is timed on it side by side."""

    case: Case
    providers: tuple[str, ...]

    @property
    def compiles(self) -> bool:
        """Whether it has to wait for torch.compile."""
        return COMPILED in self.providers

    def __str__(self) -> str:
        return f"{self.case}: {', '.join(self.providers)}"


def sets_needed(logits_bytes: int, l2_bytes: int) -> int:
    """Input sets to go through in turn so that none is left in L2 when its turn comes again.

    Between two uses of a set at least twice L2 is read: a cache that does not evict strictly by
    age would still hold some of it after once its size.
    """
    return 1 + math.ceil(2 * l2_bytes / logits_bytes)


def fits(case: Case, l2_bytes: int, memory_bytes: int) -> bool:
    """Whether a device has the memory for a case's input sets."""
    needed = sets_needed(case.logits_bytes, l2_bytes) * case.logits_bytes
    return needed <= _MEMORY_SHARE * memory_bytes


def make_inputs(case: Case, count: int, device: str, backend: str) -> list[Inputs]:
    """``count`` sets of inputs, made on the device from fixed seeds.

    Drafts are the expert's own draws, as in speculative decoding: with the request's noise for the
    coupled mode, with the drafter's for rejection.
    """
    if case.op == HEADS:
        none = torch.empty(0, device=device)
        sets = head_units.make_heads(case.batch_size, case.vocab_size, count, device)
        return [Inputs((none, none, none), none.long(), heads) for heads in sets]
    dtype = getattr(torch, DTYPE)
    stacked = make_logits(case.kind, count * case.rows, case.vocab_size, dtype, device=device)
    chunks = zip(*(role.chunk(count) for role in stacked), strict=True)
    return [Inputs(logits, _token_ids(case, logits, backend)) for logits in chunks]


def _token_ids(case: Case, logits: Logits, backend: str) -> Tensor:
    device = logits[0].device
    if case.op == SCORE:
        generator = torch.Generator(device).manual_seed(0)
        shape = (case.batch_size, case.positions)
        return torch.randint(case.vocab_size, shape, generator=generator, device=device)
    if case.op not in (VERIFY, REJECTION):
        return torch.empty(0, dtype=torch.int64, device=device)
    stream = "draft" if case.op == REJECTION else "sample"
    params = case.params(str(device))
    expert = logits[1].view(case.batch_size, case.positions, -1)
    drafts = [
        ptk.sample(
            expert[:, j],
            params=params._replace(position=params.position + j),
            noise_stream=stream,
            backend=backend,
        ).token_ids
        for j in range(case.positions - 1)
    ]
    return torch.stack(drafts, dim=1)


def plan(
    providers: Collection[str] = PROVIDERS,
    vocab_sizes: Collection[int] = VOCAB_SIZES,
    batch_sizes: Collection[int] = BATCH_SIZES,
) -> tuple[Unit, ...]:
    """Units in order of importance, those of these providers and sizes."""
    units = []
    for unit in _all_units():
        case = unit.case
        wanted = tuple(name for name in unit.providers if name in providers)
        alone = unit.compiles and COMPILED not in wanted  # ours was timed in an earlier unit
        if not wanted or alone:
            continue
        if case.vocab_size in vocab_sizes and case.batch_size in batch_sizes:
            units.append(Unit(case, wanted))
    return tuple(units)


def _all_units() -> Iterator[Unit]:
    plain = (*OWN, EAGER, TRANSFORMERS, FLASHINFER)
    # What needs no compiling comes first. Within a size: the batch sizes that targets name.
    sizes = (256, 1, 64, 8)
    others = tuple(v for v in VOCAB_SIZES if v != MAIN_VOCAB_SIZE)
    for kind in ("peaked", "flat"):
        yield from _samples(kind, (MAIN_VOCAB_SIZE,), sizes, plain)
    yield from _verifies(VERIFY, "peaked", (*OWN, EAGER, FLASHINFER))
    for batch_size in (64, 256, 1, 8):
        case = Case(HEADS, "random", vocab_size=head_units.VOCAB_SIZE, batch_size=batch_size)
        yield Unit(case, (OURS, EAGER))
    for kind in ("peaked", "flat"):
        yield from _samples(kind, others, sizes, plain)
    yield from _samples("peaked", (MAIN_VOCAB_SIZE,), sizes, (OURS, COMPILED))
    yield from _verifies(VERIFY, "flat", (*OWN, EAGER, FLASHINFER))
    yield from _verifies(REJECTION, "peaked", OWN)
    for batch_size in (256, 64):
        case = Case(COMBINE, filters="none", batch_size=batch_size)
        yield Unit(case, (OURS, EAGER, COMPILED))
    yield Unit(Case(SCORE, filters="none", batch_size=8, positions=64), (OURS, EAGER, COMPILED))
    yield from _samples("flat", (MAIN_VOCAB_SIZE,), sizes, (OURS, COMPILED))
    yield from _samples("peaked", others, sizes, (OURS, COMPILED))


def _samples(
    kind: str, vocab_sizes: tuple[int, ...], sizes: tuple[int, ...], providers: tuple[str, ...]
) -> Iterator[Unit]:
    for vocab_size, batch_size, filters in product(
        vocab_sizes, sizes, ("top_p", "none", "top_k+top_p")
    ):
        yield Unit(Case(SAMPLE, kind, filters, vocab_size, batch_size), providers)


def _verifies(op: str, kind: str, providers: tuple[str, ...]) -> Iterator[Unit]:
    for drafts, batch_size in product(DRAFTS, (64, 8, 1, 256)):
        yield Unit(Case(op, kind, batch_size=batch_size, positions=drafts + 1), providers)
