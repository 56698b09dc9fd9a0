"""The kernels as a shared library, from csrc/cpu alone, and programs linked to it.

PROXYTUNE_SANITIZE=1 builds everything here with AddressSanitizer, LeakSanitizer and UBSan.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INCLUDE = ROOT / "csrc" / "include"
SANITIZE = os.environ.get("PROXYTUNE_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
C11 = ["gcc", "-std=c11", "-D_POSIX_C_SOURCE=200809L", *STRICT, f"-I{INCLUDE}"]
CPP = ["g++", "-std=c++20", *STRICT, f"-I{INCLUDE}"]
# The command of docs/contracts.md, but for -O1: it compiles faster, and the numbers must not
# depend on it.
EXACT = ["-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared"]
LIBRARY = ["g++", "-std=c++20", "-O1", *EXACT]


def run(command: list[str | Path], given: str | None = None, **environment: str) -> str:
    """Output of a command that must succeed; a sanitizer of this process isn't handed on."""
    env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    done = subprocess.run(
        [str(c) for c in command], env=env | environment, input=given, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as a shared library, from csrc/cpu alone."""
    path = tmp_path_factory.mktemp("capi") / "libproxytune_cpu.so"
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    run([*LIBRARY, *(SANITIZERS if SANITIZE else []), *sources, "-o", path])
    return path


def declared() -> set[str]:
    """The functions of the header."""
    return set(re.findall(r"\b(proxytune_\w+)\(", (INCLUDE / "proxytune.h").read_text()))


def exported(library: Path) -> set[str]:
    """What a library exports, but for the standard library's and a sanitizer's symbols."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    symbols = run(["nm", "--dynamic", "--defined-only", library]).split()[2::3]
    theirs = ("_ZNSt", "_ZSt", "_ZTS", "_ZTI", "__odr_asan")
    return {symbol for symbol in symbols if not symbol.startswith(theirs)}


def link(library: Path, source: Path, name: str, compiler: list[str] = C11) -> Path:
    program = library.parent / name
    flags = SANITIZERS if SANITIZE else []
    end: list[str | Path] = [library, f"-Wl,-rpath,{library.parent}", "-pthread", "-o", program]
    run([*compiler, *flags, source, *end])
    return program
