"""What runs before anything is timed: the extension's build, and the contract suite."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import build_cuda
from benchmarks.environment import REPOSITORY
from benchmarks.gpu.process import run_process, tail

_NAMED = 20  # failures that are named; the log has all
_NO_TESTS = 5  # pytest's exit code where nothing was selected


@dataclass(frozen=True)
class Outcome:
    """How a stage went: ``failed`` makes the command's exit code 1."""

    sentence: str
    failed: bool
    fields: Mapping[str, Any]


def wanted_extensions() -> tuple[str, ...]:
    """Modules that a build here makes."""
    try:
        build_cuda.toolchain()
    except build_cuda.Unavailable:
        return ("proxytune_kernels._cpu",)
    return ("proxytune_kernels._cpu", "proxytune_kernels._cuda")


def build_extension(limit_seconds: float) -> Outcome:
    """Build the C++ extensions in place, where one is missing and wanted.

    In a process of its own: this one has already tried to import them.
    """
    missing = [name for name in wanted_extensions() if importlib.util.find_spec(name) is None]
    if not missing:
        return Outcome("The C++ extensions are there.", False, {"built": False})
    if os.environ.get("PROXYTUNE_SKIP_EXT") == "1":
        return Outcome(
            f"Left out for PROXYTUNE_SKIP_EXT=1: {', '.join(missing)}.",
            False,
            {"built": False},
        )
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code, output = run_process(command, limit_seconds)
    if code == 0:
        return Outcome(f"Built {', '.join(missing)}.", False, {"built": True})
    why = "did not end in time" if code is None else f"failed with exit code {code}"
    return Outcome(f"Building the C++ extensions {why}:\n{tail(output)}", True, {"built": False})


def run_contract(
    backend: str,
    workers: int,
    limit_seconds: float,
    log: Path,
    tests: Path = REPOSITORY / "tests" / "ops",
) -> Outcome:
    """Run every test of a backend under pytest, in processes of their own.

    Args:
        backend: its name selects the tests (``-k``); ``triton or cuda`` those of both.
        workers: processes, where pytest-xdist is installed; they share the device.
        limit_seconds: after which it is stopped; that counts as failed.
        log: where pytest's output goes.
        tests: the suite.
    """
    if importlib.util.find_spec("pytest") is None:
        return Outcome("Contract suite: not run, pytest is not installed.", True, {})
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory) / "junit.xml"
        command = [
            *(sys.executable, "-m", "pytest", str(tests), "-k", backend),
            *("-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={junit}"),
        ]
        if workers > 1 and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(workers)]
        code, output = run_process(command, limit_seconds, {"OMP_NUM_THREADS": "1"})
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(output)
        if code is None:
            sentence = f"stopped after {limit_seconds:.0f} s, before its end (output: {log})"
            return Outcome(f"Contract suite: {sentence}.", True, {"finished": False})
        if code == _NO_TESTS:
            return Outcome(f"Contract suite: no test has {backend} in its name.", True, {})
        if not junit.exists():
            sentence = f"pytest ended with code {code} and no report (output: {log})"
            return Outcome(f"Contract suite: {sentence}:\n{tail(output)}", True, {})
        result = parse_junit(junit.read_text())
    failed = code != 0 or bool(result.failures) or result.passed == 0
    return Outcome(
        result.sentence(log), failed, {"finished": True, "log": log.name, **asdict(result)}
    )


@dataclass(frozen=True)
class Result:
    """What a junit report says."""

    passed: int
    skipped: int
    failures: tuple[str, ...]
    """Names of tests that failed or broke, each with the first line of its message."""
    seconds: float

    def sentence(self, log: Path) -> str:
        """For the terminal."""
        text = (
            f"Contract suite: {self.passed} passed, {len(self.failures)} failed, {self.skipped} "
            f"skipped in {self.seconds:.0f} s (output: {log})."
        )
        return "\n".join([text, *self.failures[:_NAMED]])


def parse_junit(text: str) -> Result:
    """Read a junit report of pytest."""
    passed = skipped = 0
    failures: list[str] = []
    seconds = 0.0
    for suite in ElementTree.fromstring(text).iter("testsuite"):
        seconds += float(suite.get("time", "0"))
        for case in suite.iter("testcase"):
            bad = [child for child in case if child.tag in ("failure", "error")]
            if bad:
                failures.append(f"{case.get('classname')}::{case.get('name')}: {_why(bad[0])}")
            elif case.find("skipped") is not None:
                skipped += 1
            else:
                passed += 1
    return Result(passed, skipped, tuple(failures), seconds)


def _why(failure: ElementTree.Element) -> str:
    """One line: the last that pytest marks as the error, else the message."""
    marked = [line for line in (failure.text or "").splitlines() if line.startswith("E ")]
    message = (failure.get("message") or "no message").strip().splitlines()
    return marked[-1][1:].strip() if marked and message[0] == "collection failure" else message[0]
