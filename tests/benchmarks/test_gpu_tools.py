"""The programs around ``python -m benchmarks.gpu``: pytest, ncu, compute-sanitizer."""

import os
import stat
import sys
import time
from typing import Any

import pytest
import torch

import proxytune_kernels as ptk
from benchmarks.gpu import contract, driver, tools
from benchmarks.gpu.contract import parse_junit, run_contract
from benchmarks.gpu.process import run_process
from benchmarks.gpu.tools import ToolFailed, parse_ncu, parse_sanitizer
from tests.benchmarks.gpu_device import CpuDevice

NCU = """\
==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "_scan_kernel": 0%....50%....100% - 1 pass
==PROF== Profiling "_select_kernel": 0%....50%....100% - 1 pass
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","4711","python3.12","127.0.0.1","_scan_kernel","1","7","(128, 1, 1)","(256, 126, 1)","0",\
"9.0","Command line profiler metrics","dram__bytes_read.sum","byte","197,001,216"
"1","4711","python3.12","127.0.0.1","_select_kernel<int, (bool)1>","1","7","(256, 1, 1)",\
"(256, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes_read.sum","byte","998784"
"""

MEMCHECK = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: {} error{}\n"
RACECHECK = (
    "========= COMPUTE-SANITIZER\n"
    "========= RACECHECK SUMMARY: {} hazard{} displayed (0 errors, 0 warnings)\n"
)


class TestNcu:
    def test_kernels(self):
        assert parse_ncu(NCU) == [
            {"kernel": "_scan_kernel", "bytes": 197_001_216},
            {"kernel": "_select_kernel<int, (bool)1>", "bytes": 998_784},
        ]

    def test_another_unit(self):
        with pytest.raises(ToolFailed, match="'Mbyte', not in bytes"):
            parse_ncu(NCU.replace('"byte"', '"Mbyte"'))

    def test_no_permission(self):
        said = (
            "==PROF== Connected to process 1\n"
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access them.\n"
            "==PROF== Disconnected from process 1\n"
        )
        with pytest.raises(ToolFailed, match="^==ERROR== ERR_NVGPUCTRPERM"):
            parse_ncu(said)

    @pytest.mark.parametrize("said", ["", "==WARNING== No kernels were profiled.\n"])
    def test_nothing(self, said):
        with pytest.raises(ToolFailed, match="it said nothing|No kernels"):
            parse_ncu(said)


