"""The CUDA half of the C API from C++: no Python, no torch. Compiled and linked; run where it can.

Without a device the calls end at the question which device there is: what they refuse before that,
what they say, and how many blocks they would choose is tested here. tests/cluster runs the kernels.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import build_cuda
import proxytune_kernels as ptk
from tests.capi.conftest import CPP, ROOT, declared, exported, run

HERE = Path(__file__).parent
INVALID, DEVICE, SHAPE, CUDA = 1, 4, 5, 1000
TILE_BYTES = 128 * 4 + 48  # of x, in fp32; summaries and alignment take a few more

try:
    NVCC, DEVICES = build_cuda.toolchain()
    LEFT_OUT = ""
except build_cuda.Unavailable as error:
    LEFT_OUT = str(error)

needs_nvcc = pytest.mark.skipif(LEFT_OUT != "", reason=f"CUDA C++ is left out: {LEFT_OUT}")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as a shared library, from csrc/cuda and csrc/common alone."""
    path = tmp_path_factory.mktemp("cuda") / "libproxytune_cuda.so"
    kernels = NVCC.kernels(DEVICES)
    run([NVCC.path, "-shared", "-Xlinker=--exclude-libs=ALL", kernels, "-o", path])
    return path


def link(library: Path, source: Path, folder: Path, *flags: str) -> Path:
    program = folder / source.stem
    run([*CPP, *flags, source, library, f"-Wl,-rpath,{library.parent}", "-o", program])
    return program


