"""Compile the machine, and a libcuda that launches nothing, with g++: where sources changed."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

from tests.ptx import instructions

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build" / "ptx"
COMPILER = shutil.which("g++")
# Registers are memory that each instruction reads as its own type.
FLAGS = ["-O2", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]


def missing() -> str | None:
    """Why nothing can be built here; None where it can."""
    return None if COMPILER else "the machine that executes PTX needs g++, which is not installed"


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def _compile(name: str, source: Path, flags: list[str], salt: str, texts: dict[str, str]) -> Path:
    """The library ``build/ptx/name``, from ``source`` and generated files."""
    whole = (source.read_text(), *texts.items(), *flags, salt)
    folder = BUILT / f"{name}-{hashlib.sha256(repr(whole).encode()).hexdigest()[:16]}"
    library = folder / name
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / f"{name}.lock").open("w") as lock:  # other processes wait for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in BUILT.glob(f"{name}-{'?' * 16}"):
                shutil.rmtree(old)
            folder.mkdir()
            for file, text in texts.items():
                (folder / file).write_text(text)
            unfinished = folder / "unfinished"
            _run("g++", *flags, f"-I{folder}", source, "-o", unfinished)
            unfinished.replace(library)
    return library


@functools.cache
def machine() -> Path:
    """The library that executes decoded PTX.

    Raises:
        RuntimeError: what the compiler said.
    """
    texts = {"numbers.inc": instructions.numbers(), "cases.inc": instructions.cases()}
    try:  # for this processor: what it has is part of the name
        flags, salt = [*FLAGS, "-march=native"], _run("g++", "-march=native", "-Q", "--help=target")
    except RuntimeError:
        flags, salt = FLAGS, ""
    return _compile("machine.so", HERE / "machine.cpp", flags, salt, texts)


@functools.cache
def libcuda() -> Path:
    """A ``libcuda.so.1`` that notes launches (libcuda.cpp)."""
    name = "libcuda.so.1"
    return _compile(name, HERE / "libcuda.cpp", [*FLAGS, f"-Wl,-soname,{name}"], "", {})
