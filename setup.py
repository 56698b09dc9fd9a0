"""Builds the C++ extensions against the torch that is installed.

PROXYTUNE_SKIP_EXT=1 builds without them: pure Python, with the slow reference backend and Triton.
PROXYTUNE_SKIP_CUDA_BUILD=1 leaves out the CUDA C++ kernels, which are built where nvcc is found.
TORCH_CUDA_ARCH_LIST, as in torch: the devices that they are built for (build_cuda.py).
PROXYTUNE_SANITIZE=1 builds the CPU's with AddressSanitizer and UBSan (see `make asan`).
Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))  # pip does not

import build_cuda

if TYPE_CHECKING:
    from setuptools import Extension

SOURCES = [
    "csrc/binding_cpu.cpp",
    "csrc/binding_shard.cpp",
    "csrc/cpu/amx.cpp",
    "csrc/cpu/capi.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/shard.cpp",
    "csrc/cpu/isa_scalar.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_avx512.cpp",
    "csrc/cpu/isa_neon.cpp",
]
CUDA_SOURCES = ["csrc/binding_cuda.cpp"]  # and build_cuda.SOURCE, which nvcc compiles
# Python's own flags have -fwrapv, which would hide signed overflow.
SANITIZE = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-wrapv",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g",
]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))


def extension(
    name: str, sources: list[str], compile_args: Sequence[str] = (), macros: Sequence[str] = (),
    depends: Sequence[str] = (), **more: list[str],
) -> Extension:  # fmt: skip
    """One of the package's modules, for the stable ABI of torch 2.10 and Python's limited API."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        f"proxytune_kernels.{name}",
        sources,
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            *((m, None) for m in macros),
        ],
        extra_compile_args=["-std=c++20", "-O3", *build_cuda.HOST_FLAGS, *compile_args],
        depends=[*HEADERS, *depends],
        py_limited_api=True,
        **more,
    )


def cpu_extension() -> Extension:
    """The CPU kernels' module."""
    sanitize = SANITIZE if os.environ.get("PROXYTUNE_SANITIZE") == "1" else []
    return extension(
        "_cpu",
        SOURCES,
        compile_args=sanitize,
        include_dirs=["csrc"],
        extra_link_args=[f for f in sanitize if f.startswith("-fsanitize")],
    )


def cuda_extension(nvcc: build_cuda.Nvcc) -> Extension:
    """The CUDA kernels' module: the binding alone, to which :class:`BuildExt` adds the kernels.

    CPU builds of torch have no stream to launch on: the module links with them, and does not load.
    """
    return extension(
        "_cuda",
        CUDA_SOURCES,
        macros=["USE_CUDA"],  # torch's headers declare the stream then
        depends=[build_cuda.SOURCE, "build_cuda.py"],
        include_dirs=["csrc", *nvcc.include_dirs],
        extra_link_args=[
            *(f"-L{folder}" for folder in nvcc.library_dirs),
            *("-Wl,--exclude-libs,ALL", "-lcudart_static", "-ldl", "-lpthread", "-lrt"),
            # Nothing of libtorch is used but through it: some linkers would leave it out.
            *("-Wl,--no-as-needed", "-ltorch"),
        ],
    )


def extensions() -> dict[str, object]:
    """Arguments of setup() that build the extensions; none where they are not wanted."""
    if os.environ.get("PROXYTUNE_SKIP_EXT") == "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        sys.exit(
            "proxytune_kernels builds its extension against the torch that is installed, and none "
            "is importable here: install torch, then run `pip install --no-build-isolation .` "
            "(or set PROXYTUNE_SKIP_EXT=1 to build without the extension)"
        )
    modules = [cpu_extension()]
    unavailable = ""
    try:
        nvcc, devices = build_cuda.toolchain()
        modules.append(cuda_extension(nvcc))
    except build_cuda.Unavailable as error:
        unavailable = str(error)
        print(f"CUDA C++ kernels: not built: {error}", file=sys.stderr)

    class BuildExt(BuildExtension):
        """Has nvcc compile the kernels before the binding is built; or notes why it doesn't."""

        def run(self) -> None:
            super().run()
            # pip hides what a build prints: ops/backends/cuda.py says it again.
            module = Path(self.get_ext_fullpath("proxytune_kernels._cuda"))
            note = module.with_name("_cuda_not_built.txt")
            note.unlink(missing_ok=True)
            if unavailable:
                note.write_text(unavailable)

        def build_extension(self, ext: Extension) -> None:
            if ext.sources == CUDA_SOURCES:
                try:
                    ext.extra_objects = [str(nvcc.kernels(devices))]
                except subprocess.CalledProcessError as error:
                    sys.exit(
                        f"{' '.join(error.cmd)}\n{error.stdout}{error.stderr}\n"
                        "nvcc failed; PROXYTUNE_SKIP_CUDA_BUILD=1 builds without its kernels"
                    )
            super().build_extension(ext)

    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": BuildExt},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extensions())
