"""Compile the cluster kernels, and small ones, for a CPU (team.h): where sources changed."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILT = ROOT / "build" / "cluster"
SANITIZE = os.environ.get("PROXYTUNE_SANITIZE") == "1"
COMPILER = shutil.which("g++")
# -ffp-contract=off is part of the contract (docs/contracts.md, C API).
FLAGS = [
    "-std=c++20", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wno-unknown-pragmas", "-g1",
    "-ffp-contract=off", "-fvisibility=hidden", "-fPIC",
]  # fmt: skip
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def _run(command: list[str | Path]) -> None:
    # A sanitizer of this process isn't handed on.
    env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _digest(flags: list[str]) -> str:
    """Of all that a program can include, and of the flags."""
    sources = [*HERE.glob("*.h"), *HERE.glob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]
    whole = hashlib.sha256(repr(flags).encode())
    for source in sorted(sources):
        whole.update(source.name.encode() + source.read_bytes())
    return whole.hexdigest()[:16]


def library(program: str, *, races: bool = False, ucontext: bool = False) -> ctypes.CDLL:
    """``program``.cpp as a library, from build/cluster if it was built before.

    Args:
        program: "model" or "primitives".
        races: each access to shared memory is checked (races.cpp); slower, and not together with
            other sanitizers.
        ucontext: fibers as on processors other than x86-64.

    Raises:
        RuntimeError: what the compiler said.
    """
    found = _library(program, races, ucontext)
    if isinstance(found, RuntimeError):
        raise found
    return found


@functools.cache
def _library(program: str, races: bool, ucontext: bool) -> ctypes.CDLL | RuntimeError:
    """What failed once is not tried again: it takes as long as what succeeds."""
    watch = ["-O2", *(SANITIZERS if SANITIZE else [])]
    if races:
        watch = ["-O1", "-fsanitize=thread"]
    flags = [*FLAGS, *watch, *(["-DPTK_UCONTEXT"] if ucontext else [])]
    name = f"{program}{'-races' * races}{'-ucontext' * ucontext}{'-sanitized' * SANITIZE}"
    path = BUILT / f"{name}-{_digest(flags)}.so"
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / f"{name}.lock").open("w") as lock:  # other processes wait for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            try:
                _build(program, flags, races, path)
            except RuntimeError as error:
                return error
            for old in BUILT.glob(f"{name}-{'?' * 16}.so"):
                if old != path:
                    old.unlink()
    return ctypes.CDLL(str(path))


def _build(program: str, flags: list[str], races: bool, path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    source = HERE / f"{program}.cpp"
    if not races:
        _run(["g++", *flags, "-shared", source, "-o", unfinished])
    else:
        # Its own runtime in place of the sanitizer's: compiled without it, and linked without it.
        objects = [path.with_suffix(f".{i}.o") for i in (0, 1)]
        _run(["g++", *flags, "-c", source, "-o", objects[0]])
        _run(["g++", *FLAGS, "-O2", "-c", HERE / "races.cpp", "-o", objects[1]])
        _run(["g++", "-shared", *objects, "-o", unfinished])
        for linked in objects:
            linked.unlink()
    unfinished.replace(path)
