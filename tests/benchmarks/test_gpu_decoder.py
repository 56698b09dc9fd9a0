"""What ``python -m benchmarks.gpu --decoder`` computes, on a CPU: weights, steps, traces."""

import random
import weakref
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Linear, Module
from torch.profiler import ProfilerActivity
from transformers import LlamaForCausalLM

from benchmarks.gpu import decoder, trace
from benchmarks.gpu.decoder import MODES
from benchmarks.gpu.device import Journal
from benchmarks.harness import random_models
from benchmarks.harness.random_models import (
    LLAMA_7B,
    LLAMA_13B,
    LLAMA_70B,
    ModelShape,
    TrioShape,
    byte_tokenizer,
    empty_model,
    random_model,
    step_bytes,
    weight_bytes,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

BY_NAME = {mode.name: mode for mode in MODES}
TINY = ModelShape(32, 48, 2, 4, 2, vocab_size=300, context=128)
IDS = torch.arange(40).reshape(2, 20) * 7 % 300


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture(scope="module")
def trios():
    pytest.importorskip("peft")
    return random_models.build_trios(TrioShape("tiny", "Tiny", TINY, TINY), "cpu")


@pytest.mark.parametrize(
    ("shape", "published"),
    [(LLAMA_7B, 6_738_415_616), (LLAMA_13B, 13_015_864_320), (LLAMA_70B, 68_976_648_192)],
)
def test_as_many_parameters_as_published(shape, published):
    assert sum(p.numel() for p in empty_model(shape).parameters()) == published


def test_a_random_model_computes_what_an_ordinary_one_with_its_weights_computes():
    """Angles included: they are buffers, which no weights are loaded for."""
    model = random_model(TINY, "cpu", 0, dtype=torch.float32)
    ordinary = LlamaForCausalLM(TINY.config()).eval()
    ordinary.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(ordinary))
    assert torch.equal(logits(model), logits(random_model(TINY, "cpu", 0, dtype=torch.float32)))
    assert not torch.equal(logits(model), logits(random_model(TINY, "cpu", 1)))
    # The head's input has norms' root mean square of 1, so logits deviate by 1.5.
    wide = random_model(ModelShape(256, 512, 2, 4, 2, 1000), "cpu", 0)
    assert float(logits(wide).float().std()) == pytest.approx(1.5, rel=0.1)


def test_a_quantised_layer_is_gone_before_the_next_has_weights():
    alive: list[weakref.ref[Module]] = []

    def quantize(layer):
        assert layer.weight.std() > 0
        alive.append(weakref.ref(layer))
        # The loop's own name still holds the one before.
        assert sum(ref() is not None for ref in alive) <= 2
        return Module()

    model = random_model(TINY, "cpu", 0, quantize=quantize)
    assert len(alive) == 2 * 7
    assert [name for name, m in model.named_modules() if isinstance(m, Linear)] == ["lm_head"]


def test_bytes(trios):
    # Two layers of q, k, v, o (16 of 32 columns for k and v), gate, up, down and two norms; the
    # last norm; embedding and head; two buffers of 4 fp32.
    layers, angles = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32) + 32, 2 * 4 * 4
    model = random_model(TINY, "cpu", 0)
    assert weight_bytes([model]) == 2 * (layers + 2 * 300 * 32) + angles
    assert step_bytes([model]) == 2 * (layers + 300 * 32) + angles
    # The expert is the anti-expert's tensors and an adapter of rank 16 on 7 layers of each of 2.
    adapter = 2 * 16 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    record = decoder.weights_record(TrioShape("t", "T", TINY, TINY), trios)
    assert record["step_bytes"]["base"] == step_bytes([model])
    assert record["step_bytes"]["shared pair"] == step_bytes([model]) + adapter
    assert record["bytes"]["shared pair"] == weight_bytes([model]) + adapter
    expert, anti = trios["shared"].expert, trios["shared"].anti
    assert (logits(expert) - logits(anti)).std() > 0  # B is not 0: the expert is another model
    model.lm_head.weight = model.model.embed_tokens.weight  # a head that is read whole
    assert step_bytes([model]) == 2 * (layers + 300 * 32) + angles


def test_every_id_has_a_name_and_text_comes_back():
    tokenizer = byte_tokenizer(32_000)
    assert sorted(tokenizer.get_vocab().values()) == list(range(32_000))
    text = "Äh, 2 + 2 = 4\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


