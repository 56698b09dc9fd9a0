"""Nothing is compiled while serving: Triton is asked for no kernel that warm_up did not ask for."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import proxytune_kernels as ptk
from proxytune_kernels.kernels import launches
from proxytune_kernels.ops.backends.triton_operators import IMPLEMENTATIONS
from proxytune_kernels.rng import STREAMS
from tests.ptx.device import Device

OPS: Any = ptk  # called with roles unpacked
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BATCHES = (1, 2, 3, 16, 17)
# dtypes and columns of the roles, vocab_size; rows that begin at 16 bytes and others
MODELS = {
    "one width": ((BF16,) * 3, (128_256,) * 3, 128_256),
    "an odd width": ((FP16,) * 3, (50_257,) * 3, 50_257),
    "all of them different": ((BF16, FP32, FP16), (32_000, 32_016, 32_003), 31_999),
}


class Asked(Device):
    """Notes what Triton is asked for: all that it finds a compiled kernel by. Compiles nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[tuple[str, str]] = set()

    def _launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        binder = kernel.device_caches[self.capability][-1]
        asked = kernel.__name__, str(binder(*args, **options)[1:])
        self.kernels.add(asked)

        def again(*launched: Any) -> None:
            assert str(binder(*launched[9:], **options)[1:]) == asked[1], (
                f"{kernel.__name__} has two kinds"
            )

        return SimpleNamespace(run=again, function=None, packed_metadata=None)


