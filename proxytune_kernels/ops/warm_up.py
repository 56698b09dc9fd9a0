"""Compiles what the operators may call, before a request waits for it or a CUDA graph is captured.

Triton compiles a kernel at the first call that needs it. So each kind of call is made once, on rows
of zeros: what kinds there are follows from dtypes and widths, not from the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.heads import Head
from proxytune_kernels.ops import operators
from proxytune_kernels.ops.backends import ALL, BY_NAME, resolve
from proxytune_kernels.ops.sharded import Shard
from proxytune_kernels.params import Edits, RowParams
from proxytune_kernels.rng import STREAMS

Calls = Iterator[Callable[[], object]]

_OPS: Any = operators  # called with roles unpacked

_HIDDEN_ROWS = (1, 17, 33, 65)
"""Batches: for each of these sample_hidden's programs have another size."""
_EDGES = 1024


def warm_up(
    device: torch.device | str,
    dtypes: torch.dtype | Sequence[torch.dtype],
    vocab_size: int,
    *,
    widths: Sequence[int] | None = None,
    operators: Iterable[str] = ("sample",),
    drafter: tuple[torch.dtype, int] | None = None,
    constraints: bool = True,
    heads: Sequence[Head] | None = None,
    shard: Shard | None = None,
    backend: str | None = None,
    progress: bool = False,
) -> dict[str, int]:
    """Compile all kernels that calls with such logits need, at any batch, with any parameters.

    Later calls compile nothing, and may be captured in a CUDA graph. It runs on the current stream.
    The first time on a machine it takes minutes; then Triton finds the kernels in its cache on
    disk. Tensors of zeros are allocated for it, and freed: a row of each role for each kind of
    call.

    Args:
        device: where the logits will be.
        dtypes: of the logits: one, or one per role (base, expert, anti), or base's alone in a
            sequence.
        vocab_size: agreed width; with ``shard``, its size.
        widths: columns of each role's logits, where those are more than ``vocab_size``.
        operators: "sample", "combine", "score", "verify".
        drafter: dtype and columns of ``draft_logits``; the expert's unless told.
        constraints: whether calls may come with ``bias``, ``allowed_mask``, or ``edits`` without
            bias.
        heads: of the roles, to compile ``sample_hidden`` for; with hidden states of any batch.
        shard: to compile :mod:`proxytune_kernels.sharded` for. No collective.
        backend: as for the operators; None is whichever may run.
        progress: show a bar on standard error; needs tqdm.

    Returns:
        The number of kinds of calls that were made, by operator; 0 where no backend that may run
        compiles anything.

    Raises:
        ValueError: an unknown operator, or dtypes and widths that do not fit each other.
        RuntimeError: a backend asked for by name that can't run here.

    Example:
        >>> warm_up("cpu", torch.bfloat16, 128_256)
        {'sample': 0}

    Source: docs/gpu.md, Before serving.
    """
    asked: dict[str, Callable[[_Rows], Calls]] = {}
    for name in operators:
        if name not in _CALLS:
            raise ValueError(f"warm_up: operators must be of {[*_CALLS]}, got {name!r}")
        asked[name] = _CALLS[name]
    kinds = (dtypes,) * 3 if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    columns = (vocab_size,) * len(kinds) if widths is None else tuple(widths)
    if len(kinds) not in (1, 3) or len(columns) != len(kinds):
        raise ValueError(
            f"warm_up: dtypes and widths must be of one role or of three, got {len(kinds)} and "
            f"{len(columns)}"
        )
    if heads is not None:
        asked["sample_hidden"] = partial(_sample_hidden, heads)
    if shard is not None:
        asked["sharded"] = partial(_sharded, shard)
    place = torch.device(device)
    calls: dict[str, list[Callable[[], object]]] = {}
    for name, made in asked.items():
        given = shard.backend if shard is not None and name == "sharded" else backend
        found = _compiler(name, place, vocab_size, given)
        matrices = tuple(zip(kinds, columns, strict=True))
        drafts = drafter or matrices[:2][-1]
        rows = _Rows(place, matrices, drafts, vocab_size, constraints, found)
        calls[name] = [] if found is None else list(made(rows))
    with torch.no_grad():
        for call in _shown([call for each in calls.values() for call in each], progress):
            call()
    return {name: len(each) for name, each in calls.items()}


def _compiler(op: str, device: torch.device, vocab_size: int, backend: str | None) -> str | None:
    """The backend that has to compile for ``op``; None where none has."""
    if backend is not None:
        resolve(backend, torch.empty((1, 0), device=device), op, vocab_size)
        return backend if BY_NAME[backend].compiles else None
    may_run = (one for one in ALL if one.compiles and one.device_type == device.type)
    return next((one.name for one in may_run if one.refusal(op, device) is None), None)


def _shown(calls: list[Callable[[], object]], progress: bool) -> Iterable[Callable[[], object]]:
    if not progress or not calls:
        return calls
    from tqdm import tqdm

    shown: Iterable[Callable[[], object]] = tqdm(calls, desc="Compiling kernels", leave=False)
    return shown


