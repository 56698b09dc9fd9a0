"""How nvcc is found and asked: with a script in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import build_cuda

ROOT = Path(build_cuda.__file__).parent

NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  *--list-gpu-code*) echo "sm_80 sm_90 {codes}" | tr ' ' '\\n' ;;
  *--dryrun*) echo '#$ INCLUDES="-I/opt/cuda/include"  ' >&2
              echo '#$ LIBRARIES=  "-L/opt/cuda/lib/stubs" "-L/opt/cuda/lib"' >&2 ;;
  *) echo "asked: $*"; echo "and warned" >&2; exit {code} ;;
esac
"""


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """Puts a script in nvcc's place, alone on the PATH with the shell's tools."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "PROXYTUNE_SKIP_CUDA_BUILD",
                 "PROXYTUNE_SKIP_EXT", "PROXYTUNE_SANITIZE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    # No toolkit of this machine is found: the PATH, /usr/local and torch are the test's.
    monkeypatch.setattr(build_cuda, "_LOCAL", tmp_path / "local")
    specs: dict[str, SimpleNamespace] = {}
    monkeypatch.setattr(build_cuda, "find_spec", specs.get)
    monkeypatch.setenv("PATH", f"{tmp_path}/toolkit/bin:/bin:/usr/bin")

    def make(
        release: str = "13.0", codes: str = "sm_100 sm_120", code: int = 0,
        place: str = "toolkit", torch: str = "",
    ) -> Path:  # fmt: skip
        folder = tmp_path / place / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        if torch:
            (tmp_path / "version.py").write_text(f"cuda: Optional[str] = '{torch}'\n")
            specs["torch"] = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        if place.startswith("site/nvidia"):
            folders = [str(tmp_path / "site" / "nvidia")]
            specs["nvidia"] = SimpleNamespace(submodule_search_locations=folders)
        path = folder / "nvcc"
        path.write_text(NVCC.format(release=release, codes=codes, code=code))
        path.chmod(0o755)
        return path

    return make


def devices(options: list[str]) -> list[str]:
    return [option.removeprefix("-gencode=arch=") for option in options]


def test_what_it_says_of_itself(nvcc):
    path = nvcc()
    found, options = build_cuda.toolchain()
    assert found.path == str(path)
    assert found.include_dirs == ("/opt/cuda/include",)
    assert found.library_dirs == ("/opt/cuda/lib/stubs", "/opt/cuda/lib")
    assert devices(options) == [
        "compute_90,code=sm_90", "compute_100,code=sm_100", "compute_120,code=sm_120",
    ]  # fmt: skip


@pytest.mark.parametrize("variable", ("CUDA_HOME", "CUDA_PATH"))
def test_cuda_home_comes_first(nvcc, monkeypatch, tmp_path, variable):
    nvcc()
    path = nvcc(place="home")
    monkeypatch.setenv(variable, str(tmp_path / "home"))
    assert build_cuda.find_nvcc().path == str(path)
    monkeypatch.setenv(variable, "/nowhere")
    with pytest.raises(build_cuda.Unavailable, match="^there is no nvcc in /nowhere/bin$"):
        build_cuda.toolchain()


def test_where_it_is_looked_for(nvcc):
    """The PATH, /usr/local/cuda, toolkits side by side of torch's major version, the wheels."""
    nvcc(place="local/cuda-14.0", torch="13.0")  # its drivers may be older
    for place in (
        "site/nvidia/cuda_nvcc", "site/nvidia/cu13", "local/cuda-13.1", "local/cuda-13.12",
        "local/cuda", "toolkit",
    ):  # fmt: skip
        path = nvcc(place=place)
        assert build_cuda.find_nvcc().path == str(path)
    path.unlink()
    path = nvcc("11.8", place="local/cuda")
    assert build_cuda.find_nvcc().path.endswith("local/cuda-13.12/bin/nvcc")
    nvcc(place="local/cuda-14.0", torch="14.2")
    assert build_cuda.find_nvcc().path.endswith("local/cuda-14.0/bin/nvcc")


def test_there_is_none(nvcc, tmp_path):
    with pytest.raises(build_cuda.Unavailable) as caught:
        build_cuda.toolchain()
    assert str(caught.value) == (
        f"there is no nvcc on the PATH, in {tmp_path}/local/cuda*/bin or in the package "
        "nvidia-cuda-nvcc"
    )


