"""The kernels as a shared library, from csrc/cpu alone, and programs linked to it.

PROXYTUNE_SANITIZE=1 builds everything here with AddressSanitizer, LeakSanitizer and UBSan.
PROXYTUNE_CROSS=aarch64-linux-gnu builds for that processor, and runs it in qemu (`make aarch64`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INCLUDE = ROOT / "csrc" / "include"
SANITIZE = os.environ.get("PROXYTUNE_SANITIZE") == "1"
CROSS = os.environ.get("PROXYTUNE_CROSS", "")
TOOLS = f"{CROSS}-" if CROSS else ""
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
C11 = [f"{TOOLS}gcc", "-std=c11", "-D_POSIX_C_SOURCE=200809L", *STRICT, f"-I{INCLUDE}"]
CPP = [f"{TOOLS}g++", "-std=c++20", *STRICT, f"-I{INCLUDE}"]
# The command of docs/contracts.md, but for -O1: it compiles faster, and the numbers must not
# depend on it.
EXACT = ["-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared"]
LIBRARY = [f"{TOOLS}g++", "-std=c++20", "-O1", *EXACT]


def at(program: Path) -> list[str]:
    """What starts a program that was built here."""
    emulator = [f"qemu-{CROSS.split('-')[0]}", "-L", f"/usr/{CROSS}"] if CROSS else []
    return [*emulator, str(program)]


def run(command: list[str | Path], given: str | None = None, **environment: str) -> str:
    """Output of a command that must succeed; a sanitizer of this process isn't handed on."""
    env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    first, *rest = command
    start = at(first) if isinstance(first, Path) else [first]
    done = subprocess.run(
        [*start, *map(str, rest)], env=env | environment, input=given, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as a shared library, from csrc/cpu alone."""
    path = tmp_path_factory.mktemp("capi") / "libproxytune_cpu.so"
    # With sanitizers they take minutes to compile: `make asan` has done so for the extension.
    python = sys.implementation.cache_tag
    objects = ROOT.glob(f"build/asan-objects/temp.*-{python}/csrc/cpu/*.o")
    sources = sorted(objects if SANITIZE else (ROOT / "csrc" / "cpu").glob("*.cpp"))
    run([*LIBRARY, *(SANITIZERS if SANITIZE else []), *sources, "-o", path])
    return path


def declared() -> set[str]:
    """The functions of the header."""
    return set(re.findall(r"\b(proxytune_\w+)\(", (INCLUDE / "proxytune.h").read_text()))


def exported(library: Path) -> set[str]:
    """What a library exports, but for the standard library's and a sanitizer's symbols."""
    if shutil.which(f"{TOOLS}nm") is None:
        pytest.skip(f"needs {TOOLS}nm")
    symbols = run([f"{TOOLS}nm", "--dynamic", "--defined-only", library]).split()[2::3]
    theirs = ("_ZNSt", "_ZSt", "_ZTS", "_ZTI", "__odr_asan")
    return {symbol for symbol in symbols if not symbol.startswith(theirs)}


def link(library: Path, source: Path, name: str, compiler: list[str] = C11) -> Path:
    program = library.parent / name
    flags = SANITIZERS if SANITIZE else []
    end: list[str | Path] = [library, f"-Wl,-rpath,{library.parent}", "-pthread", "-o", program]
    run([*compiler, *flags, source, *end])
    return program
