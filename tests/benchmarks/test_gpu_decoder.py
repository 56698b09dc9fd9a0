"""What `python -m benchmarks.gpu --decoder` computes, on a processor."""

import json
import random
import weakref
from collections import Counter
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Linear, Module
from torch.profiler import ProfilerActivity
from transformers import LlamaForCausalLM

from benchmarks.gpu.decoder import random_models, report, run, trace
from benchmarks.gpu.decoder.modes import (
    MODES,
    ModeTimes,
    break_even,
    intervals,
    records,
    speculative,
    tokens_per_round,
)  # fmt: skip
from benchmarks.gpu.decoder.random_models import (
    LLAMA_7B,
    LLAMA_13B,
    LLAMA_70B,
    TRIOS,
    ModelShape,
    TrioShape,
    byte_tokenizer,
    empty_model,
    random_model,
    step_bytes,
    weight_bytes,
)  # fmt: skip
from benchmarks.gpu.decoder.trace import Kernel, Trace, merged
from benchmarks.harness.decoding import Generation
from proxytune_kernels import Decoder

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TINY = ModelShape(32, 48, 2, 4, 2, vocab_size=300, context=128)
IDS = torch.arange(40).reshape(2, 20) * 7 % 300


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture(scope="module")
def trios():
    pytest.importorskip("peft")
    return random_models.build_trios(TrioShape("tiny", "Tiny", TINY, TINY), "cpu")


class TestRandomModels:
    @pytest.mark.parametrize(
        ("shape", "published"),
        [(LLAMA_7B, 6_738_415_616), (LLAMA_13B, 13_015_864_320), (LLAMA_70B, 68_976_648_192)],
    )
    def test_as_many_parameters_as_published(self, shape, published):
        assert sum(p.numel() for p in empty_model(shape).parameters()) == published

    def test_planned_bytes(self):
        assert TRIOS["13b"].planned_bytes() == 2 * (13_015_864_320 + 2 * 6_738_415_616)
        layer = 2 * 8192 * (8192 + 1024) + 3 * 8192 * 28_672
        int8 = 2 * 68_976_648_192 - 80 * layer
        assert TRIOS["70b"].planned_bytes() == int8 + 2 * 2 * 6_738_415_616

    def test_computes_what_an_ordinary_model_with_its_weights_computes(self):
        """Angles included: they are buffers, which no weights are loaded for."""
        model = random_model(TINY, "cpu", 0, dtype=torch.float32)
        ordinary = LlamaForCausalLM(TINY.config()).eval()
        ordinary.load_state_dict(model.state_dict())
        assert torch.equal(logits(model), logits(ordinary))
        assert torch.equal(logits(model), logits(random_model(TINY, "cpu", 0, dtype=torch.float32)))
        assert not torch.equal(logits(model), logits(random_model(TINY, "cpu", 1)))

    def test_weights(self):
        model = random_model(ModelShape(256, 512, 2, 4, 2, 1000), "cpu", 0)
        for name, p in model.named_parameters():
            assert p.dtype == torch.bfloat16
            if "norm" in name:
                assert torch.equal(p, torch.ones(256).bfloat16())
            elif "lm_head" not in name:
                # 65,536 or more normal samples: the error of their deviation is 0.3% of it
                assert float(p.float().std()) == pytest.approx(0.02, rel=0.02)
        # The head's input has norms' root mean square of 1, so logits deviate by 1.5; 40,000 of
        # them, in rows that are alike.
        assert float(logits(model).float().std()) == pytest.approx(1.5, rel=0.1)

    def test_a_quantised_layer_is_gone_before_the_next_has_weights(self):
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

    def test_the_adapter_shares_weights_and_leaves_the_other_alone(self):
        pytest.importorskip("peft")
        anti = random_model(TINY, "cpu", 0, dtype=torch.float32)
        before, state = logits(anti), torch.get_rng_state()
        expert = random_models.adapted_model(anti, 1)
        assert torch.equal(logits(anti), before) and torch.equal(torch.get_rng_state(), state)
        own = {id(p) for p in anti.parameters()}
        added = [p for p in expert.parameters() if id(p) not in own]
        assert {id(p) for p in expert.parameters()} >= own
        assert (len(added), {min(p.shape) for p in added}) == (2 * 7 * 2, {16})
        # B is not 0: the expert is another model
        assert (logits(expert) - before).std() > 0.01 * before.std()

    def test_bytes(self, trios):
        # Two layers of q, k, v, o (16 of 32 columns for k and v), gate, up, down and two norms; the
        # last norm; embedding and head; two buffers of 4 fp32.
        layers, angles = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32) + 32, 2 * 4 * 4
        model = random_model(TINY, "cpu", 0)
        assert weight_bytes([model]) == 2 * (layers + 2 * 300 * 32) + angles
        assert step_bytes([model]) == 2 * (layers + 300 * 32) + angles
        adapter = 2 * 16 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
        record = random_models.weights_record(TRIOS["13b"], trios)
        assert record["step_bytes"]["base"] == step_bytes([model])
        assert record["step_bytes"]["shared pair"] == step_bytes([model]) + adapter
        assert record["bytes"]["shared pair"] == weight_bytes([model]) + adapter
        model.lm_head.weight = model.model.embed_tokens.weight  # a head that is read whole
        assert step_bytes([model]) == 2 * (layers + 300 * 32) + angles
        parts = SimpleNamespace(a=torch.zeros(10, dtype=torch.int8), b=torch.zeros(2))
        parts.__tensor_flatten__ = lambda: (["a", "b"], None)
        assert random_models._bytes(parts) == 10 + 8

    def test_every_id_has_a_name_and_text_comes_back(self):
        tokenizer = byte_tokenizer(32_000)
        assert sorted(tokenizer.get_vocab().values()) == list(range(32_000))
        text = "Äh, 2 + 2 = 4\n"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
        with pytest.raises(ValueError, match="vocab_size must be at least 259, got 258"):
            byte_tokenizer(258)


