"""The stages that are other programs: the build, the contract suite, NVIDIA's tools."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import build_cuda
from benchmarks.gpu.cases import Case
from benchmarks.gpu.session import Outcome
from benchmarks.harness.report import REPOSITORY

METRIC = "dram__bytes_read.sum"
PROFILED = (Case(filters="none"), Case(filters="top_p"))
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

_NAMED = 20  # failures that are named; the log has all
_NO_TESTS = 5  # pytest's exit code where nothing was selected
_PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")
_DRIVER = (sys.executable, "-m", "benchmarks.gpu.driver")


def run_process(
    command: Sequence[str], limit_seconds: float, extra: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Run a program in the repository, with ``extra`` variables; kill all of it at the limit.

    Returns:
        Its exit code, None where it was killed, and all it said on both streams.
    """
    # TRITON_INTERPRET=1 would run the kernels on the processor.
    environ = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environ, **(extra or {})},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return code, output.read().decode(errors="replace")


def tail(output: str, lines: int = 15) -> str:
    """The last lines of what a program said."""
    return "\n".join(output.strip().splitlines()[-lines:])


def wanted_extensions() -> list[str]:
    """Modules that a build here makes."""
    try:
        build_cuda.toolchain()
    except build_cuda.Unavailable:
        return ["proxytune_kernels._cpu"]
    return ["proxytune_kernels._cpu", "proxytune_kernels._cuda"]


def build_extension(limit_seconds: float) -> Outcome:
    """Build the C++ extensions in place, where one is missing and wanted.

    In a process of its own: this one has already tried to import them.
    """
    missing = ", ".join(name for name in wanted_extensions() if find_spec(name) is None)
    if not missing:
        return Outcome("The C++ extensions are there.")
    if os.environ.get("PROXYTUNE_SKIP_EXT") == "1":
        return Outcome(f"Left out for PROXYTUNE_SKIP_EXT=1: {missing}.")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code, output = run_process(command, limit_seconds)
    if code == 0:
        return Outcome(f"Built {missing}.")
    why = "did not end in time" if code is None else f"failed with exit code {code}"
    return Outcome(f"Building the C++ extensions {why}:\n{tail(output)}", failed=True)


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
    if find_spec("pytest") is None:
        return Outcome("Contract suite: not run, pytest is not installed.", failed=True)
    command = [sys.executable, "-m", "pytest", str(tests), "-k", backend]
    command += ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    if workers > 1 and find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    # Without a width pytest cuts the lines that name failures at 80 columns.
    code, output = run_process(command, limit_seconds, {"OMP_NUM_THREADS": "1", "COLUMNS": "400"})
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(output)
    counts, failures = parse_pytest(output)
    if code is None:
        said = f"stopped after {limit_seconds:.0f} s, before its end (output: {log})."
    elif code == _NO_TESTS:
        said = f"no test has {backend} in its name."
    elif not counts:
        said = f"pytest ended with code {code} and no summary (output: {log}):\n{tail(output)}"
    else:
        said = ", ".join(f"{number} {what}" for what, number in counts.items())
        said = "\n".join([f"{said} (output: {log}).", *failures[:_NAMED]])
    failed = code != 0 or not counts.get("passed")
    fields = {"finished": code is not None, "log": log.name}
    fields |= {"counts": counts, "failures": failures}
    return Outcome(f"Contract suite: {said}", failed, fields)


def parse_pytest(output: str) -> tuple[dict[str, int], list[str]]:
    """Counts of pytest's last line by outcome, and its lines of failures and errors."""
    last = tail(output, 1)
    counts = {}
    if re.search(r" in [\d.]+s", last):
        counts = {what: int(n) for n, what in re.findall(r"(\d+) ([a-z]+)(?=,| in )", last)}
    return counts, re.findall(r"^(?:FAILED|ERROR) .+$", output, re.MULTILINE)


class ToolFailed(RuntimeError):
    """A tool said nothing that can be read; the message is the end of what it said."""


def find_tool(name: str) -> str | None:
    """Path of one of NVIDIA's tools: on the PATH, or where its installers put it."""
    folders = [
        folder
        for place in map(Path, _PLACES)
        for folder in sorted(place.parent.glob(place.name), reverse=True)
    ]
    found = (str(folder / name) for folder in folders if os.access(folder / name, os.X_OK))
    return shutil.which(name) or next(found, None)


