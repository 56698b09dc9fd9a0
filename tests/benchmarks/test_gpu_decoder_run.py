"""A whole run of ``python -m benchmarks.gpu --decoder``, with a processor in the GPU's place."""

import json
import sys
from collections import Counter
from statistics import median

import pytest
import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.contract import Outcome
from benchmarks.gpu.decoder import build, checks, modes, profiling, trace
from benchmarks.gpu.decoder import run as decoder_run
from benchmarks.gpu.decoder.build import build_trios
from benchmarks.gpu.decoder.checks import Checks
from benchmarks.gpu.decoder.modes import (
    BASE_ONLY,
    EAGER,
    MODES,
    NAIVE,
    OURS,
    SEPARATE,
    SHARED,
    SHARED_PAIR,
    Mode,
    speculative,
)
from benchmarks.gpu.decoder.random_models import weight_bytes
from benchmarks.gpu.decoder.run import Options
from benchmarks.gpu.decoder.shapes import INT8, TRIOS, ModelShape, TrioShape
from benchmarks.gpu.decoder.trace import Trace, Work
from benchmarks.providers import DecoderProvider
from proxytune_kernels.trio.quantization import QuantizationError
from tests.benchmarks.gpu_device import CpuDevice

pytest.importorskip("peft", reason="the shared pair needs the extra lora")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"  # peft's
)

BASE = ModelShape(48, 64, 3, 4, 2, vocab_size=300, context=128)
PAIR = ModelShape(32, 48, 2, 4, 2, vocab_size=300, context=128)
TINY = TrioShape("13b", "Tiny, bf16", BASE, PAIR)
FEW = (NAIVE, BASE_ONLY, OURS, SHARED_PAIR, EAGER, speculative(4))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Synchronisation:
    """torch's setting of what happens where a call synchronises."""

    def __init__(self):
        self.mode = 0
        self.modes = []

    def set(self, mode):
        self.mode = mode
        self.modes.append(mode)

    def get(self):
        return self.mode


@pytest.fixture
def synchronisation(monkeypatch):
    found = Synchronisation()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", found.set)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", found.get)
    return found


@pytest.fixture
def profiled(monkeypatch):
    """In the place of the profiler: two kernels a step, idle for 1 of 20 microseconds."""
    asked = []

    def record(run, path, activity):
        run()
        asked.append((path, activity))
        work = []
        for step in range(profiling.STEPS):
            start = 20.0 * step
            work.append(Work("nvjet", "kernel", start, start + 12, 7))
            work.append(Work("_scan_kernel", "kernel", start + 10, start + 19, 13))
        return Trace(tuple(work), Counter(cudaEventSynchronize=profiling.STEPS))

    monkeypatch.setattr(trace, "record", record)
    return asked


class NothingToSay:
    """In the place of the checks, which take seconds: all is right."""

    def __init__(self, device):
        pass

    def check(self, mode):
        return Outcome(f"{mode.name}: right.", False, {"mode": mode.name})


@pytest.fixture
def bench(monkeypatch, tmp_path, synchronisation, profiled):
    """Run a tiny trio with a few modes; without the checks unless asked."""
    few = {name: MODES[name] for name in FEW}
    monkeypatch.setattr(modes, "MODES", few)
    monkeypatch.setattr(decoder_run, "MODES", few)
    monkeypatch.setattr(checks, "MODES", few)
    monkeypatch.setattr(checks, "_TOKENS", 6)
    monkeypatch.setattr(decoder_run, "_REPEATS", 2)
    monkeypatch.setattr(decoder_run, "_TOKENS", 9)
    monkeypatch.setattr(gpu_run, "COPY_BYTES", 2**16)
    output = tmp_path / "results" / "gpu-decoder.jsonl"

    def go(trios=(TINY,), batch_sizes=(1,), device=None, seconds=600.0, plot=False, checked=False):
        if not checked:
            monkeypatch.setattr(checks, "Checks", NothingToSay)
        options = Options(tuple(trios), tuple(batch_sizes), output, plot)
        code = decoder_run.run(device or CpuDevice(), options, Budget(seconds))
        return code, [json.loads(line) for line in output.read_text().splitlines()]

    return go


