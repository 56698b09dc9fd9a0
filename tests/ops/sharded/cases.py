"""Calls of the whole vocabulary, and the part of them that a rank would make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels import reference
from tests.ops import oracle

Case = Callable[[], "Call"]

# Tokens of each rank by world size, of V in all: 1, 0 and sizes that no tile or vector divides.
SPLITS: dict[int, tuple[tuple[float, ...], ...]] = {
    1: ((1.0,),),
    2: ((0.37, 0.63), (0.999, 0.001)),
    4: ((0.07, 0.5, 0.0, 0.43), (0.25, 0.25, 0.25, 0.25)),
    8: ((0.3, 0.02, 0.15, 0.1, 0.0, 0.13, 0.2, 0.1), (0.001, 0.5, 0.1, 0.1, 0.1, 0.1, 0.099, 0.0)),
}


def sizes_of(split: tuple[float, ...], vocab_size: int) -> list[int]:
    """Tokens of each rank: about the shares, the last but one takes what is left."""
    sizes = [int(share * vocab_size) for share in split]
    sizes[0] = max(sizes[0], min(1, vocab_size))
    sizes[max(len(sizes) - 2, 0)] += vocab_size - sum(sizes)
    return sizes


@dataclass(frozen=True)
class Call:
    """One call of ``sample``, or with drafts of ``verify``, over the whole vocabulary."""

    roles: tuple[Tensor, ...]
    params: Any
    vocab_size: int
    drafts: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """bias, allowed_mask, stream, mode, draft_logits."""
    sharded: dict[str, Any] = field(default_factory=dict)
    """Arguments of the sharded call alone."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        roles = (*self.roles, None, None)[:3]
        return (*roles, self.params) if self.drafts is None else (*roles, self.drafts, self.params)

    def whole(self, backend: str) -> Any:
        """The unsharded result."""
        op: Any = ptk.sample if self.drafts is None else ptk.verify
        return op(*self.arguments, vocab_size=self.vocab_size, backend=backend, **self.options)

    def on(self, shard: ptk.sharded.Shard) -> Any:
        """The result of this rank's part."""
        first, last = shard.vocab_start, shard.vocab_start + shard.size
        options = dict(self.options)
        for name in ("bias", "draft_logits"):
            if options.get(name) is not None:
                options[name] = options[name][..., first:last].contiguous()
        if options.get("allowed_mask") is not None:
            allowed = unpacked(options["allowed_mask"], self.vocab_size)[..., first:last]
            options["allowed_mask"] = packed(allowed)
        # Columns of other ranks lie around: what is read of them shows.
        part = replace(self, roles=tuple(t[..., first:] for t in self.roles))
        op: Any = ptk.sharded.sample if self.drafts is None else ptk.sharded.verify
        return op(*part.arguments, shard=shard, **options, **self.sharded)


def packed(allowed: Tensor) -> Tensor:
    """int32 words of a bool mask [..., V]."""
    short = -allowed.shape[-1] % 32
    bits = torch.nn.functional.pad(allowed, (0, short)).long().unflatten(-1, (-1, 32))
    words = (bits << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpacked(words: Tensor, vocab_size: int) -> Tensor:
    """The bool mask of int32 words."""
    return ((words[..., None] >> torch.arange(32)) & 1).flatten(-2)[..., :vocab_size].bool()


def drawn(call: Call, **options: Any) -> Call:
    """The same call with other options."""
    return replace(call, options=call.options | options)


def random_rows(
    seed: int, batch: int, size: int, dtype: torch.dtype = torch.float32, order: str | None = None
) -> Call:
    rows = oracle.random_rows(seed, batch, size, dtype, order)
    return Call((rows.base, rows.expert, rows.anti), ptk.RowParams(**rows.params), size)


def _with(call: Call, **values: Any) -> Call:
    """Parameters, the same in each row or a tensor."""
    rows = len(call.roles[0])
    columns = {
        n: v.to(getattr(call.params, n).dtype) if isinstance(v, Tensor)
        else torch.full((rows,), v, dtype=getattr(call.params, n).dtype)
        for n, v in values.items()
    }  # fmt: skip
    return replace(call, params=call.params._replace(**columns))


def flat(seed: int, batch: int, size: int, spread: float = 0.05, **values: Any) -> Call:
    """Rows of nearly equal logits, base alone: kept sets of most of the vocabulary."""
    g = torch.Generator().manual_seed(seed)
    base = spread * torch.randn(batch, size, generator=g)
    params = ptk.RowParams.make(batch, seed=torch.arange(batch) + seed, position=9, **values)
    return Call((base,), params, size)


def special(size: int) -> Call:
    """NaN, +inf, -inf, whole parts masked, nothing left, parameters out of range; each filter."""
    g = torch.Generator().manual_seed(size)
    patterns = 14
    base = torch.randn(patterns, size, generator=g) * 2
    third = max(1, size // 3)
    base[1, size // 2] = torch.nan
    base[2, :] = torch.nan
    base[3, -1] = torch.inf
    base[4, ::3] = torch.inf
    base[5, : size - 1] = -torch.inf
    base[6, third:] = -torch.inf
    base[7, :] = -torch.inf
    base[8, :] = 1.5
    base[9, 0], base[9, 1:] = torch.nan, -torch.inf
    base[10, ::2], base[10, 1::2] = 3e38, -3e38
    base[11, 0], base[11, -1] = torch.inf, torch.nan
    base[12, :] = -0.0
    base[12, ::2] = 0.0
    base[13, :third] = -torch.inf
    filters: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.5, "min_p": 0.01}, {"top_k": size // 2 + 1},
        {"top_p": 0.999999}, {"temperature": 1e-30, "top_p": 0.5},
        {"temperature": 1e30, "top_p": 0.5},
    ]  # fmt: skip
    rows: list[ptk.RowParams] = []
    for order in ("vllm", "hf", "joint"):
        for given in filters:
            values: dict[str, Any] = {"filter_order": order, "seed": 11, "position": 4, **given}
            rows.append(ptk.RowParams.make(patterns, **values))
    params = ptk.RowParams(*(torch.cat(columns) for columns in zip(*rows, strict=True)))
    roles = (base.repeat(len(rows), 1),)
    return Call(roles, params, size)


def bad_params(size: int) -> Call:
    """A parameter out of range in all rows but the last."""
    call = random_rows(5, 8, size)
    params = oracle.each(torch.clone, call.params)
    params.alpha[0], params.temperature[1], params.top_k[2] = torch.nan, -1.0, -2
    params.top_p[3], params.min_p[4], params.filter_order[5] = 0.0, 1.5, 3
    params.position[6] = -1
    return replace(call, params=params)


def constrained(seed: int, size: int) -> Call:
    call = random_rows(seed, 16, size)
    g = torch.Generator().manual_seed(seed)
    allowed = torch.rand(16, size, generator=g) < 0.5
    allowed[3], allowed[4, 1:] = False, False
    return drawn(call, bias=torch.randn(16, size, generator=g), allowed_mask=packed(allowed))


def speculative(seed: int, batch: int, k: int, size: int, mode: str, **constraints: Any) -> Call:
    """Drafts that are accepted, rejected, missing and out of range."""
    rows = random_rows(seed, batch * (k + 1), size)
    roles = tuple(t.view(batch, k + 1, -1) for t in rows.roles)
    params = rows.params.rows(slice(0, batch))
    call = Call(roles, params, size, options={"mode": mode, **constraints})
    g = torch.Generator().manual_seed(seed)
    mixed = torch.rand(batch, k, 1, generator=g) < 0.5
    base, expert, anti = (t.reshape(batch * (k + 1), -1)[:, :size] for t in roles)
    x = reference.combine(base, expert, anti, params.alpha.repeat_interleave(k + 1))
    near = x.view(batch, k + 1, size)[:, :k].nan_to_num(0, 0, -30)
    draft_logits = torch.where(mixed, near, near + torch.randn(batch, k, size, generator=g))
    draft_logits[0, :, : size // 2] = -torch.inf
    draft_logits[1] = -torch.inf
    steps = [params._replace(position=params.position + j) for j in range(k)]
    if mode == "rejection":
        call = drawn(call, draft_logits=draft_logits)
        found = [reference.sample(draft_logits[:, j], p, "draft") for j, p in enumerate(steps)]
    else:
        grid = x.view(batch, k + 1, size)
        found = [reference.sample(grid[:, j], p) for j, p in enumerate(steps)]
    empty = torch.empty(batch, 0, dtype=torch.int64)
    drafts = torch.cat([empty, *(f.token_ids[:, None] for f in found)], -1)
    wrong = torch.rand(batch, k, generator=g)
    drafts = torch.where(wrong < 0.1, torch.randint(size, (batch, k), generator=g), drafts)
    drafts = torch.where((wrong > 0.1) & (wrong < 0.13), -1, drafts)
    drafts = torch.where((wrong > 0.13) & (wrong < 0.16), size + 7, drafts)
    return replace(call, drafts=drafts)


def bias_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(seed: int, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return packed(torch.rand(*shape, generator=g) < 0.6)


def clustered() -> Call:
    """A row that its samples tell nothing of: thousands of close logits where none is taken."""
    call = flat(9, 1, 20_000, top_p=0.5)
    x = torch.full((1, 20_000), -3.0)
    x[0, 7000:7900] = 1 + torch.arange(900) * 2.0**-20
    x[0, 12_001:15_000] = 1.0 + torch.arange(2999) * 2.0**-23
    return replace(call, roles=(x,))


def promised() -> Call:
    """Each row has top_k of at most 7, and the caller says so."""
    call = random_rows(22, 60, 500)
    top_k = call.params.top_k.clamp(max=7)
    top_k = torch.where((top_k <= 0) & (call.params.top_p < 1), 7, top_k)
    return replace(_with(call, top_k=top_k), sharded={"max_top_k": 7})


def short_list(call: Call, number: int) -> Call:
    """The same call with lists so short that most rows must be searched."""
    return replace(call, sharded={"num_candidates": number})


def one_unsent() -> Call:
    """Of two ranks the first has one token more than it sends, and that token is kept."""
    params = ptk.RowParams.make(1, top_p=0.7)
    return short_list(Call((torch.tensor([[0.0, -1.0, -2.0]]),), params, 3), 1)


def _rows() -> Iterator[tuple[str, Case]]:
    for seed, dtype in enumerate(oracle.DTYPES):
        for order in oracle.ORDERS:
            for size in (9, 130, 1000):
                name = f"random-{str(dtype)[6:]}-{order}-{size}"
                yield name, partial(random_rows, seed * 10 + size, 60, size, dtype, order)
    for size in (1, 2, 8, 401):
        yield f"special-{size}", partial(special, size)
    yield "bad-params", partial(bad_params, 100)
    for seed, size in ((1, 70), (2, 700)):
        yield f"constrained-{size}", partial(constrained, seed, size)
    yield "no-rows", partial(random_rows, 1, 0, 50)
    yield "draft-stream", lambda: drawn(random_rows(3, 20, 300), noise_stream="draft")
    yield "short-list", lambda: short_list(random_rows(21, 60, 500), 2)
    yield "one-unsent", one_unsent
    yield "promised-top-k", promised


def _flat() -> Iterator[tuple[str, Case]]:
    values: dict[str, dict[str, Any]] = {
        "top-p": {"top_p": 0.7},
        "top-p-joint": {"top_p": 0.9, "filter_order": "joint"},
        "top-p-constant": {"top_p": 0.31, "spread": 0.0},
        "top-k": {"top_k": 7777, "spread": 1.0},
        "top-k-constant": {"top_k": 7777, "spread": 0.0},
        "top-k-top-p": {"top_k": 9000, "top_p": 0.8, "spread": 1.0},
        "all-hf": {"top_k": 9000, "top_p": 0.97, "min_p": 0.05, "filter_order": "hf"},
        "top-k-min-p": {"top_k": 19_000, "min_p": 0.03, "spread": 1.0},
        "min-p-top-p": {"min_p": 0.2, "top_p": 0.9, "spread": 0.3},
        "min-p": {"min_p": 0.9, "spread": 0.3},
    }
    for seed, (name, given) in enumerate(values.items()):
        yield f"flat-{name}", partial(flat, seed, 2, 20_000, **given)
    yield "flat-clustered", clustered


def _drafts() -> Iterator[tuple[str, Case]]:
    for mode in ptk.ops.VERIFY_MODES:
        for seed, (k, size) in enumerate(((0, 60), (1, 130), (3, 300), (4, 61))):
            yield f"{mode}-{k}-{size}", partial(speculative, seed + 40, 40, k, size, mode)
    shape = (20, 3, 99)
    constraints = {"bias": bias_of(50, *shape), "allowed_mask": mask_of(52, *shape)}
    yield "rejection-constrained", partial(speculative, 51, 20, 2, 99, "rejection", **constraints)
    yield "rejection-short-list", lambda: short_list(speculative(53, 30, 2, 300, "rejection"), 1)


def _few() -> Iterator[tuple[str, Case]]:
    """What Triton's interpreter gets, at 0.2 s a row and more."""
    yield "few-rows", partial(random_rows, 61, 6, 300)
    yield "few-flat", partial(flat, 62, 1, 2000, top_p=0.9)
    yield "few-top-k", lambda: short_list(flat(63, 1, 700, spread=1.0, top_k=400), 3)
    yield "few-coupled", partial(speculative, 64, 3, 1, 70, "coupled")
    yield "few-rejection", partial(speculative, 65, 3, 1, 130, "rejection")


CASES: dict[str, Case] = dict((*_rows(), *_flat(), *_drafts(), *_few()))