@pytest.mark.parametrize("release", ("11.8", "12.6"))
def test_it_is_too_old(nvcc, release):
    nvcc(release)
    with pytest.raises(build_cuda.Unavailable, match=f"release {release}, 12.8 or later is needed"):
        build_cuda.toolchain()


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        ("9.0", ["compute_90,code=sm_90"]),
        ("9.0a 10.0f", ["compute_90a,code=sm_90a", "compute_100f,code=sm_100f"]),
        ("9.0;12.1+PTX", ["compute_90,code=sm_90", "compute_121,code=sm_121",
                          "compute_121,code=compute_121"]),
        ("8.0;8.6+PTX; 9.0", ["compute_90,code=sm_90"]),
    ],
)  # fmt: skip
def test_torchs_list_of_devices(nvcc, monkeypatch, listed, wanted):
    nvcc(codes="")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert devices(build_cuda.toolchain()[1]) == wanted


def test_what_is_left_out_is_said(nvcc, monkeypatch, capsys):
    path = nvcc("12.8", codes="")
    assert devices(build_cuda.toolchain()[1]) == ["compute_90,code=sm_90"]
    assert capsys.readouterr().err.splitlines() == [
        f"CUDA C++ kernels: not compiled for {name}: {path} does not know it"
        for name in ("10.0", "12.0")
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.9")
    with pytest.raises(build_cuda.Unavailable, match=r"^TORCH_CUDA_ARCH_LIST=7.5;8.9 names no "):
        build_cuda.toolchain()
    assert "not compiled for 8.9: clusters need 9.0" in capsys.readouterr().err


@pytest.mark.parametrize("listed", ("Hopper", "90", "9.0b", "9.0,10.0"))
def test_an_entry_that_is_none(nvcc, monkeypatch, listed):
    nvcc()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(ValueError, match="must have entries like 9.0, 9.0a or 9.0.PTX, got"):
        build_cuda.toolchain()


@pytest.mark.parametrize(
    "variable", ("PROXYTUNE_SKIP_EXT", "PROXYTUNE_SKIP_CUDA_BUILD", "PROXYTUNE_SANITIZE")
)
def test_it_is_not_wanted(nvcc, monkeypatch, variable):
    nvcc()
    monkeypatch.setenv(variable, "1")
    with pytest.raises(build_cuda.Unavailable, match=variable):
        build_cuda.toolchain()


def test_compiling(nvcc, tmp_path):
    nvcc()
    found, options = build_cuda.toolchain()
    said = found.compile(tmp_path / "new" / "kernels.o", options, "-c")
    assert said.endswith("and warned\n") and (tmp_path / "new").is_dir()
    asked = said.splitlines()[0].split()
    assert {"--fmad=false", "-std=c++20", "-c", *options} <= set(asked)
    assert "-ffp-contract=off" in said
    assert asked[-3:] == ["csrc/cuda/launch.cu", "-o", str(tmp_path / "new" / "kernels.o")]


@pytest.mark.parametrize(("cxx", "beside"), [("", []), ("clang++ -m64", ["-ccbin=clang++"])])
def test_the_compiler_beside_it(nvcc, monkeypatch, tmp_path, cxx, beside):
    nvcc()
    monkeypatch.setenv("CXX", cxx)
    said = build_cuda.find_nvcc().compile(tmp_path / "kernels.o", [], "-c")
    assert [word for word in said.split() if "ccbin" in word] == beside


def test_what_nvcc_refuses(nvcc, tmp_path):
    nvcc(code=2)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build_cuda.find_nvcc().compile(tmp_path / "kernels.o", [], "-c")
    assert caught.value.stderr == "and warned\n"


def test_as_a_command_it_says_what_a_build_would_do(nvcc):
    nvcc()
    command = [sys.executable, str(ROOT / "build_cuda.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "CUDA C++ kernels: built for sm_90, sm_100, sm_120\n"
    skipped = os.environ | {"PROXYTUNE_SKIP_CUDA_BUILD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=skipped)
    assert done.stdout == "CUDA C++ kernels: not built: PROXYTUNE_SKIP_CUDA_BUILD=1\n"
