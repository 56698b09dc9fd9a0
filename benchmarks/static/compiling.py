"""Compiles kernels as a launch on a GPU would, without one.

The operators run on CPU tensors up to their launches, and Triton specialises and compiles what they
pass. Only the driver is replaced, by one that names a GPU which isn't there; nothing is launched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import proxytune_kernels
from benchmarks.static import sass
from benchmarks.static.occupancy import WARP
from proxytune_kernels.kernels import common

PROCESSORS = 132  # of an H100; what launchers ask the device for
_PACKAGE = Path(proxytune_kernels.__file__).parent
_SOURCE = re.compile(rf'File "[^"]*/{_PACKAGE.name}/([^"]+)"')


class _NoDevice:
    """Triton's driver as far as compiling asks it; its devices are compute capabilities."""

    def __init__(self, cc: int) -> None:
        self._cc = cc

    def get_current_device(self) -> int:
        return self._cc

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._cc, WARP)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one compute capability."""

    code: sass.Code
    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers and local arrays
    shared: int  # bytes per block
    warps: int  # per block
    arguments: Mapping[str, Any]
    """What the launcher passed by name: the kernel's constants and options."""


def kernel_name(kernel: JITFunction) -> str:
    """``scan`` for ``_scan_kernel``."""
    return str(kernel.__name__).strip("_").removesuffix("_kernel")


@contextmanager
def _launches(then: Callable[..., None]) -> Iterator[None]:
    """Within, launches call ``then(kernel, *arguments, grid=..., **arguments)`` instead."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        then(kernel, *args, grid=grid, **kwargs)

    processors = mock.patch.object(common, "processors", lambda device: PROCESSORS)
    with mock.patch.object(JITFunction, "run", run), processors:
        yield


def kernels_launched(launch: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call launches, in order; compiles nothing."""
    names: list[str] = []
    with _launches(lambda kernel, *args, **kwargs: names.append(kernel_name(kernel))):
        launch()
    return names


def compile_kernel(launch: Callable[[], object], name: str, cc: int) -> Compiled:
    """Compile one of the kernels that a call launches; the first, where one is launched twice.

    Raises:
        KeyError: the call launches no such kernel.
    """
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_it(kernel: JITFunction, *args: Any, grid: Any, **kwargs: Any) -> None:
        if kernel_name(kernel) == name and not compiled:
            result = run(
                kernel, *args, grid=grid, warmup=True, **kwargs
            )  # to its cubin, no further
            compiled.append(_read(result, kwargs))

    driver.set_active(_NoDevice(cc))
    with _launches(compile_it):
        launch()
    if not compiled:
        raise KeyError(f"no kernel {name!r} is launched")
    return compiled[0]


def _read(kernel: Any, arguments: Mapping[str, Any]) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "-res-usage", cubin.name)
        text = tool("nvdisasm", "-g", "-c", cubin.name)
    resources = parse_resources(usage)
    return Compiled(
        code=sass.parse(_here(text)),
        registers=resources["REG"],
        stack=resources["STACK"],
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        arguments=arguments,
    )


def tool(name: str, *arguments: str) -> str:
    """What a program of Triton's package prints."""
    path = getattr(triton.knobs.nvidia, name).path
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _here(text: str) -> str:
    """Source paths of this checkout: Triton's cache may hold what another one compiled."""
    return _SOURCE.sub(rf'File "{_PACKAGE}/\1"', text)


def parse_resources(text: str) -> dict[str, int]:
    """What ``cuobjdump -res-usage`` prints of a file with one kernel, by name: ``REG``, ``STACK``.

    Raises:
        ValueError: it prints nothing of the kind.
    """
    line = re.search(r"^ *(REG:.*)$", text, re.MULTILINE)
    if line is None:
        raise ValueError(f"cuobjdump names no resources: {text.strip()!r}")
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line[1])}