def serve(model: str, batch_size: int) -> None:
    """Calls as an engine makes them, into tensors at any address."""
    dtypes, widths, V = MODELS[model]

    def logits(T: int | None = None) -> list[torch.Tensor]:
        shape = (batch_size + 1, *(() if T is None else (T,)))
        made = (torch.empty((*shape, w), dtype=d) for d, w in zip(dtypes, widths, strict=True))
        return [role[1:] for role in made]

    def constraints(*shape: int) -> Any:
        bias = torch.empty((*shape, V))
        mask = torch.empty((*shape, -(-V // 32)), dtype=torch.int32)
        for b, m in product((None, bias), (None, mask)):
            yield dict(bias=b, allowed_mask=m, vocab_size=V, backend="triton")
        for m, number in product((None, mask), (1, 16, 300)):
            edits = ptk.Edits.make(torch.empty((*shape, number), dtype=torch.int32))
            yield dict(edits=edits, allowed_mask=m, vocab_size=V, backend="triton")

    params = ptk.RowParams.make(batch_size + 1).rows(slice(1, None))
    roles = logits()
    last = [role[:, -1] for role in logits(3)]
    out = ptk.SampleOutput(
        torch.empty(batch_size + 1, dtype=torch.int64)[1:], *torch.empty(2, batch_size),
        *torch.empty(2, batch_size, dtype=torch.int32),
    )  # fmt: skip
    for given, n in product(constraints(batch_size), (0, 5, 128)):
        for three in (roles, last, [roles[0], None, None], [roles[1], None, None]):
            OPS.sample(*three, params, top_logprobs=n, **given)
        if n == 0:
            OPS.sample(*roles, params, out=out, **given)
            OPS.combine(*roles, params.alpha, **given)
    for T in (1, 2, 5, 16):
        roles = logits(T)
        ids = torch.empty((batch_size, T), dtype=torch.int64)
        OPS.score(*roles, ids, params.alpha, vocab_size=V, backend="triton")
        drafts = torch.empty((batch_size, T - 1, widths[1]), dtype=dtypes[1])
        rejection = dict(mode="rejection", draft_logits=drafts)
        for given in constraints(batch_size, T):
            for three, more in product((roles, [roles[0], None, None]), ({}, rejection)):
                OPS.verify(*three, ids[:, 1:], params, **given, **more)


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_compiled_while_serving(model, monkeypatch):
    dtypes, widths, V = MODELS[model]
    device = Asked()
    with device:
        # As on a GPU: what was compiled for a kind is launched for all calls of it.
        monkeypatch.setattr(launches, "COMPILED", {})
        monkeypatch.setattr(launches, "REMEMBERS", True)
        operators = ("sample", "combine", "score", "verify")
        made = ptk.warm_up("cpu", dtypes, V, widths=widths, operators=operators, backend="triton")
        assert min(made.values()) > 0
        warm = set(device.kernels)
        monkeypatch.setattr(launches, "REMEMBERS", False)
        for batch_size in BATCHES:
            serve(model, batch_size)
        assert device.kernels <= warm, [*device.kernels - warm][:3]
        monkeypatch.setattr(launches, "REMEMBERS", True)
        for batch_size in BATCHES:
            serve(model, batch_size)


def test_heads_compile_nothing_while_serving():
    V = 32_000
    heads = [
        ptk.Head(torch.empty(3, size, dtype=BF16), torch.empty(V, size, dtype=BF16))
        for size in (512, 128, 128)
    ]
    device = Asked()
    with device:
        made = ptk.warm_up("cpu", BF16, V, operators=(), heads=heads, backend="triton")
        assert [*made] == ["sample_hidden"]
        warm = set(device.kernels)
        for batch_size in (*BATCHES, 33, 64, 65, 200):
            now: Any = [h._replace(hidden=h.hidden.new_empty(batch_size, h.hidden.shape[1]))
                        for h in heads]  # fmt: skip
            mask = torch.empty((batch_size, V // 32), dtype=torch.int32)
            for n, m in product((0, 7), (None, mask)):
                OPS.sample_hidden(*now, allowed_mask=m, top_logprobs=n, backend="triton")
        assert device.kernels <= warm


@pytest.mark.parametrize("drafter", ["expert", "prompt_lookup"])
def test_a_decoder_compiles_nothing_while_it_draws(drafter):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from proxytune_kernels.decoder.constraints import Needs

    trio = ptk.load_trio("shipped")
    speculation = ptk.Speculation(mode="rejection", drafter=drafter)
    dtype, V = trio.base.dtype, trio.vocab_size
    device = Asked()
    with device:
        decoder = ptk.Decoder(trio, 4, 64, speculation=speculation, backend="triton", check=False)
        decoder.warm_up()
        warm = set(device.kernels)
        sampler: Any = decoder._sampler
        asked = ptk.SamplingParams(allowed_token_ids=[1, 2], repetition_penalty=2.0)
        sampler.constraints.reserve(decoder._make_requests([[1]], asked))
        kinds = (
            *(Needs(), Needs(masked=True), Needs(edits=1), Needs(masked=True, edits=1)),
            Needs(likeliest=20, steering=True),
        )
        for rows, needs, k in product((1, 2, 4), kinds, (1, 2, 5)):
            logits = {
                role: torch.empty((rows, k + 1, model.get_output_embeddings().weight.shape[0]))
                for role, model in trio.models.items()
            }
            logits = {role: x.to(dtype) for role, x in logits.items()}
            ids = torch.empty((rows, k), dtype=torch.int64)
            drafts = torch.empty((rows, k, V)) if drafter != "expert" else logits["expert"][:, :-1]
            for one in (logits, {"base": logits["base"]}):
                sampler.draw(rows, {role: x[:, 0] for role, x in one.items()}, needs)
                sampler.verify(rows, one, ids, "rejection", drafts, needs)
                sampler.verify(rows, one, ids, "coupled", None, needs)
            sampler.draft(rows, logits["expert"][:, 0], ids[:, :1], needs, "draft")
        assert warm and device.kernels <= warm, [*device.kernels - warm][:3]


def test_shards_compile_nothing_while_serving():
    start, size, ranks, stream = 16_032, 16_016, 3, STREAMS["sample"]
    shard = ptk.sharded.Shard(
        start, size, (0, start, start + size), (start, size, 8), "triton", None
    )
    run = IMPLEMENTATIONS
    device = Asked()
    with device:
        ptk.warm_up("cpu", BF16, size, operators=(), shard=shard)
        warm = set(device.kernels)
        for B, drafts in product(BATCHES, (1, 4, 16)):
            params, long = ptk.RowParams.make(B), torch.int64
            x = torch.empty((B, size))
            summaries = run["shard_scan"](x).repeat(ranks, 1)
            keys = run["shard_keys"](x, summaries, start)
            for edges in (1023, 1024):
                given = torch.empty((B, edges), dtype=long)
                run["shard_histogram"](keys, summaries, params.temperature, given)
            ids, kept = torch.empty(B, dtype=long), torch.empty((B, 4), dtype=long)
            for cut, wanted in product((None, ids), (None, ids)):
                words = run["shard_draw"](x, summaries, *params, cut, wanted, start, stream)
                told = torch.stack([words] * ranks)
                for n in (0, 20, 128):
                    lists = keys[:, :n].repeat(ranks, 1, 1)
                    run["shard_finish"](summaries, told, lists, *params, None, stream)
                run["shard_finish"](summaries, told, None, *params, kept, stream)
            sides: list[Any] = []
            for rows in (B * (drafts + 1), B * drafts):
                cut = torch.empty(rows, dtype=long)
                sides += [torch.empty((rows, size)), cut.repeat(ranks, 1), cut, cut]
            p = torch.empty((B, drafts + 1))
            _, steps = run["shard_accept"](
                p,
                p.int(),
                p[:, 1:].contiguous(),
                sides[-1].view(B, drafts),
                params.seed,
                params.position,
            )
            words = run["shard_residual"](*sides, steps, *params, start)
            told = torch.stack([words] * ranks)
            run["shard_finish"](summaries, told, None, *params, kept, stream)
        assert device.kernels <= warm, [*device.kernels - warm][:3]