def _said(command: Sequence[str], limit_seconds: float, extra: Mapping[str, str]) -> str:
    """All a tool says; its exit code is the watched program's, or says what the text says too."""
    code, output = run_process(command, limit_seconds, extra)
    if code is None:
        raise ToolFailed(f"stopped after {limit_seconds:.0f} s")
    return output


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "Error" in line]
    return (errors or lines or ["it said nothing"])[-1].strip()


def profile(limit_seconds: float, providers: Sequence[str]) -> Outcome:
    """Bytes that ``sample`` reads from DRAM, over the bytes of its logits, by ncu.

    Caches are as in use (``--cache-control none``; the driver has filled L2 with something else),
    clocks are left alone.
    """
    ncu = find_tool("ncu")
    if ncu is None:
        return Outcome("Profile: not run, ncu is not installed.")
    options = ["--metrics", METRIC, "--csv", "--print-units", "base"]
    options += ["--profile-from-start", "off", "--cache-control", "none", "--clock-control", "none"]
    share = limit_seconds / len(PROFILED) / len(providers)
    measured: list[dict[str, Any]] = []
    sentences: list[str] = []
    for provider, case in product(providers, PROFILED):
        size = (case.filters, str(case.vocab_size), str(case.batch_size))
        try:
            said = _said([ncu, *options, *_DRIVER, "profile", provider, *size], share, {})
            kernels = parse_ncu(said)
        except ToolFailed as error:
            sentence = f"Profile: ncu failed on {provider}: {case}: {error}"
            return Outcome(sentence, failed=True, fields={"cases": measured})
        read = sum(kernel["bytes"] for kernel in kernels)
        ratio = read / case.logits_bytes
        sentences.append(
            f"Profile: {provider}: {case}: {read / 1e6:,.1f} MB read from DRAM, {ratio:.3f} of its "
            "logits."
        )
        found = {"provider": provider, "dram_bytes_read": read, "ratio": ratio, "kernels": kernels}
        measured.append({**case.record(), "logits_bytes": case.logits_bytes, **found})
    return Outcome("\n".join(sentences), fields={"cases": measured})


def parse_ncu(text: str) -> list[dict[str, Any]]:
    """Kernels and their bytes from ``ncu --csv --print-units base``, in the order they ran."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    kernels = []
    for row in csv.DictReader(lines[starts[0] :]) if starts else ():
        if row.get("Metric Name") == METRIC:
            if row["Metric Unit"] != "byte":
                raise ToolFailed(f"{METRIC} is in {row['Metric Unit']!r}, not in bytes")
            value = float(row["Metric Value"].replace(",", ""))
            kernels.append({"kernel": row["Kernel Name"], "bytes": int(value)})
    if not kernels:
        raise ToolFailed(_last_words(text))
    return kernels


def sanitize(limit_seconds: float) -> Outcome:
    """compute-sanitizer's tools, one after the other, on every operator."""
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        return Outcome("Sanitizers: not run, compute-sanitizer is not installed.")
    errors: dict[str, int | None] = {}
    sentences = []
    # Without torch's cache every tensor is an allocation of its own, with bounds to check.
    extra, share = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, limit_seconds / len(SANITIZERS)
    for tool in SANITIZERS:
        try:
            said = _said([sanitizer, "--tool", tool, *_DRIVER, "sanitize"], share, extra)
            errors[tool] = parse_sanitizer(said)
            sentences.append(f"Sanitizers: {tool}: {errors[tool]} error(s).")
        except ToolFailed as error:
            errors[tool] = None
            sentences.append(f"Sanitizers: {tool} failed: {error}")
    failed = any(count != 0 for count in errors.values())
    return Outcome("\n".join(sentences), failed, {"errors": errors})


def parse_sanitizer(text: str) -> int:
    """Number of errors, or hazards, from compute-sanitizer's summary."""
    found = re.findall(
        r"^=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text, re.MULTILINE
    )
    if not found or "Traceback (most recent call last)" in text:
        raise ToolFailed(_last_words(text))
    return sum(int(errors or hazards) for errors, hazards in found)
