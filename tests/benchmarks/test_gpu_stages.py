"""The stages of ``python -m benchmarks.gpu`` that are other programs, and what they say."""

import sys
import time

import pytest

import proxytune_kernels as ptk
from benchmarks.gpu import driver, stages
from benchmarks.gpu.stages import ToolFailed, parse_ncu, parse_sanitizer, run_contract, run_process

NCU = """\
==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "_scan_kernel": 0%....50%....100% - 1 pass
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


def test_bytes_by_kernel():
    assert parse_ncu(NCU) == [
        {"kernel": "_scan_kernel", "bytes": 197_001_216},
        {"kernel": "_select_kernel<int, (bool)1>", "bytes": 998_784},
    ]


@pytest.mark.parametrize(
    ("said", "last"),
    [
        (NCU.replace('"byte"', '"Mbyte"'), "'Mbyte', not in bytes"),
        (
            "==PROF== x\n==ERROR== ERR_NVGPUCTRPERM - no\n==PROF== y\n",
            "^==ERROR== ERR_NVGPUCTRPERM",
        ),
        ("==WARNING== No kernels were profiled.\n", "No kernels"),
        ("", "it said nothing"),
    ],
)
def test_ncu_without_figures(said, last):
    with pytest.raises(ToolFailed, match=last):
        parse_ncu(said)


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
def test_errors_of_a_sanitizer(said, errors):
    assert parse_sanitizer(said) == errors


@pytest.mark.parametrize(
    "said",
    [
        "========= Error: Device not supported\n=== bye\n",
        "Traceback (most recent call last):\nNameError: x\n" + MEMCHECK.format(0, "s"),
        "",
    ],
)
def test_a_sanitizer_without_a_summary(said):
    with pytest.raises(ToolFailed):
        parse_sanitizer(said)


def test_a_program_of_the_path_is_profiled(monkeypatch, tmp_path):
    """The command, and the ratio of what it read to the logits."""
    said, ncu = tmp_path / "said", tmp_path / "ncu"
    said.write_text(NCU)
    ncu.write_text(f'#!/bin/sh\ncat {said}\necho "$@" >> {tmp_path}/asked\n')
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    outcome = stages.profile(60.0, ("ours", "cuda"))
    assert not outcome.failed
    cases = outcome.fields["cases"]
    wanted = [(p, f) for p in ("ours", "cuda") for f in ("none", "top_p")]
    assert [(c["provider"], c["filters"]) for c in cases] == wanted
    assert cases[0]["ratio"] == pytest.approx(198_000_000 / (3 * 256 * 128_256 * 2))
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "--metrics dram__bytes_read.sum" in asked[0]
    assert asked[3].endswith("-m benchmarks.gpu.driver profile cuda top_p 128256 256")
    said.write_text("==ERROR== no\n")
    failed = stages.profile(60.0, ("ours",))
    wrong = "ncu failed on ours: sample peaked none V=128256 B=256: ==ERROR== no"
    assert failed.failed and wrong in failed.sentence


def test_tools_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(stages, "_PLACES", (str(tmp_path / "nsight" / "*"),))
    assert stages.find_tool("ncu") is None
    assert "ncu is not installed" in stages.profile(9.0, ("ours",)).sentence
    for release in ("2024.1", "2025.3", "bin"):
        folder = tmp_path / ("bin" if release == "bin" else f"nsight/{release}")
        folder.mkdir(parents=True)
        (folder / "ncu").touch(mode=0o755)
        assert stages.find_tool("ncu") == str(folder / "ncu")


def test_what_sanitizers_watch():
    base, expert, anti = driver.awkward_logits("peaked", 9, 1000, "cpu")
    x = base.float() + (expert.float() - anti.float())
    assert len(x[0].unique()) < 100
    assert (int(x[1].isinf().sum()), int(x[2].isnan().sum())) == (500, 1)
    backend = "cpu" if ptk.backends()["cpu"] is None else "reference"
    driver.call_operators("cpu", backend, 1000, "flat", every=True)
    with pytest.raises(ValueError, match="must be profile or sanitize, got 'x'"):
        driver.main(["x", "ours", "none", "1", "1"])


def test_a_program_and_its_limit(tmp_path, monkeypatch):
    """A grandchild would write the file after the limit."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    script = (
        "import os, sys; print(os.environ.get('TRITON_INTERPRET'), os.environ['X']); sys.exit(3)"
    )
    assert run_process([sys.executable, "-c", script], 60.0, {"X": "y"}) == (3, "None y\n")
    late, start = tmp_path / "late", time.monotonic()
    code, _ = run_process(["sh", "-c", f"(sleep 1; touch {late}) & sleep 30"], 0.3)
    assert code is None
    assert time.monotonic() - start < 5
    time.sleep(1.2)
    assert not late.exists()


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


@pytest.fixture
def suite(tmp_path):
    def go(text, backend="triton", limit=60.0):
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / "test_suite.py").write_text(text)
        return run_contract(backend, 1, limit, tmp_path / "out" / "log", tmp_path / "tests")

    return go


def test_the_suite_passes(suite):
    outcome = suite(SUITE)
    assert not outcome.failed
    assert outcome.fields["counts"] == {"passed": 1, "skipped": 1, "deselected": 1}
    assert outcome.sentence.startswith("Contract suite: 1 passed, 1 skipped, 1 deselected (output")


@pytest.mark.parametrize(
    ("text", "backend", "limit", "said"),
    [
        (SUITE + BAD, "triton", 60.0, "test_bad[triton] - AssertionError: assert 'triton' =="),
        ("import nothing_of_that_name", "triton", 60.0, "ERROR"),
        (SUITE, "tritium", 60.0, "Contract suite: no test has tritium in its name."),
        (SUITE.replace('"triton"\n', '"x"; pytest.skip()\n'), "skipped", 60.0, "1 skipped"),
        ("def test_cpu():\n    import time; time.sleep(60)\n", "cpu", 2.0, "stopped after 2 s"),
    ],
)
def test_the_suite_fails(suite, text, backend, limit, said):
    outcome = suite(text, backend, limit)
    assert outcome.failed
    assert said in outcome.sentence


@pytest.mark.parametrize(
    ("ended", "failed", "sentence"),
    [
        ((0, "lots"), False, "Built proxytune_kernels._cpu."),
        ((1, "a\nb"), True, "Building the C++ extensions failed with exit code 1:\na\nb"),
        ((None, ""), True, "Building the C++ extensions did not end in time:\n"),
    ],
)
def test_build(monkeypatch, ended, failed, sentence):
    assert stages.build_extension(1.0).sentence == "The C++ extensions are there."
    monkeypatch.setenv("PROXYTUNE_SKIP_CUDA_BUILD", "1")
    assert stages.wanted_extensions() == ["proxytune_kernels._cpu"]
    monkeypatch.setattr(stages, "find_spec", lambda name: None)
    monkeypatch.setattr(stages, "run_process", lambda *arguments: ended)
    outcome = stages.build_extension(60.0)
    assert (outcome.sentence, outcome.failed) == (sentence, failed)
    monkeypatch.setenv("PROXYTUNE_SKIP_EXT", "1")
    assert stages.build_extension(60.0).sentence.startswith("Left out for PROXYTUNE_SKIP_EXT=1: ")