@dataclass(frozen=True)
class _Rows:
    """Zeros of each kind that there is."""

    device: torch.device
    matrices: tuple[tuple[torch.dtype, int], ...]  # dtype and columns of each role's
    drafter: tuple[torch.dtype, int]
    vocab_size: int
    constraints: bool
    backend: str | None

    def zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def params(self, batch_size: int = 1) -> RowParams:
        return RowParams.make(batch_size, device=self.device)

    def logits(self, *shape: int) -> list[list[Tensor | None]]:
        """Of all roles, of the base alone, and of the expert, which drafts, alone."""
        kinds: list[Any] = [(one, None, None) for one in dict.fromkeys(self.matrices[:2])]
        if len(self.matrices) == 3:
            kinds.append(self.matrices)
        return [
            [None if role is None else self.zeros(role[0], *shape, role[1]) for role in kind]
            for kind in kinds
        ]

    def options(self, *shape: int) -> Iterator[dict[str, Any]]:
        """Neither bias nor mask, one of them, both; edits with and without a mask."""
        bias = self.zeros(torch.float32, *shape, self.vocab_size)
        mask = self.zeros(torch.int32, *shape, -(-self.vocab_size // 32))
        common = {"vocab_size": self.vocab_size, "backend": self.backend}
        given = (False, True) if self.constraints else (False,)
        for biased, masked in product(given, given):
            constraints = {
                "bias": bias if biased else None,
                "allowed_mask": mask if masked else None,
            }
            yield common | constraints
        edits = Edits.make(self.zeros(torch.int32, *shape, 1))
        for masked in given if self.constraints else ():
            yield common | {"edits": edits, "allowed_mask": mask if masked else None}


def _sample(rows: _Rows) -> Calls:
    for logits, options in product(rows.logits(1), rows.options(1)):
        yield partial(
            _OPS.sample, *logits, rows.params(), top_logprobs=1, attribution=True, **options
        )


def _combine(rows: _Rows) -> Calls:
    for logits, options in product(rows.logits(1), rows.options(1)):
        yield partial(_OPS.combine, *logits, **options)


def _score(rows: _Rows) -> Calls:
    options = {"vocab_size": rows.vocab_size, "backend": rows.backend}
    for positions in (1, 2):  # one, and any other number
        ids = rows.zeros(torch.int64, 1, positions)
        for logits in rows.logits(1, positions):
            yield partial(_OPS.score, *logits, ids, **options)


def _verify(rows: _Rows) -> Calls:
    dtype, width = rows.drafter
    for positions in (1, 2, 3):  # of the drafter none, one, and any other number
        ids = rows.zeros(torch.int64, 1, positions - 1)
        drafts = rows.zeros(dtype, 1, positions - 1, width)
        for logits, options in product(rows.logits(1, positions), rows.options(1, positions)):
            call = partial(_OPS.verify, *logits, ids, rows.params(), **options)
            yield call
            yield partial(call, mode="rejection", draft_logits=drafts)


def _sample_hidden(heads: Sequence[Head], rows: _Rows) -> Calls:
    kinds = [heads[:1]] if len(heads) == 1 else [heads[:1], heads]
    for batch_size, kind in product(_HIDDEN_ROWS, kinds):
        given = [h._replace(hidden=h.hidden.new_zeros(batch_size, h.hidden.shape[1])) for h in kind]
        for options in rows.options(batch_size):
            if "edits" in options:
                continue  # it takes none
            params = rows.params(batch_size)
            yield partial(_OPS.sample_hidden, *given, params=params, top_logprobs=1, **options)


def _sharded(shard: Shard, rows: _Rows) -> Calls:
    yield from _combine(rows)
    start, ranks, stream = shard.vocab_start, shard.world_size, STREAMS["sample"]
    params = rows.params()
    run = {
        name: shard.operator(f"shard_{name}", rows.device)
        for name in ("scan", "keys", "histogram", "draw", "finish", "accept", "residual")
    }
    x = rows.zeros(torch.float32, 1, shard.size)
    row, of_ranks = rows.zeros(torch.int64, 1), rows.zeros(torch.int64, ranks, 1)
    keys, edges = (rows.zeros(torch.int64, 1, n) for n in (shard.size, _EDGES))
    yield partial(run["scan"], x)
    yield partial(run["keys"], x, of_ranks, start)
    yield partial(run["histogram"], keys, of_ranks, params.temperature, edges)
    for cut, wanted in product((None, row), (None, row)):
        yield partial(run["draw"], x, of_ranks, *params, cut, wanted, start, stream)
    kept, lists = rows.zeros(torch.int64, 1, 4), rows.zeros(torch.int64, ranks, 1, 1)
    for width, given in ((5, None), (6, None), (5, kept), (6, kept), (2, kept)):
        words = rows.zeros(torch.int64, ranks, 1, width)
        sent = None if given is not None else lists
        yield partial(run["finish"], of_ranks, words, sent, *params, given, stream)
    two, target = rows.zeros(torch.int64, 2), rows.zeros(torch.float32, 1, 2)
    yield partial(run["accept"], target, target.int(), target[:, :1], row[:, None], row, row)
    yield partial(
        run["residual"], x.repeat(2, 1), of_ranks.repeat(1, 2), two, two, x, of_ranks, row, row,
        row, *params, start,
    )  # fmt: skip


_CALLS: dict[str, Callable[[_Rows], Calls]] = {
    "sample": _sample, "combine": _combine, "score": _score, "verify": _verify,
}  # fmt: skip