class TestBreakEven:
    @pytest.mark.parametrize("drafts", [1, 2, 5])
    @pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
    def test_tokens_of_every_pattern(self, drafts, acceptance):
        """Drafts before the first wrong one count, and one token more."""
        expected = 0.0
        for pattern in product((True, False), repeat=drafts):
            chance = 1.0
            for right in pattern:
                chance *= acceptance if right else 1 - acceptance
            accepted = pattern.index(False) if False in pattern else drafts
            expected += chance * (accepted + 1)
        # a sum of at most 32 terms near 1: its rounding is under 32 ulps
        assert tokens_per_round(acceptance, drafts) == pytest.approx(expected, rel=1e-14)

    @pytest.mark.parametrize("drafts", [1, 4, 8])
    @pytest.mark.parametrize("cost", [1.01, 1.5, 1.99])
    def test_first_that_pays_on_a_grid(self, drafts, cost):
        grid = [i / 20_000 for i in range(20_001)]
        first = next(a for a in grid if sum(a**n for n in range(drafts + 1)) >= cost)
        found = break_even(cost * 0.02, 0.02, drafts)
        assert isinstance(found, float)
        assert first - 1 / 20_000 < found <= first + 1e-12

    def test_edges(self):
        assert (break_even(0.9, 1.0, 4), break_even(1.0, 1.0, 4)) == (0.0, 0.0)
        assert break_even(5.0, 1.0, 4) == pytest.approx(1.0, abs=1e-12)
        assert break_even(5.001, 1.0, 4) == "never"


