"""Builds the C++ extension against the torch that is installed.

PROXYTUNE_SKIP_EXT=1 builds without it: pure Python, with the slow reference backend only.
PROXYTUNE_SANITIZE=1 builds it with AddressSanitizer and UBSan (see `make asan`).
Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import sys

from setuptools import setup

SOURCES = [
    "csrc/binding_cpu.cpp",
    "csrc/cpu/capi.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/isa_scalar.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_avx512.cpp",
]
# No contraction: a fused multiply-add is written as one, so that all instruction sets agree.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
# Python's own flags have -fwrapv, which would hide signed overflow.
SANITIZE = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-wrapv",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g",
]
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # the stable ABI of torch 2.10


def extension() -> dict[str, object]:
    """Arguments of setup() that build the extension; none where it is not wanted."""
    if os.environ.get("PROXYTUNE_SKIP_EXT") == "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(
            "proxytune_kernels builds its extension against the torch that is installed, and none "
            "is importable here: install torch, then run `pip install --no-build-isolation .` "
            "(or set PROXYTUNE_SKIP_EXT=1 to build without the extension)"
        )
    sanitize = SANITIZE if os.environ.get("PROXYTUNE_SANITIZE") == "1" else []
    module = CppExtension(
        "proxytune_kernels._cpu",
        SOURCES,
        include_dirs=["csrc"],
        define_macros=MACROS,
        extra_compile_args=FLAGS + sanitize,
        extra_link_args=[f for f in sanitize if f.startswith("-fsanitize")],
        depends=[
            os.path.join(folder, name)
            for folder, _, names in os.walk("csrc")
            for name in names
            if name.endswith(".h")
        ],
        py_limited_api=True,
    )
    options = {"bdist_wheel": {"py_limited_api": "cp311"}}
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": options,
    }


setup(**extension())