class TestSanitizer:
    @pytest.mark.parametrize(
        ("said", "errors"),
        [
            (MEMCHECK.format(0, "s"), 0),
            (MEMCHECK.format(1, ""), 1),
            (RACECHECK.format(0, "s"), 0),
            (RACECHECK.format(12, "s"), 12),
            (MEMCHECK.format(1, "") + MEMCHECK.format(2, "s"), 3),
        ],
    )
    def test_summary(self, said, errors):
        assert parse_sanitizer(said) == errors

    @pytest.mark.parametrize(
        ("said", "last"),
        [
            ("========= Error: Device not supported\n=== bye\n", "Device not supported"),
            ("", "it said nothing"),
            ("Traceback (most recent call last):\nNameError: x\n" + MEMCHECK.format(0, "s"),
             "ERROR SUMMARY|NameError"),
        ],
    )  # fmt: skip
    def test_no_summary(self, said, last):
        with pytest.raises(ToolFailed, match=last):
            parse_sanitizer(said)


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Put a program on the PATH that prints a text and the arguments it was given."""

    def make(name: str, text: str) -> None:
        said = tmp_path / f"{name}.txt"
        said.write_text(text)
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\ncat {said}\necho "$@" >> {tmp_path}/asked\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return make


@pytest.fixture
def no_tools(monkeypatch):
    monkeypatch.setattr(tools, "find_tool", lambda name: None)


class TestProfile:
    def test_ratio(self, tool, tmp_path):
        tool("ncu", NCU)
        outcome = tools.profile(60.0)
        assert not outcome.failed
        none, top_p = outcome.fields["cases"]
        assert (none["filters"], top_p["filters"]) == ("none", "top_p")
        logits = 3 * 256 * 128_256 * 2
        assert none["dram_bytes_read"] == 198_000_000
        assert none["ratio"] == pytest.approx(198_000_000 / logits)
        assert "198.0 MB read from DRAM, 1.005 of its logits" in outcome.sentence
        first, _ = (tmp_path / "asked").read_text().splitlines()
        assert "--cache-control none --clock-control none" in first
        assert "--metrics dram__bytes_read.sum" in first
        assert first.endswith("-m benchmarks.gpu.driver profile ours none 128256 256")

    def test_each_provider_of_ours(self, tool, tmp_path):
        tool("ncu", NCU)
        outcome = tools.profile(60.0, ("ours", "cuda"))
        profiled = [(c["provider"], c["filters"]) for c in outcome.fields["cases"]]
        assert profiled == [(p, f) for p in ("ours", "cuda") for f in ("none", "top_p")]
        last = (tmp_path / "asked").read_text().splitlines()[-1]
        assert last.endswith("-m benchmarks.gpu.driver profile cuda top_p 128256 256")

    def test_failure(self, tool):
        tool("ncu", "==ERROR== no\n")
        outcome = tools.profile(60.0)
        assert outcome.failed
        assert (
            "ncu failed on ours: sample peaked none V=128256 B=256: ==ERROR== no"
            in outcome.sentence
        )

    @pytest.mark.usefixtures("no_tools")
    def test_missing(self):
        outcome = tools.profile(60.0)
        assert (outcome.sentence, outcome.failed) == (
            "Profile: not run, ncu is not installed.",
            False,
        )


class TestSanitize:
    def test_clean(self, tool, tmp_path):
        tool("compute-sanitizer", MEMCHECK.format(0, "s"))
        outcome = tools.sanitize(60.0)
        assert not outcome.failed
        found = ["memcheck", "racecheck", "initcheck", "synccheck"]
        assert outcome.fields["errors"] == dict.fromkeys(found, 0)
        asked = (tmp_path / "asked").read_text().splitlines()
        assert [line.split()[1] for line in asked] == found

    def test_errors_and_failures(self, tool):
        tool("compute-sanitizer", MEMCHECK.format(3, "s"))
        assert tools.sanitize(60.0).failed
        tool("compute-sanitizer", "Device not supported\n")
        outcome = tools.sanitize(60.0)
        assert outcome.failed
        assert set(outcome.fields["errors"].values()) == {None}

    @pytest.mark.usefixtures("no_tools")
    def test_missing(self):
        assert "compute-sanitizer is not installed" in tools.sanitize(60.0).sentence


def test_find_tool(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(tools, "_PLACES", (str(tmp_path / "nsight" / "*"),))
    assert tools.find_tool("ncu") is None
    for release in ("2024.1", "2025.3"):
        folder = tmp_path / "nsight" / release
        folder.mkdir(parents=True)
        (folder / "ncu").touch(mode=0o755)
    (tmp_path / "nsight" / "2026.1").mkdir()
    assert tools.find_tool("ncu") == str(tmp_path / "nsight" / "2025.3" / "ncu")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ncu").touch(mode=0o755)
    assert tools.find_tool("ncu") == str(tmp_path / "bin" / "ncu")


class TestDriver:
    @pytest.mark.parametrize("reason", (None, "not built"))
    def test_sanitize_calls_everything(self, monkeypatch, reason):
        """CUDA C++'s too, where it is usable: at widths for clusters of one block and of more."""
        called: list[Any] = []
        widths: set[Any] = set()
        backend = CpuDevice.backend
        monkeypatch.setattr(CpuDevice, "cuda_backend", "reference")
        monkeypatch.setattr(ptk, "backends", lambda: {backend: None, "reference": reason})
        monkeypatch.setattr(driver, "_CLUSTER_VOCAB_SIZES", (500, 3000))
        for name in ("sample", "verify", "score", "combine"):
            right = getattr(ptk, name)

            def spy(*arguments, _name=name, _right=right, **options):
                called.append((_name, options.get("mode")))
                widths.add((options["backend"], arguments[0].shape[-1]))
                return _right(*arguments, **options)

            monkeypatch.setattr(ptk, name, spy)
        driver.sanitize(CpuDevice())
        assert set(called) == {
            ("sample", None), ("verify", "coupled"), ("verify", "rejection"),
            ("score", None), ("combine", None),
        }  # fmt: skip
        assert called.count(("sample", None)) == (4 if reason is None else 2) * 2 * 3
        assert {w for b, w in widths if b == backend} == {1000, 4096}
        assert {w for b, w in widths if b == "reference"} == (
            {500, 3000} if reason is None else set()
        )

    def test_awkward_logits(self):
        base, expert, anti = driver.awkward_logits("peaked", 3, 1000, "cpu")
        x = base.float() + (expert.float() - anti.float())
        assert len(x[0].unique()) < 100
        assert x[1].isinf().sum() == 500
        assert x[2].isnan().sum() == 1

    def test_wrong_argument(self, monkeypatch):
        monkeypatch.setattr(driver, "find_device", CpuDevice)
        with pytest.raises(ValueError, match="must be profile or sanitize, got 'x'"):
            driver.main(["x", "ours", "none", "1", "1"])
        with pytest.raises(ValueError, match="the provider must be one of .*, got 'theirs'"):
            driver.main(["profile", "theirs", "none", "1", "1"])

    @pytest.mark.parametrize("provider", ("ours", "cuda"))
    def test_profile(self, monkeypatch, provider):
        """One call between the profiler's start and stop, after one outside."""
        events = []

        class Profiler:
            def __enter__(self):
                events.append("start")

            def __exit__(self, *_):
                events.append("stop")

        right = ptk.sample

        def spy(*arguments, **options):
            events.append("sample")
            return right(*arguments, **options)

        monkeypatch.setattr(torch.cuda.profiler, "profile", Profiler)
        monkeypatch.setattr(ptk, "sample", spy)
        monkeypatch.setattr(driver, "find_device", CpuDevice)
        driver.main(["profile", provider, "top_p", "300", "2"])
        assert events == ["sample", "start", "sample", "stop"]


