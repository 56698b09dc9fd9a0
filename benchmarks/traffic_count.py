"""Counts that the roofline's model rests on, taken on a CPU by running the thing itself.

Three of them: the operations of a torch chain with the bytes that go in and out of each; how often
FlashInfer's rejection sampling reads a row; how many tiles of a row ours has to read again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.samplers import combine, eager_sampler
from benchmarks.logits import Logits, make_logits
from benchmarks.op_cases import FILTERS
from benchmarks.peers import Filters, transformers_peer
from benchmarks.traffic import Case
from benchmarks.traffic_fused import TILE

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STEP = 4096  # entries that a block of FlashInfer's reads at once: 1,024 threads, 16 bytes each

# They allocate.
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "resize_"}
_WRITE_ONLY = {"exponential_", "fill_"}

Chain = Callable[[Logits], object]

CHAINS: Mapping[str, Callable[[Filters], Chain]] = {
    "eager": lambda filters: eager_sampler(filters).sample,
    "transformers": lambda filters: transformers_peer(filters).sample,
}
"""Chains of torch operations that the model describes, by the model's name."""


@dataclass(frozen=True)
class CountedOp:
    """One operation that ran; bytes per vocabulary entry, each argument and result once."""

    name: str
    read: float
    write: float


def _bytes(values: Any) -> int:
    """Bytes of the tensors among ``values``, each once; numbers held as tensors count for none."""
    tensors = {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor) and t.dim() > 0}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class _Counter(TorchDispatchMode):
    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries = entries
        self.ops: list[CountedOp] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in _NO_KERNEL:
            read = 0 if name in _WRITE_ONLY else _bytes((args, kwargs))
            self.ops.append(CountedOp(name, read / self.entries, _bytes(results) / self.entries))
        return results


def count_ops(run: Callable[[], object], entries: int) -> list[CountedOp]:
    """The operations that ``run`` dispatches, in order, without views and allocations.

    Args:
        run: what to count.
        entries: vocabulary entries of all its rows, by which bytes are divided.
    """
    with _Counter(entries) as counter:
        run()
    return counter.ops


def count_parts(run: Callable[[], object], name: str) -> list[str]:
    """The operations within the first operation ``name`` that ``run`` runs, by name."""
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        run()
    events = profile.function_events
    whole = next(event for event in events if event.name == f"aten::{name}")
    names = [event.name.removeprefix("aten::") for event in whole.cpu_children]
    return [part for part in names if part not in _NO_KERNEL]


def case_logits(case: Case) -> Logits:
    """The benchmark's logits for a case."""
    return make_logits(case.kind, case.rows, case.vocab_size, _DTYPES[case.dtype])


def count_chain(name: str, case: Case) -> list[CountedOp]:
    """What the chain ``name`` of :data:`CHAINS` runs in a case."""
    chain, logits = CHAINS[name](FILTERS[case.filters]), case_logits(case)
    return count_ops(lambda: chain(logits), case.entries)


def draw_passes(probabilities: Tensor, top_p: float, generator: torch.Generator) -> float:
    """Reads of a row in one draw by dual-pivot rejection, as FlashInfer's top_p kernel does it.

    Each round draws from the entries above ``low``, reading up to the one that is drawn, and then
    reads all to weigh what lies above it and above the middle between it and ``high``
    (``TopPSamplingFromProbKernel``; https://flashinfer.ai/2025/03/10/sampling.html).

    Args:
        probabilities: fp64 [V], their sum 1.
        top_p: share kept.
        generator: of the uniform numbers.
    """
    low, high, mass, reads = 0.0, 1.0, 1.0, 0.0
    while low < high:
        u = mass * float(torch.rand((), generator=generator, dtype=torch.float64))
        running = torch.where(probabilities > low, probabilities, 0.0).cumsum(0)
        drawn = min(int((running <= u).sum()), len(probabilities) - 1)
        reads += min(1.0, (drawn // _STEP + 1) * _STEP / len(probabilities)) + 1.0
        pivot = float(probabilities[drawn])
        middle = (pivot + high) / 2
        above, above_middle = (
            float(probabilities[probabilities > p].sum()) for p in (pivot, middle)
        )
        if above < top_p:
            break
        if above_middle < top_p:
            low, high, mass = pivot, middle, above
        else:
            low, mass = middle, above_middle
    return reads


def count_draws(case: Case, draws: int) -> list[float]:
    """Reads of a row in each of ``draws`` draws from each row of a case."""
    filters = FILTERS[case.filters]
    x = combine(case_logits(case)) / filters.temperature
    if filters.top_k:
        x = x.masked_fill(x < x.topk(filters.top_k).values[:, -1:], -torch.inf)
    rows = x.double().softmax(-1)
    generator = torch.Generator().manual_seed(0)
    return [draw_passes(row, filters.top_p, generator) for row in rows for _ in range(draws)]


def count_tiles(case: Case) -> list[int]:
    """The fewest tiles a row, by their maxima, that are sure to hold the kept set.

    With top_k, the k tiles with the highest maxima: each has a token at least as high as the
    lowest of them. With top_p, as many as hold p of the row's mass by their maxima alone. And what
    ties with the lowest of them.
    """
    filters = FILTERS[case.filters]
    x = combine(case_logits(case))
    padding = -case.vocab_size % TILE
    x = torch.nn.functional.pad(x, (0, padding), value=-torch.inf)
    highest = x.view(case.rows, -1, TILE).amax(-1).sort(-1, descending=True).values
    if filters.top_k:
        last = torch.full((case.rows, 1), filters.top_k - 1)
    else:
        top = highest[:, :1]
        held = ((highest - top).double() / filters.temperature).exp().cumsum(-1)
        total = ((x - top).double() / filters.temperature).exp().sum(-1, keepdim=True)
        short = (held < filters.top_p * total).sum(-1, keepdim=True)
        last = short.clamp(max=highest.shape[1] - 1)
    return [int(n) for n in (highest >= highest.gather(-1, last)).sum(-1)]