class TestSteps:
    def test_intervals(self):
        rows = Generation([], [[1.0, 1.5, 3.0], [1.0, 2.0, 2.25]])
        assert intervals(rows, 0) == [0.5, 1.5, 1.0, 0.25]
        # The first token is the prompt's. Rounds of 2 drafts: after 1, 3, 4 and 7 tokens of 9; the
        # last begins with 2 tokens left, and would have drafted 1.
        rounds = Generation([], [[1.0, 2.0, 2.0, 4.0, 7.0, 7.0, 7.0, 11.0, 11.0]])
        assert intervals(rounds, 2) == [1.0, 2.0, 3.0]
        # of 6 tokens left, 5 can be drafted and one more drawn
        assert intervals(rounds, 5) == [1.0, 2.0]
        assert intervals(rounds, 8) == []

    @staticmethod
    def timed(trio, name, steps, tokens=11):
        """A mode whose steps take so long, one number a repeat."""
        provider = SimpleNamespace(trio=trio, roles=("base",), set_up_seconds=0.5)
        times = [[[1.0 + step * i for i in range(tokens)]] * 2 for step in steps]
        counted = [Generation([], rows, {"emitted": 7}) for rows in times]
        return ModeTimes(MODES[name], provider, counted)

    def test_records(self, trios):
        trio = trios["separate"]
        steps = {
            "naive": [0.06, 0.05], "base-only": [0.010, 0.020], "ours": [0.022, 0.040],
            speculative(4): [0.033, 0.060],
        }  # fmt: skip
        measured = [self.timed(trio, name, seconds) for name, seconds in steps.items()]
        read = step_bytes([trio.base])
        lines = {line["mode"]: line for line in records(measured, 2, 11, 100.0 * read)}
        ours, four = lines["ours"], lines[speculative(4)]
        assert (ours["batch_size"], ours["repeats"], ours["counted"]) == (2, 2, {"emitted": 14})
        assert ours["step_ms"]["median"] == pytest.approx(31.0)
        assert ours["mean_step_ms"]["median"] == pytest.approx(31.0)
        # a step's bytes take 10 ms
        assert (ours["step_bytes"], ours["floor_ms"]) == (read, pytest.approx(10.0))
        assert ours["step_over_floor"]["median"] == pytest.approx(3.1)
        # paired: 2.2 and 2.0, not 31 over 15
        assert ours["step_over_base_only"]["median"] == pytest.approx(2.1)
        assert ours["naive_over_step"]["median"] == pytest.approx((60 / 22 + 50 / 40) / 2)
        # the last token comes at 1.22 and 1.4 seconds
        assert ours["tokens_per_second"]["median"] == pytest.approx((22 / 1.22 + 22 / 1.4) / 2)
        assert (four["step_bytes"], four["floor_ms"], four["step_over_floor"]) == (None,) * 3
        # medians: 46.5 over 31 and over 15
        pays = four["break_even"]
        assert sum(pays["ours"] ** i for i in range(5)) == pytest.approx(46.5 / 31)
        assert sum(pays["base-only"] ** i for i in range(5)) == pytest.approx(46.5 / 15)

    def test_what_was_not_measured_is_none(self, trios):
        alone = self.timed(trios["separate"], speculative(1), [0.05], tokens=9)
        [line] = records([alone], 1, 9, 1.0)
        assert (line["step_over_base_only"], line["break_even"]) == (None, {})
        with pytest.raises(ValueError, match="ours-speculative-8: no whole step in 2 rows"):
            records([alone._replace(mode=MODES[speculative(8)])], 1, 9, 1.0)


class TestModes:
    def test_which_run_at_several_rows(self):
        several = [mode.name for mode in MODES.values() if mode.any_batch]
        wanted = ["naive", "base-only", "ours", "ours-shared-pair", speculative(4)]
        assert several == wanted
        assert {mode.drafts for mode in MODES.values()} == {0, 1, 2, 4, 8}

    @pytest.mark.parametrize("name", ["base-only", "ours", "ours-shared-pair", speculative(2)])
    def test_modes_are_right_on_a_processor(self, trios, name):
        """Tokens against the naive loop's and plain decoding's, as the command checks them."""
        wide = random_models.with_shared_pair(_double(trios["separate"]))
        by_dtype = dict.fromkeys(("float32", "float64", "bfloat16"), wide)
        plain = run.sampled(MODES["ours"], wide)
        outcome = run.check(MODES[name], by_dtype, lambda: plain)
        assert not outcome.failed, outcome.sentence
        assert outcome.sentence.startswith(f"{name}: greedy tokens are the naive loop's, 0 ties")
        if MODES[name].drafts:
            plain[1][3] += 1
            wrong = run.check(MODES[name], by_dtype, lambda: plain)
            assert wrong.failed and "prompt 1: " in wrong.sentence

    def test_one_stream(self, trios):
        """What keeps the pair on the base's stream is not a public option: it has to be there."""
        assert "_side" in vars(Decoder(trios["separate"], 1, 32)._runner)
        provider: Any = MODES["ours-one-stream"].make(trios, 1, 32)
        assert provider.decoder._runner._side is None


def _double(trio):
    models = {
        role: random_model(TINY, "cpu", i, dtype=torch.float64) for i, role in enumerate(trio.roles)
    }
    return type(trio).from_models(*models.values(), trio.tokenizer)


def event(name, cat, ts, dur, **args):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "args": args}