class TestRunProcess:
    def test_output_and_code(self):
        script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
        code, output = run_process([sys.executable, "-c", script], 60.0)
        assert code == 3
        assert sorted(output.split()) == ["err", "out"]

    def test_limit_ends_all_that_it_started(self, tmp_path):
        """A grandchild would write the file after the limit."""
        late = tmp_path / "late"
        start = time.monotonic()
        code, _ = run_process(["sh", "-c", f"(sleep 1; touch {late}) & sleep 30"], 0.3)
        assert code is None
        assert time.monotonic() - start < 5
        time.sleep(1.2)
        assert not late.exists()

    def test_environment(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        script = "import os; print(os.environ.get('TRITON_INTERPRET'), os.environ['X'])"
        assert run_process([sys.executable, "-c", script], 60.0, {"X": "y"}) == (0, "None y\n")


SUITE = """\
import pytest

@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_good(backend):
    assert backend == "triton"

@pytest.mark.parametrize("backend", ["triton"])
def test_skipped(backend):
    pytest.skip("why not")
"""
BAD = """
@pytest.mark.parametrize("backend", ["triton"])
def test_bad(backend):
    assert backend == "other"
"""


class TestContract:
    @pytest.fixture
    def suite(self, tmp_path):
        def go(text, backend="triton", limit=60.0):
            (tmp_path / "tests").mkdir(exist_ok=True)
            (tmp_path / "tests" / "test_suite.py").write_text(text)
            log = tmp_path / "out" / "contract.log"
            return run_contract(backend, 1, limit, log, tmp_path / "tests"), log

        return go

    def test_good(self, suite):
        outcome, log = suite(SUITE)
        assert not outcome.failed
        assert (outcome.fields["passed"], outcome.fields["skipped"]) == (1, 1)
        assert outcome.sentence.startswith("Contract suite: 1 passed, 0 failed, 1 skipped in ")
        assert "1 passed" in log.read_text()

    def test_bad(self, suite):
        outcome, _ = suite(SUITE + BAD)
        assert outcome.failed
        [failure] = outcome.fields["failures"]
        assert "test_bad[triton]: AssertionError: assert 'triton' == 'other'" in failure
        assert failure in outcome.sentence

    def test_does_not_collect(self, suite):
        outcome, _ = suite("import nothing_of_that_name")
        assert outcome.failed
        assert "ModuleNotFoundError: No module named 'nothing_of_that_name'" in outcome.sentence

    def test_none_selected(self, suite):
        outcome, _ = suite(SUITE, backend="tritium")
        assert outcome.failed
        assert outcome.sentence == "Contract suite: no test has tritium in its name."

    def test_all_skipped_is_no_pass(self, suite):
        outcome, _ = suite(SUITE.split("@pytest")[0] + "@pytest" + SUITE.split("@pytest")[2])
        assert outcome.fields["skipped"] == 1
        assert outcome.failed

    def test_too_slow(self, suite):
        outcome, log = suite("def test_triton():\n    import time; time.sleep(60)\n", limit=3.0)
        assert outcome.failed
        assert f"stopped after 3 s, before its end (output: {log})" in outcome.sentence
        assert outcome.fields == {"finished": False}

    def test_no_pytest(self, monkeypatch, suite):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        outcome, _ = suite(SUITE)
        assert outcome.failed
        assert "pytest is not installed" in outcome.sentence

    def test_junit_counts_errors_at_setup(self):
        result = parse_junit(
            '<testsuites><testsuite time="1.5"><testcase classname="a" name="b">'
            '<error message="boom&#10;more"/></testcase><testcase/></testsuite></testsuites>'
        )
        assert (result.passed, result.failures, result.seconds) == (1, ("a::b: boom",), 1.5)


class TestBuild:
    def test_there(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        outcome = contract.build_extension(60.0)
        assert (outcome.sentence, outcome.failed) == ("The C++ extensions are there.", False)

    def test_without_nvcc_one_is_wanted(self, monkeypatch):
        monkeypatch.setenv("PROXYTUNE_SKIP_CUDA_BUILD", "1")
        assert contract.wanted_extensions() == ("proxytune_kernels._cpu",)

    def test_one_of_two_is_missing(self, monkeypatch):
        both = ("proxytune_kernels._cpu", "proxytune_kernels._cuda")
        monkeypatch.setattr(contract, "wanted_extensions", lambda: both)
        found = {both[0]: object(), both[1]: None}
        monkeypatch.setattr("importlib.util.find_spec", found.get)
        monkeypatch.setattr(contract, "run_process", lambda *arguments: (0, ""))
        assert contract.build_extension(60.0).sentence == "Built proxytune_kernels._cuda."

    def test_left_out(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setenv("PROXYTUNE_SKIP_EXT", "1")
        outcome = contract.build_extension(60.0)
        assert not outcome.failed
        assert outcome.sentence == "Left out for PROXYTUNE_SKIP_EXT=1: proxytune_kernels._cpu."

    @pytest.mark.parametrize(
        ("ended", "failed", "sentence"),
        [
            ((0, "lots"), False, "Built proxytune_kernels._cpu."),
            ((1, "a\nb"), True, "Building the C++ extensions failed with exit code 1:\na\nb"),
            ((None, ""), True, "Building the C++ extensions did not end in time:\n"),
        ],
    )  # fmt: skip
    def test_built(self, monkeypatch, ended, failed, sentence):
        asked: list[Any] = []
        monkeypatch.setenv("PROXYTUNE_SKIP_CUDA_BUILD", "1")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.delenv("PROXYTUNE_SKIP_EXT", raising=False)

        def run_process(*arguments):
            asked.append(arguments)
            return ended

        monkeypatch.setattr(contract, "run_process", run_process)
        outcome = contract.build_extension(60.0)
        assert (outcome.sentence, outcome.failed) == (sentence, failed)
        assert asked[0][0][1:] == ["setup.py", "build_ext", "--inplace"]