@pytest.fixture(scope="session")
def said(library: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What cuda.cpp prints."""
    return run([link(library, HERE / "cuda.cpp", tmp_path_factory.mktemp("capi"))]).splitlines()


@needs_nvcc
def test_what_cannot_be_meant_is_refused_before_a_device_is_asked_for(said):
    lines = [line.split(" ", 2) for line in said if not line.startswith(("workspace", "supported"))]
    codes = {name: int(code) for name, code, _ in lines if name not in ("sentence", "good")}
    assert codes.pop("unknown-code") == 99
    assert codes == dict.fromkeys(codes, INVALID) and len(codes) == 19
    sentences = {int(code): sentence for _, code, sentence in lines}
    assert len(set(sentences.values())) == len(sentences)
    assert "compute capability below 9.0" in sentences[DEVICE]
    assert "shared memory" in sentences[SHAPE]


@needs_nvcc
def test_workspaces(said):
    """A counter a row, a word a position; none where a grid would be too large."""
    sizes = [int(line.split()[1]) for line in said if line.startswith("workspace")]
    assert sizes == [3 * 4 + 3 * 5 * 4, 4 + 4, 0, 0, 0]


@needs_nvcc
def test_without_a_device_the_calls_say_so(said):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    [supported] = [line for line in said if line.startswith("supported")]
    _, code, widest, sentence = supported.split(" ", 3)
    assert int(code) > CUDA and widest == "0"
    assert "driver" in sentence or "device" in sentence
    assert [line for line in said if line.startswith("good")] == [f"good {code} {sentence}"] * 2


@needs_nvcc
def test_only_the_api_is_exported(library):
    symbols = {symbol for symbol in exported(library) if not symbol.startswith("_Z")}
    assert symbols == {name for name in declared() if "_cuda_" in name}


@needs_nvcc
def test_the_documented_example(library, tmp_path):
    """It compiles and links; without a device it ends with a sentence."""
    text = (ROOT / "docs" / "contracts.md").read_text()
    [source] = re.findall(r"```cpp\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "example.cpp"
    path.write_text(source)
    folders = [f"-isystem{d}" for d in NVCC.include_dirs] + [f"-L{d}" for d in NVCC.library_dirs]
    libraries = ("-lcudart_static", "-ldl", "-lpthread", "-lrt")
    program = link(library, path, tmp_path, *folders, "-Wl,--start-group", *libraries)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        token = int(ptk.sample(torch.tensor([[2.0, 1.0, 0.5, -1.0]]), seed=7).token_ids)
        assert done.stdout == f"token {token}\n"
    else:
        assert not torch.cuda.is_available(), done.stderr
        assert done.returncode == 1 and "CUDA" in done.stderr and done.stdout == ""


@pytest.fixture(scope="session")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("capi") / "blocks"
    run([*CPP, ROOT / "benchmarks" / "static" / "blocks.cpp", "-o", program])
    return program


H100, RTX_5090 = (132, 227), (170, 99)
"""Multiprocessors, and KiB of shared memory that a block may have."""


def choose(
    program: Path, vocab_size: int, clusters: int, device: tuple[int, int], *,
    rejection: bool = False, largest: int = 16,
) -> tuple[int, int, int]:  # fmt: skip
    """Blocks of a cluster, bytes of a block, and the widest row that fits."""
    values = (vocab_size, clusters, int(rejection), *device, largest)
    chosen, _, used, widest = run([program], given=" ".join(map(str, values))).split()
    return int(chosen), int(used), int(widest)


@pytest.mark.parametrize(
    ("vocab_size", "wanted"), [(1, 1), (16_384, 1), (32_000, 2), (50_257, 4), (128_256, 8),
                               (151_936, 8), (180_000, 8), (262_208, 16), (360_000, 16)],
)  # fmt: skip
def test_blocks_by_width(blocks, vocab_size, wanted):
    """Two blocks, with the 1 KiB that the driver takes of each, fit in an H100's 228 KiB."""
    chosen, used, _ = choose(blocks, vocab_size, 256, H100)
    assert chosen == wanted and 2 * (used + 1024) <= 228 * 1024


def test_no_larger_clusters_where_their_blocks_share_no_multiprocessor_either(blocks):
    assert choose(blocks, 262_208, 256, H100, largest=8)[0] == 8
    assert choose(blocks, 400_000, 256, H100)[0] == 8
    assert choose(blocks, 151_936, 256, RTX_5090)[0] == 8
    assert choose(blocks, 151_936, 256, H100, rejection=True)[0] == 8


def test_sixteen_blocks_where_there_is_room_for_all(blocks):
    """132 multiprocessors: eight clusters of 16; not where the device has no such clusters."""
    assert [choose(blocks, 128_256, n, H100)[0] for n in (1, 8, 9)] == [16, 16, 8]
    assert choose(blocks, 128_256, 1, H100, largest=8)[0] == 8
    assert choose(blocks, 32_000, 1, H100)[0] == 2


def test_more_blocks_where_a_row_would_not_fit_and_none_where_it_never_does(blocks):
    assert choose(blocks, 128_256, 64, RTX_5090)[0] == 8
    assert choose(blocks, 128_256, 64, RTX_5090, rejection=True)[0] == 16
    assert choose(blocks, 128_256, 64, RTX_5090, rejection=True, largest=8)[0] == 0
    assert choose(blocks, 2**19, 1, H100)[0] == 16
    assert choose(blocks, 2**19, 1, H100, rejection=True)[0] == 0


@pytest.mark.parametrize("rejection", (False, True))
@pytest.mark.parametrize("largest", (1, 8, 16))
@pytest.mark.parametrize("device", (H100, RTX_5090))
def test_the_widest_row_is_the_widest_that_fits(blocks, device, largest, rejection):
    limits = {"rejection": rejection, "largest": largest}
    *_, widest = choose(blocks, 1, 1, device, **limits)
    chosen, used, _ = choose(blocks, widest, 1000, device, **limits)
    assert chosen > 0 and used <= device[1] * 1024
    assert used >= widest / chosen * (1 + rejection) * 4
    if widest < 2**19:
        assert chosen == largest
        assert choose(blocks, widest + 1, 1000, device, **limits)[0] == 0
        # There is no room for another tile.
        assert used + (1 + rejection) * TILE_BYTES > device[1] * 1024