def notes(records):
    return [r["text"] for r in records if r["op"] == "note"]


class TestRun:
    def test_whole(self, bench, tmp_path, capsys, synchronisation, profiled):
        code, records = bench(batch_sizes=(1, 2), checked=True)
        assert notes(records) == []
        assert code == 0
        assert [r["mode"] for r in records if r["op"] == "check"] == list(FEW[1:])
        timed = [r for r in records if r["op"] == "decode"]
        assert [(r["batch_size"], r["mode"]) for r in timed] == [
            *((1, name) for name in FEW),
            *((2, name) for name in FEW if name != EAGER),
        ]
        [weights] = [r for r in records if r["op"] == "weights"]
        [copy] = [r for r in records if r["op"] == "copy"]
        read = weights["step_bytes"]
        for r in timed:
            assert (r["trio"], r["title"], r["repeats"]) == ("13b", "Tiny, bf16", 2)
            assert r["environment"]["device_name"] == CpuDevice.name
            assert (r["decoder"] is None) == (r["mode"] == NAIVE)
            assert r["step_ms"]["median"] > 0
        by_mode = {r["mode"]: r for r in timed if r["batch_size"] == 1}
        whole = read["base"] + read["expert"] + read["anti"]
        assert by_mode[OURS]["step_bytes"] == by_mode[NAIVE]["step_bytes"] == whole
        assert by_mode[SHARED_PAIR]["step_bytes"] == read["base"] + read["shared pair"]
        assert by_mode[BASE_ONLY]["step_bytes"] == read["base"]
        floor = 1e3 * whole / median(copy["bytes_per_second"])
        assert by_mode[OURS]["floor_ms"] == pytest.approx(floor)
        assert by_mode[OURS]["decoder"]["pair"] == "separate"
        assert by_mode[SHARED_PAIR]["decoder"]["pair"] == "shared"
        counted = by_mode[speculative(4)]["counted"]
        assert counted["drafted"] > counted["accepted"] >= 0
        assert counted["speculative_rounds"] > 0
        assert by_mode[OURS]["counted"]["plain_steps"] == 2 * 8
        self.traced(records, synchronisation, profiled)
        assert len([r for r in records if r["op"] == "target"]) == 8
        names = {path.name for path in (tmp_path / "results").iterdir()}
        assert names == {"gpu-decoder.jsonl", "gpu-decoder.md"}
        shown = capsys.readouterr().out
        assert "The decoder on a GPU" in shown
        assert "Tiny, bf16: weights of base 0.0 GB, expert 0.0 GB, anti 0.0 GB, shared" in shown
        assert "missed: no kernel runs in less than 3% of the time (4.76%, 13b)" in shown

    def traced(self, records, synchronisation, profiled):
        [traced] = [r for r in records if r["op"] == "trace"]
        # 19 gaps of 1 in 20 steps of 20 less the last gap
        assert traced["idle_share"] == pytest.approx(19 / 399)
        assert traced["profiled_step_ms"] == pytest.approx(399 / 20 / 1e3)
        assert (traced["gaps"], traced["longest_gap_us"]) == (19, 1.0)
        assert (traced["kernels_per_step"], traced["streams"]) == (2.0, [7, 13])
        assert traced["waits_per_step"] == {"cudaEventSynchronize": 1.0}
        [(path, activity)] = profiled
        assert activity == ProfilerActivity.CUDA
        assert not path.parent.exists()
        [checked] = [r for r in records if r["op"] == "synchronisation"]
        assert not checked["captured"]
        assert "CUDA" in checked["graphs"]
        assert checked["raised"] is None
        assert synchronisation.modes == ["error", 0]

    def test_pictures(self, bench, tmp_path):
        pytest.importorskip("matplotlib")
        bench(plot=True)
        for name in ("steps", "trace-13b"):
            picture = tmp_path / "results" / f"gpu-decoder-{name}.png"
            assert picture.read_bytes().startswith(b"\x89PNG")

    def test_without_matplotlib(self, bench, monkeypatch, tmp_path):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        code, records = bench(plot=True)
        assert code == 0
        assert notes(records) == [
            "No pictures: matplotlib is not installed (pip install matplotlib)."
        ]
        assert list(tmp_path.rglob("*.png")) == []

    def test_a_mode_that_is_wrong_is_not_timed(self, bench, monkeypatch):
        right = DecoderProvider.generate

        def wrong(self, prompts, max_tokens, *, greedy=False):
            generation = right(self, prompts, max_tokens, greedy=greedy)
            if self.name == EAGER:
                generation.token_ids[1][2] += 1
            return generation

        monkeypatch.setattr(DecoderProvider, "generate", wrong)
        code, records = bench(checked=True)
        assert code == 1
        [failed] = [r for r in records if r["op"] == "check" and r["failed"]]
        assert failed["mode"] == EAGER
        assert "prompt 1, position 2" in failed["text"]
        timed = {r["mode"] for r in records if r["op"] == "decode"}
        assert timed == {*FEW} - {EAGER}

    def test_a_mode_that_cannot_be_made_leaves_the_others(self, bench, monkeypatch):
        right = Mode.make

        def make(self, trios, rows, length):
            if self.name == SHARED_PAIR:
                raise ValueError("pair can't be that\nmore")
            return right(self, trios, rows, length)

        monkeypatch.setattr(Mode, "make", make)
        code, records = bench(checked=True)
        assert code == 1
        assert notes(records) == ["ours-shared-pair: failed: ValueError: pair can't be that"]
        assert {r["mode"] for r in records if r["op"] == "decode"} == {*FEW} - {SHARED_PAIR}

    def test_too_little_memory_is_said_and_no_failure(self, bench, monkeypatch):
        # Nothing of that size may be built here, whatever goes wrong.
        monkeypatch.setattr(decoder_run, "build_trios", lambda *arguments: pytest.fail("built"))
        monkeypatch.setattr(CpuDevice, "memory_bytes", 80_000_000_000)
        code, records = bench(trios=(TRIOS["70b"],))
        assert code == 0
        assert notes(records) == ["70b: not run: the weights take 96.5 GB, the device has 80.0 GB"]

    def test_memory_that_runs_out(self, bench, monkeypatch):
        right = Mode.make

        def make(self, trios, rows, length):
            if self.name == EAGER and length == decoder_run._MAX_SEQ_LEN:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return right(self, trios, rows, length)

        monkeypatch.setattr(Mode, "make", make)
        code, records = bench()
        assert code == 0
        assert notes(records) == [
            "13b, batch 1: ours-eager: not run, the device's memory does not suffice"
        ]

        def full(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(decoder_run, "build_trios", full)
        code, records = bench()
        assert code == 0
        assert notes(records) == ["13b: not run, the device's memory does not suffice"]

    def test_out_of_time(self, bench):
        code, records = bench(trios=(TINY, TINY), seconds=150.0)
        assert code == 0
        # the first trio leaves 90 s for the second
        assert notes(records)[0] == "13b: not run for lack of time"
        assert [r["batch_size"] for r in records if r["op"] == "decode"] != []

    def test_a_lost_device_ends_the_run(self, bench, monkeypatch):
        device = CpuDevice()

        def fail(*arguments):
            device.lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(decoder_run, "time_modes", fail)
        code, records = bench(device=device)
        assert code == 1
        assert notes(records)[-1].startswith("13b, batch 1: the device is lost: RuntimeError")
        assert notes(records)[-1].endswith("; nothing more is measured")

    def test_nothing_runs_on_the_device_when_the_profile_begins(self, bench, monkeypatch):
        log = []
        record = trace.record

        def logged(*arguments):
            log.append("profile")
            return record(*arguments)

        monkeypatch.setattr(CpuDevice, "synchronize", lambda self: log.append("wait"))
        monkeypatch.setattr(trace, "record", logged)
        bench()
        assert log == ["wait", "profile"]

    def test_a_step_that_synchronises(self, bench, monkeypatch, synchronisation):
        right = profiling._steps

        def steps(events):
            if synchronisation.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            right(events)

        monkeypatch.setattr(profiling, "_steps", steps)
        code, records = bench()
        assert code == 0
        [checked] = [r for r in records if r["op"] == "synchronisation"]
        assert checked["raised"] == "RuntimeError: called a synchronizing CUDA operation"
        assert synchronisation.mode == 0


class TestChecks:
    def test_speculation_that_changes_sampled_tokens(self, monkeypatch):
        monkeypatch.setattr(checks, "_TOKENS", 6)
        found = Checks("cpu")
        mode = MODES[speculative(4)]
        assert not found.check(mode).failed
        right = DecoderProvider.generate

        def wrong(self, prompts, max_tokens, *, greedy=False):
            generation = right(self, prompts, max_tokens, greedy=greedy)
            if not greedy:
                generation.token_ids[2][5] += 1
            return generation

        monkeypatch.setattr(DecoderProvider, "generate", wrong)
        outcome = found.check(mode)
        assert outcome.failed
        assert outcome.sentence.count("where plain decoding has") == 1
        assert "prompt 2: " in outcome.sentence

    def test_differences_in_bf16_are_reported(self, monkeypatch):
        monkeypatch.setattr(checks, "_TOKENS", 6)
        right = DecoderProvider.generate

        def wrong(self, prompts, max_tokens, *, greedy=False):
            generation = right(self, prompts, max_tokens, greedy=greedy)
            if self.trio.base.dtype == torch.bfloat16:
                generation.token_ids[3][0] = 0  # <pad>, which no model gives
            return generation

        monkeypatch.setattr(DecoderProvider, "generate", wrong)
        outcome = Checks("cpu").check(MODES[OURS])
        assert not outcome.failed
        assert outcome.sentence == (
            "ours: greedy tokens are the naive loop's, 0 ties; in bf16 those of 3 of 4 texts, and "
            "1 leave them by more than the naive loop's own rounding."
        )
        [mismatch] = outcome.fields["bf16"]
        assert "prompt 3, position 0: token 0" in mismatch

    def test_the_shared_pair_has_another_expert(self):
        trios = checks.shipped_trios("cpu", "float32")
        assert trios[SHARED].anti is trios[SEPARATE].anti
        assert any("lora" in name for name, _ in trios[SHARED].expert.named_parameters())
        assert not any("lora" in name for name, _ in trios[SEPARATE].expert.named_parameters())


class TestBuild:
    def test_trios(self):
        trios = build_trios(TINY, "cpu")
        separate, shared = trios[SEPARATE], trios[SHARED]
        assert shared.base is separate.base
        assert shared.anti is separate.anti
        assert separate.vocab_size == 300
        weights = [m.get_output_embeddings().weight for m in separate.models.values()]
        assert not torch.equal(weights[1], weights[2])
        record = build.weights_record(TINY, trios)
        assert record["bytes"]["expert"] == record["bytes"]["anti"] < record["bytes"]["base"]
        adapter = record["bytes"]["shared pair"] - record["bytes"]["anti"]
        assert 0 < adapter == record["step_bytes"]["shared pair"] - record["step_bytes"]["anti"]
        # keys and values of 2 and 3 layers of 2 heads, of 8 and 12 channels of 2 bytes
        assert record["cache_bytes_per_token"] == {
            "base": 2 * 3 * 2 * 12 * 2,
            "expert": 2 * 2 * 2 * 8 * 2,
            "anti": 2 * 2 * 2 * 8 * 2,
        }

    def test_a_base_in_int8(self, monkeypatch):
        asked = []

        def int8_linear(layer):
            asked.append(layer)
            return layer

        monkeypatch.setattr(build, "int8_linear", int8_linear)
        build_trios(TrioShape("70b", "Tiny", BASE, PAIR, INT8), "cpu")
        assert len(asked) == 3 * 7
        build_trios(TINY, "cpu")
        assert len(asked) == 3 * 7

    def test_a_layer_in_int8(self):
        pytest.importorskip("torchao", reason="weights in int8 need the extra quant")
        layer = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
        x, wanted = torch.eye(64, dtype=torch.bfloat16), layer.weight.detach().T.clone()
        quantised = build.int8_linear(layer)
        assert isinstance(quantised, torch.nn.Linear)
        # a byte a weight, and a few for a row's scale
        assert 64 * 32 < weight_bytes([quantised]) <= 64 * 32 + 32 * 8
        # half a step of 2 / 254 of a row's largest, the row's scale and the product in bf16 (2^-8)
        bound = wanted.abs().amax(0) * (1 / 254 + 2**-7)
        assert ((quantised(x) - wanted).abs() <= bound).all()

    def test_without_torchao(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchao", None)
        monkeypatch.setitem(sys.modules, "torchao.quantization", None)
        with pytest.raises(QuantizationError, match="int8 needs torchao"):
            build.int8_linear(torch.nn.Linear(64, 32, bias=False))


class TestCommand:
    @staticmethod
    def invoke(*arguments):
        import typer
        from typer.testing import CliRunner

        app = typer.Typer()
        app.command()(command.main)
        return CliRunner().invoke(app, ["--decoder", *arguments])

    def test_no_device(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        result = self.invoke()
        assert result.exit_code == 2
        assert result.stderr.startswith("benchmarks.gpu: no CUDA device: torch ")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--trios", "7b"], "--trios must be among 13b, 70b, got '7b'"),
            (["--batch-sizes", "8"], "--batch-sizes must be among 1, 4, 16, got '8'"),
            (["--stage", "check"], "--stage does not go with --decoder"),
            (["--workers", "2"], "--workers does not go with --decoder"),
            (["--vocab-sizes", "32000"], "--vocab-sizes does not go with --decoder"),
        ],
    )
    def test_wrong_option(self, arguments, message):
        result = self.invoke(*arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("│", "").split())

    def test_trios_without_the_decoder(self):
        import typer
        from typer.testing import CliRunner

        app = typer.Typer()
        app.command()(command.main)
        result = CliRunner().invoke(app, ["--trios", "13b"])
        assert result.exit_code == 2
        assert "--trios goes with --decoder only" in result.stderr

    def test_a_package_that_is_missing(self, monkeypatch):
        monkeypatch.setattr(command, "find_device", CpuDevice)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        result = self.invoke()
        assert result.exit_code == 2
        assert result.stderr == (
            "benchmarks.gpu: --decoder needs transformers: "
            "pip install 'proxytune_kernels[hf,lora]'\n"
        )

    def test_options_reach_the_run(self, monkeypatch):
        given = []

        def run(*arguments):
            given.append(arguments)
            return 1

        monkeypatch.setattr(command, "find_device", CpuDevice)
        monkeypatch.setattr(decoder_run, "run", run)
        result = self.invoke("--trios", "70b,13b", "--batch-sizes", "4,1", "--no-plot")
        assert result.exit_code == 1
        [(_, options, budget)] = given
        assert options.trios == (TRIOS["13b"], TRIOS["70b"])
        assert options.batch_sizes == (1, 4)
        assert options.output.name == "gpu-decoder-test-1-gb.jsonl"
        assert not options.plot
        assert 500 < budget.left() <= 540
        self.invoke()
        assert given[1][1].batch_sizes == (1, 4, 16)
