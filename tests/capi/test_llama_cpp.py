"""docs/llama_cpp.cpp on the wheel's libllama: its tokens are those of the decoder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from proxytune_kernels import Decoder, SamplingParams
from proxytune_kernels.trio import libllama
from tests.capi.conftest import CPP, ROOT, SANITIZE, run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def headers() -> list[str]:
    """Those of llama.cpp where a variable names them, else what the program uses of them."""
    named = os.environ.get("PROXYTUNE_LLAMA_INCLUDE")
    return [f"-isystem{path}" for path in (named or str(ROOT / "tests" / "capi")).split(":")]


def flags(path: Path) -> list[str]:
    """What links a program to a libllama; the wheel's is a module of Python's."""
    if libllama.WHEEL not in path.name:
        return [str(path), f"-Wl,-rpath,{path.parent}"]
    python = Path(sysconfig.get_config_var("LIBDIR")) / sysconfig.get_config_var("LDLIBRARY")
    if python.suffix != ".so":
        pytest.skip(f"no shared library of Python, which the wheel's libllama needs: {python}")
    return [str(path), str(python), f"-Wl,-rpath,{python.parent}", "-Wl,--allow-shlib-undefined"]


@pytest.fixture(scope="module")
def program(gguf_trio: Any, library: Path) -> Path:
    if SANITIZE:
        pytest.skip("libllama is not built with the sanitizers")
    made = library.parent / "llama_cpp"
    source, linked = ROOT / "docs" / "llama_cpp.cpp", flags(libllama.find_library())
    own = [str(library), f"-Wl,-rpath,{library.parent}"]
    run([*CPP, "-O1", *headers(), source, *own, *linked, "-o", made])
    return made


def test_its_tokens_are_the_decoders(program, gguf_trio):
    decoder = Decoder(gguf_trio.load(), 2, 64)
    for count, tokens, alpha, temperature, top_p, seed in (
        (1, 12, 1.0, 0.8, 0.9, 3),
        (2, 9, 0.5, 1.2, 1.0, -1),
        (1, 6, 1.5, 0.0, 1.0, 0),
    ):
        numbers = map(str, (count, tokens, alpha, temperature, top_p, seed))
        # The text of random models is seldom UTF-8.
        said = subprocess.check_output(
            [program, *gguf_trio.files.values(), "what is more", *numbers]
        )
        told = [[*map(int, line.split())] for line in re.findall(rb"^tokens:(.*)", said, re.M)]
        params = SamplingParams(
            alpha=alpha, temperature=temperature, top_p=top_p, seed=seed, max_tokens=tokens, n=count
        )
        assert told == [o.token_ids for o in decoder.generate("what is more", params)]


def test_what_is_wrong_is_one_line(program, gguf_trio, tmp_path):
    base, expert, anti = gguf_trio.files.values()
    swapped = tmp_path / "swapped.gguf"
    # The tokens "a" and "b", each behind its length.
    held = anti.read_bytes()
    a, b = (b"\1" + bytes(7) + token for token in (b"a", b"b"))
    assert held.count(a + b) == 1
    swapped.write_bytes(held.replace(a + b, b + a))
    for files, message in (
        ((base, tmp_path / "none.gguf", anti), "llama.cpp can't open "),
        ((base, expert, swapped), "the files disagree on token "),
    ):
        done = subprocess.run([program, *files, "x"], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f"llama_cpp: {message}" in done.stderr