def test_floors(trios):
    """A step's bytes take 10 ms; those of a round are not counted."""
    trio = trios["separate"]
    read = step_bytes([trio.base])
    provider: Any = SimpleNamespace(trio=trio, roles=("base",))
    line = {"token_ms": {"median": 31.0}}
    found = decoder.floor(BY_NAME["base-only"], provider, line, 100.0 * read)
    assert (found["step_bytes"], found["floor_ms"]) == (read, pytest.approx(10.0))
    assert found["step_over_floor"] == pytest.approx(3.1)
    found = decoder.floor(BY_NAME["ours-speculative-4"], provider, line, 100.0 * read)
    assert "step_over_floor" not in found and found["drafts"] == 4


def test_a_run_on_a_processor(monkeypatch, trios, tmp_path):
    """Two modes of a tiny trio: lines are there as they come, and the table."""
    journal = Journal(tmp_path / "gpu.jsonl", {"device_name": "X9", "driver": "5"})
    journal.add([{"op": "copy", "bytes_per_second": [1e9]}])
    monkeypatch.setattr(decoder, "OURS", "no profile")
    modes = [BY_NAME[name] for name in ("base-only", "ours", "ours-speculative-2")]
    decoder.measure(TrioShape("13b", "Tiny", TINY, TINY), trios, modes, 1, journal)
    [(heading, rows)] = decoder.groups(journal.records[1:])
    assert heading == "Tiny, batch 1"
    assert [row[0] for row in rows] == ["base-only", "ours", "ours-speculative-2", "the paper"]
    assert rows[0][4] == "-" != rows[1][4]
    assert len((tmp_path / "gpu.jsonl").read_text().splitlines()) == 4
    assert "X9, driver 5" in decoder.caption(journal)


def test_modes_are_right_on_a_processor(monkeypatch, trios):
    """Greedy tokens against the naive loop's, as the command checks them; what is wrong ends it."""
    trio = trios["separate"]
    models = [random_model(TINY, "cpu", i, dtype=torch.float64) for i in range(3)]
    double = type(trio).from_models(*models, trio.tokenizer)
    monkeypatch.setattr("benchmarks.gpu.decoder.ptk.load_trio", lambda *_, **__: double)
    decoder.check("cpu")


def event(name, cat, ts, dur, **args):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "args": args}


def test_merged_is_the_union():
    rng = random.Random(0)
    for _ in range(200):
        starts = rng.choices(range(40), k=rng.randint(1, 9))
        spans = [(start, start + rng.randint(1, 6)) for start in starts]
        covered = set().union(*(range(start, end) for start, end in spans))
        union = trace.merged(spans)
        assert set().union(*(range(int(a), int(b)) for a, b in union)) == covered
        assert all(a[1] < b[0] for a, b in pairwise(union))


def test_idle_and_waits():
    # busy in [10, 20) on two streams, [21, 24), [24, 30): idle for 1 of 20
    spans = [(10, 18, 7), (12, 20, 8), (13, 14, 7), (21, 24, 7), (24, 30, 7)]
    kernels = [event("k", "kernel", a, b - a, stream=stream) for a, b, stream in spans]
    others = [
        {"ph": "M", "name": "process_name", "cat": "kernel"},
        event("Memcpy DtoH", "gpu_memcpy", 12, 1, stream=7),
        event("aten::mm", "cpu_op", 0, 99),
        event("cudaGraphLaunch", "cuda_runtime", 1, 1),
        event("cudaStreamSynchronize", "cpu_op", 5, 1),
        *[event("cudaEventSynchronize", "cuda_runtime", 2, 1)] * 40,
        *[event("cuStreamSynchronize", "cuda_driver", 5, 1)] * 20,
    ]
    record = trace.trace_record([*others, *kernels])
    assert (record["idle_share"], record["longest_gap_us"], record["gaps"]) == (1 / 20, 1, 1)
    assert (record["profiled_step_ms"], record["streams"]) == (20 / 1e3 / 20, [7, 8])
    assert record["waits_per_step"] == {"cudaEventSynchronize": 2.0, "cuStreamSynchronize": 1.0}
    assert trace.trace_record(kernels[:3])["idle_share"] == 0.0
    ran: list[Any] = []
    events = trace.profiled(lambda: ran.append(torch.ones(4) + 1), ProfilerActivity.CPU)
    assert len(ran) == 1 and "aten::add" in {e["name"] for e in events}
    with pytest.raises(ValueError, match="no kernel"):
        trace.trace_record(events)


def test_a_request_of_twenty_steps(trios):
    provider: Any = BY_NAME["base-only"].make(trios, 1, 80)
    with trace.decoding(provider, 8) as steps:
        before = provider.decoder.statistics()["base_forwards"]
        steps()
        assert provider.decoder.statistics()["base_forwards"] - before == trace.STEPS
