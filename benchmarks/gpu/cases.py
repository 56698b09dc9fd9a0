"""What is measured, most important first, so that a budget drops from the end."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.harness import samplers
from benchmarks.harness.samplers import ALPHA, FILTERS, VOCAB_SIZES, Heads, Logits, OpCase

BACKENDS = {"ours": "triton", "cuda": "cuda"}
"""Our Triton kernels, and our CUDA C++ ones, by provider: peers' times are over the former's."""

PROVIDERS = (*BACKENDS, "eager", "torch.compile", "transformers", "flashinfer")
"""In the order of tables."""

BATCH_SIZES = (1, 8, 64, 256)
DRAFTS = (4, 8)
MAIN_VOCAB_SIZE = 128_256
DTYPE = torch.bfloat16
HEADS_SHAPE = "llama-2"


@dataclass(frozen=True)
class Case:
    """One operator on one shape and kind of logits.

    ``op`` is ``sample``, ``verify``, ``verify-rejection`` or ``sample_hidden``; ``positions`` are
    rows of a request: k + 1 for ``verify``.
    """

    op: str = "sample"
    kind: str = "peaked"
    filters: str = "top_p"
    vocab_size: int = MAIN_VOCAB_SIZE
    batch_size: int = 256
    positions: int = 1

    def __str__(self) -> str:
        positions = f" x {self.positions}" if self.positions > 1 else ""
        size = f"V={self.vocab_size} B={self.batch_size}{positions}"
        return f"{self.op} {self.kind} {self.filters} {size}"

    @property
    def as_rows(self) -> OpCase:
        """The same logits as a batch of independent rows."""
        rows = self.batch_size * self.positions
        return OpCase(self.kind, "bfloat16", self.filters, self.vocab_size, rows)

    @property
    def logits_bytes(self) -> int:
        """Bytes of the three roles' logits, each read once; of the weights that make them."""
        if self.op == "sample_hidden":
            return self.vocab_size * sum(samplers.SHAPES[HEADS_SHAPE][1]) * DTYPE.itemsize
        return self.as_rows.logits_bytes

    def shaped(self, role: Tensor) -> Tensor:
        """A role's rows as [requests, positions, V], or as they are where a request has one."""
        verify = self.op.startswith("verify")
        return role.view(-1, self.positions, self.vocab_size) if verify else role

    def params(self, device: torch.device | str) -> ptk.RowParams:
        """One row of parameters a request."""
        return replace(self.as_rows, batch_size=self.batch_size).row_params(device)

    def record(self) -> dict[str, Any]:
        """The case's fields of a line of results."""
        sampling = {"alpha": ALPHA, **asdict(FILTERS[self.filters])}
        return {**asdict(self), "dtype": "bfloat16", "sampling": sampling}

    def sets_needed(self, l2_bytes: int) -> int:
        """Input sets to go through in turn so that none is left in L2 when its turn comes again.

        Between two uses of a set at least twice L2 is read: a cache that does not evict strictly
        by age would still hold some of it after once its size.
        """
        return 1 + math.ceil(2 * l2_bytes / self.logits_bytes)


class Inputs(NamedTuple):
    """One set of inputs: logits [rows, V], and token ids int64 or, for ``sample_hidden``, heads.

    Token ids are drafts [B, k] for ``verify``, else empty.
    """

    logits: Logits
    token_ids: Tensor
    heads: Heads | None = None


class Unit(NamedTuple):
    """A case and what is timed on it side by side."""

    case: Case
    providers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.case}: {', '.join(self.providers)}"


def make_inputs(
    case: Case, count: int, device: str = "cuda", backend: str = BACKENDS["ours"]
) -> list[Inputs]:
    """``count`` sets of inputs, made on the device from fixed seeds.

    Drafts are the expert's own draws, as in speculative decoding: with the request's noise for the
    coupled mode, with the drafter's for rejection.
    """
    size, none = case.vocab_size, torch.empty(0, dtype=torch.int64, device=device)
    if case.op == "sample_hidden":
        shape = (HEADS_SHAPE, DTYPE, case.batch_size)
        heads = (
            samplers.random_heads(*shape, n, device=device, vocab_size=size) for n in range(count)
        )
        return [Inputs((none, none, none), none, three) for three in heads]
    stacked = samplers.make_logits(
        case.kind, count * case.as_rows.batch_size, size, DTYPE, device=device
    )
    chunks = zip(*(role.chunk(count) for role in stacked), strict=True)
    return [Inputs(logits, _token_ids(case, logits, backend)) for logits in chunks]


def _token_ids(case: Case, logits: Logits, backend: str) -> Tensor:
    device = logits[0].device
    if not case.op.startswith("verify"):
        return torch.empty(0, dtype=torch.int64, device=device)
    stream = "draft" if case.op == "verify-rejection" else "sample"
    params, expert = case.params(device), case.shaped(logits[1])
    drafts = []
    for j in range(case.positions - 1):
        at = params._replace(position=params.position + j)
        drawn = ptk.sample(expert[:, j], params=at, noise_stream=stream, backend=backend)
        drafts.append(drawn.token_ids)
    return torch.stack(drafts, dim=1)


def plan(
    providers: Collection[str] = PROVIDERS,
    vocab_sizes: Collection[int] = VOCAB_SIZES,
    batch_sizes: Collection[int] = BATCH_SIZES,
) -> list[Unit]:
    """Units in order of importance, those of these providers and sizes."""
    units = []
    for case, names in _all_units():
        wanted = tuple(name for name in names if name in providers)
        sized = case.vocab_size in vocab_sizes and case.batch_size in batch_sizes
        # Ours was timed in an earlier unit, without the compiled chain.
        again = "torch.compile" in names and "torch.compile" not in wanted
        if wanted and sized and not again:
            units.append(Unit(case, wanted))
    return units


def _all_units() -> list[Unit]:
    def samples(kind: str, vocab_sizes: Sequence[int], *providers: str) -> list[Unit]:
        # Within a size: the batch sizes that targets name.
        axes = product(vocab_sizes, (256, 1, 64, 8), ("top_p", "none", "top_k+top_p"))
        return [Unit(Case("sample", kind, f, v, b), providers) for v, b, f in axes]

    def verifies(op: str, kind: str, *providers: str) -> list[Unit]:
        axes = product(DRAFTS, (64, 8, 1, 256))
        return [Unit(Case(op, kind, batch_size=b, positions=k + 1), providers) for k, b in axes]

    main, others = [MAIN_VOCAB_SIZE], [v for v in VOCAB_SIZES if v != MAIN_VOCAB_SIZE]
    peers = (*BACKENDS, "eager", "transformers", "flashinfer")
    verifiers, compiled = (*BACKENDS, "eager", "flashinfer"), ("ours", "torch.compile")
    heads = Case("sample_hidden", "random", vocab_size=samplers.SHAPES[HEADS_SHAPE][0])
    # What needs no compiling comes first.
    return [
        *samples("peaked", main, *peers),
        *(unit for kind in ("flat", "middling") for unit in samples(kind, main, *peers)),
        *verifies("verify", "peaked", *verifiers),
        *(Unit(replace(heads, batch_size=b), ("ours", "eager")) for b in (64, 256, 1, 8)),
        *samples("peaked", others, *peers),
        *(unit for kind in ("flat", "middling") for unit in samples(kind, others, *peers)),
        *samples("peaked", main, *compiled),
        *verifies("verify", "flat", *verifiers),
        *verifies("verify-rejection", "peaked", *BACKENDS),
        *samples("flat", main, *compiled),
        *samples("peaked", others, *compiled),
    ]