class TestTrace:
    def test_read(self, tmp_path):
        events = [
            {"ph": "M", "name": "process_name", "cat": "kernel"},
            event("late", "kernel", 30.5, 2, stream=7),
            event("early", "kernel", 10, 5, stream=13),
            event("Memcpy DtoH", "gpu_memcpy", 12, 1, stream=7),
            event("aten::mm", "cpu_op", 0, 99),
            event("cudaGraphLaunch", "cuda_runtime", 1, 1),
            event("cudaEventSynchronize", "cuda_runtime", 2, 1),
            event("cuStreamSynchronize", "cuda_driver", 5, 1),
            event("cudaStreamSynchronize", "cpu_op", 5, 1),
        ]
        (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
        found = trace.read(tmp_path / "trace.json")
        assert list(found.kernels) == [Kernel(10, 15, 13, "early"), Kernel(30.5, 32.5, 7, "late")]
        assert found.waits == Counter(cudaEventSynchronize=1, cuStreamSynchronize=1)

    def test_a_profile_of_this_processor_has_no_kernels(self, tmp_path):
        path, ran = tmp_path / "trace.json", []
        found = trace.record(lambda: ran.append(torch.ones(4) + 1), path, ProfilerActivity.CPU)
        assert len(ran) == 1
        assert "aten::add" in {e["name"] for e in json.loads(path.read_text())["traceEvents"]}
        with pytest.raises(ValueError, match="no kernel"):
            trace.trace_record(found)

    def test_merged_is_the_union(self):
        rng = random.Random(0)
        for _ in range(200):
            starts = rng.choices(range(40), k=rng.randint(1, 9))
            spans = [(start, start + rng.randint(1, 6)) for start in starts]
            covered = set().union(*(range(start, end) for start, end in spans))
            union = merged(spans)
            assert set().union(*(range(int(a), int(b)) for a, b in union)) == covered
            assert all(a[1] < b[0] for a, b in pairwise(union))

    def test_idle(self):
        # busy in [10, 20) on two streams, [21, 24), [24, 30): idle for 1 of 20
        spans = [(10, 18, 7), (12, 20, 8), (13, 14, 7), (21, 24, 7), (24, 30, 7)]
        kernels = [Kernel(*span, "k") for span in spans]
        record = trace.trace_record(Trace(kernels, Counter(x=40)))
        assert (record["idle_share"], record["longest_gap_us"], record["gaps"]) == (1 / 20, 1, 1)
        assert (record["profiled_step_ms"], record["streams"]) == (20 / 1e3 / 20, [7, 8])
        assert record["waits_per_step"] == {"x": 2.0}
        assert trace.trace_record(Trace(kernels[:3], Counter()))["idle_share"] == 0.0

    def test_a_request_of_twenty_steps(self, trios):
        provider: Any = MODES["base-only"].make(trios, 1, 80)
        with trace._decoding(provider, 8) as steps:
            before = provider.decoder.statistics()["base_forwards"]
            steps()
            assert provider.decoder.statistics()["base_forwards"] - before == trace.STEPS


def decoded(mode, trio="13b", floor=1.05, base=2.0, batch_size=1, **others):
    return {
        "op": "decode", "trio": trio, "title": f"Llama {trio}", "mode": mode, "drafts": 0,
        "batch_size": batch_size, "step_ms": {"median": 12.34}, "step_bytes": 53_000_000_000,
        "floor_ms": 11.0, "step_over_floor": {"median": floor},
        "step_over_base_only": {"median": base}, "naive_over_step": {"median": 2.5},
        "break_even": None, **others,
    }  # fmt: skip


class TestReport:
    def test_table_page_and_picture(self, tmp_path, capsys):
        rounds = decoded(
            speculative(4), drafts=4, step_bytes=None, floor_ms=None, step_over_floor=None,
            break_even={"ours": 0.1234, "base-only": "never"},
        )  # fmt: skip
        lines = [decoded("ours"), rounds, decoded("ours", batch_size=4), decoded("ours", "70b")]
        sizes = {"base": 26_031_728_640, "shared pair": 13_556_785_152}
        page = report.markdown([{"title": "Llama 13b", "bytes": sizes}], lines, 3e12, "X9")
        assert "- Llama 13b: weights of base 26.0 GB, shared pair 13.6 GB." in page
        heads = [line for line in page.splitlines() if line.startswith("**")]
        assert heads == [
            f"**Llama {at}**" for at in ("13b, batch 1", "13b, batch 4", "70b, batch 1")
        ]
        assert page.count("| ours | 12.3 | 53.0 | 1.05 | 2.00 | 2.50 | - | - |") == 3
        assert "| ours-speculative-4 | 12.3 | - | - | 2.00 | 2.50 | 12% | never |" in page
        # beside batch 1 of each trio
        assert page.count("| the paper |  |  |  | 2.40 |  |  |  |") == 1
        assert page.count("| the paper |  |  |  | 1.50 |  |  |  |") == 1
        assert "3,000 GB/s" in page and "`python -m benchmarks.gpu --decoder` on X9" in page
        report.print_modes(lines, 3e12, "X9")
        shown = capsys.readouterr().out
        assert "Llama 13b, batch 1" in shown and "never" in shown
        pytest.importorskip("matplotlib")
        report.draw(lines, tmp_path / "steps.png", "title")
        assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
