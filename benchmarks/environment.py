"""What a measurement was taken on: revision, machine, versions."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import proxytune_kernels

REPOSITORY = Path(__file__).resolve().parent.parent

_PACKAGES = ("torch", "triton", "transformers", "numpy")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def git_revision() -> dict[str, Any]:
    """Commit hash and whether tracked files differ from it; both None outside a git checkout."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    dirty = None if changed is None else changed != ""
    return {"revision": _git("rev-parse", "HEAD"), "dirty": dirty}


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module knows
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _constant() -> dict[str, Any]:
    return {
        **git_revision(),
        "device": "cpu",
        "device_name": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "proxytune_kernels": proxytune_kernels.__version__,
        "backends": [name for name, reason in proxytune_kernels.backends().items() if not reason],
    }


def environment() -> dict[str, Any]:
    """The environment record that every line of results carries.

    Load is the system's one-minute load average: above the number of threads used, something else
    was running.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **_constant(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }
