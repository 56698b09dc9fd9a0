"""NVIDIA's tools around :mod:`benchmarks.gpu.driver`: bytes read from DRAM, and sanitizers."""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import OURS, SAMPLE, Case
from benchmarks.gpu.contract import Outcome
from benchmarks.gpu.process import run_process

METRIC = "dram__bytes_read.sum"
PROFILED = (Case(SAMPLE, filters="none"), Case(SAMPLE, filters="top_p"))
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

_PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")


class ToolFailed(RuntimeError):
    """A tool said nothing that can be read; the message is the end of what it said."""


def find_tool(name: str) -> str | None:
    """Path of one of NVIDIA's tools: on the PATH, or where its installers put it."""
    found = shutil.which(name)
    if found is not None:
        return found
    for place in _PLACES:
        root = Path(place)
        for folder in sorted(root.parent.glob(root.name), reverse=True):
            if os.access(folder / name, os.X_OK):
                return str(folder / name)
    return None


def profile(limit_seconds: float, providers: Sequence[str] = (OURS,)) -> Outcome:
    """Bytes that ``sample`` reads from DRAM, over the bytes of its logits, by ncu.

    Caches are as in use (``--cache-control none``; the driver has filled L2 with something else),
    clocks are left alone.
    """
    ncu = find_tool("ncu")
    if ncu is None:
        return Outcome("Profile: not run, ncu is not installed.", False, {})
    measured: list[dict[str, Any]] = []
    sentences: list[str] = []
    for provider, case in product(providers, PROFILED):
        command = [
            *(ncu, "--metrics", METRIC, "--csv", "--print-units", "base"),
            *("--profile-from-start", "off", "--cache-control", "none", "--clock-control", "none"),
            *_driver("profile", provider, case.filters, str(case.vocab_size), str(case.batch_size)),
        ]
        try:
            kernels = parse_ncu(_output(command, limit_seconds / len(PROFILED) / len(providers)))
        except ToolFailed as error:
            return Outcome(
                f"Profile: ncu failed on {provider}: {case}: {error}", True, {"cases": measured}
            )
        read = sum(kernel["bytes"] for kernel in kernels)
        ratio = read / case.logits_bytes
        sentences.append(
            f"Profile: {provider}: {case}: {read / 1e6:,.1f} MB read from DRAM, {ratio:.3f} of its "
            "logits."
        )
        measured.append(
            {
                **case.record(),
                "provider": provider,
                "dram_bytes_read": read,
                "logits_bytes": case.logits_bytes,
                "ratio": ratio,
                "kernels": kernels,
            }
        )
    return Outcome("\n".join(sentences), False, {"cases": measured})


def parse_ncu(text: str) -> list[dict[str, Any]]:
    """Kernels and their bytes from ``ncu --csv --print-units base``, in the order they ran.

    Raises:
        ToolFailed: there is no such table, or a row in another unit than bytes.
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    rows = list(csv.DictReader(lines[starts[0] :])) if starts else []
    kernels = []
    for row in rows:
        if row.get("Metric Name") != METRIC:
            continue
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
        return Outcome("Sanitizers: not run, compute-sanitizer is not installed.", False, {})
    errors: dict[str, int | None] = {}
    sentences = []
    for tool in SANITIZERS:
        command = [sanitizer, "--tool", tool, *_driver("sanitize")]
        # Without torch's cache every tensor is an allocation of its own, with bounds to check.
        extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            errors[tool] = parse_sanitizer(_output(command, limit_seconds / len(SANITIZERS), extra))
            sentences.append(f"Sanitizers: {tool}: {errors[tool]} error(s).")
        except ToolFailed as error:
            errors[tool] = None
            sentences.append(f"Sanitizers: {tool} failed: {error}")
    failed = any(count != 0 for count in errors.values())
    return Outcome("\n".join(sentences), failed, {"errors": errors})


def parse_sanitizer(text: str) -> int:
    """Number of errors, or hazards, from compute-sanitizer's summary.

    Raises:
        ToolFailed: there is no summary, or the program it watched failed.
    """
    found = re.findall(
        r"^=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text, re.MULTILINE
    )
    if not found or "Traceback (most recent call last)" in text:
        raise ToolFailed(_last_words(text))
    return sum(int(errors or hazards) for errors, hazards in found)


def _driver(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.driver", *arguments]


def _output(
    command: list[str], limit_seconds: float, extra: Mapping[str, str] | None = None
) -> str:
    """All a tool says; its exit code is the watched program's, or says what the text says too."""
    code, output = run_process(command, limit_seconds, extra)
    if code is None:
        raise ToolFailed(f"stopped after {limit_seconds:.0f} s")
    return output


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "Error" in line]
    return (errors or lines or ["it said nothing"])[-1].strip()
