"""Compiles Triton's kernels as a launch on a GPU would, without one, and counts what came out.

The operators run on CPU tensors up to their launches, and Triton specialises and compiles what they
pass. Only the driver is replaced, by one that names a GPU which isn't there; nothing is launched.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import proxytune_kernels
from benchmarks.harness.report import progress_bar
from benchmarks.static import sass
from benchmarks.static.budgets import over_budget
from benchmarks.static.cases import CASES, Route
from benchmarks.static.figures import WARP, Compiled, Figures, RouteFigures, Unit, count
from benchmarks.static.sass import CannotFollow, Code, Instruction
from proxytune_kernels.kernels import common

PROCESSORS = 132  # of an H100; what launchers ask the device for
_PACKAGE = Path(proxytune_kernels.__file__).parent
_SOURCE = re.compile(rf'File "[^"]*/{_PACKAGE.name}/([^"]+)"')

LOGITS = re.compile(r"\b(base|expert|anti) = tl\.load\(")
"""Source lines that read the roles' logits (`combined` in kernels/common.py)."""
BASE = re.compile(r"\bbase = tl\.load\(")


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


def compile_kernel(launch: Callable[[], object], name: str, cc: int) -> Compiled:
    """Compile one of the kernels that a call launches; the first, where one is launched twice.

    Args:
        launch: the call.
        name: of the kernel, ``scan`` for ``_scan_kernel``.
        cc: compute capability.
    """
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_it(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if str(kernel.__name__).strip("_").removesuffix("_kernel") == name and not compiled:
            # Warming up stops where the machine code is there.
            result = run(kernel, *args, grid=grid, warmup=True, **kwargs)
            compiled.append(_read(result, kwargs))

    driver.set_active(_NoDevice(cc))
    processors = mock.patch.object(common, "processors", lambda device: PROCESSORS)
    with mock.patch.object(JITFunction, "run", compile_it), processors:
        launch()
    if not compiled:
        raise KeyError(f"no kernel {name!r} is launched")
    return compiled[0]


def _read(kernel: Any, arguments: Mapping[str, Any]) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        resources = sass.parse_resources(tool("cuobjdump", "-res-usage", cubin.name))
        text = tool("nvdisasm", "-g", "-c", cubin.name)
    # Source paths of this checkout: Triton's cache may hold what another one compiled.
    code = sass.parse(_SOURCE.sub(rf'File "{_PACKAGE}/\1"', text))
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return Compiled(code, resources["REG"], resources["STACK"], shared, warps, arguments)


def tool(name: str, *arguments: str) -> str:
    """What a program of Triton's package prints."""
    path = getattr(triton.knobs.nvidia, name).path
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def reads_logits(i: Instruction) -> bool:
    """Whether it was made for a source line that reads the roles' logits."""
    return LOGITS.search(i.source) is not None


def figures_of(compiled: Compiled, cc: int, routes: Iterable[Route]) -> Figures:
    """Count."""
    found = {route.name: _route_figures(compiled, route) for route in routes}
    return count(compiled, cc, reads_logits, found)


def _route_figures(compiled: Compiled, route: Route) -> RouteFigures:
    path = follow(compiled.code, route)
    loads = [i for i in path if i.stem == "LDG" and reads_logits(i)]
    tokens = route.tokens(compiled.arguments) / (compiled.warps * WARP)
    return RouteFigures(
        instructions=len(path) / tokens,
        logits_loads=len(loads) / tokens,
        logits_bytes=sum(i.access_bytes for i in loads) / tokens,
    )


def follow(code: Code, route: Route) -> Sequence[Instruction]:
    """The instructions of a route."""
    for mark in (*route.passes, *route.avoids):
        if not any(map(mark.holds, code.instructions)):
            raise CannotFollow(f"route {route.name!r}: no {mark.stem} from {mark.text!r}")

    def unwanted(i: Instruction) -> bool:
        masked = i.stem == "LDG" and i.predicate != "" and BASE.search(i.source) is not None
        return masked or any(mark.holds(i) for mark in route.seldom)

    def excluded(i: Instruction) -> bool:
        return any(mark.holds(i) for mark in route.avoids)

    return code.longest_path([mark.holds for mark in route.passes], excluded, unwanted)


def units(ccs: Iterable[int], kernels: Iterable[str] | None = None) -> list[Unit]:
    """All that is compiled, or the kernels named."""
    chosen = None if kernels is None else set(kernels)
    return [
        Unit(case.name, kernel, cc)
        for case in CASES.values()
        for kernel in case.kernels
        for cc in ccs
        if chosen is None or kernel in chosen
    ]


def _measure(unit: Unit) -> Figures:
    case = CASES[unit.case]
    compiled = compile_kernel(lambda: case.launch(case), unit.kernel, unit.cc)
    return figures_of(compiled, unit.cc, case.routes.get(unit.kernel, ()))


def measure(wanted: Sequence[Unit]) -> dict[Unit, Figures]:
    """Compile and count, with a progress bar; in as many processes as there are cores."""
    workers = min(len(wanted), len(os.sched_getaffinity(0)))
    spawn = multiprocessing.get_context("spawn")  # compilers' threads do not survive a fork
    figures: dict[Unit, Figures] = {}
    with (
        progress_bar(len(wanted), "Compiling") as tick,
        ProcessPoolExecutor(workers, spawn) as pool,
    ):
        jobs = {pool.submit(_measure, unit): unit for unit in wanted}
        try:
            for job in as_completed(jobs):
                unit = jobs[job]
                try:
                    figures[unit] = job.result()
                except Exception as error:
                    raise RuntimeError(f"{unit}: {type(error).__name__}: {error}") from error
                tick(f"Compiled {unit}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {unit: figures[unit] for unit in wanted}


def broken_promises(figures: Mapping[Unit, Figures]) -> Iterator[str]:
    """What does not keep its budget."""
    for unit, one in figures.items():
        case = CASES[unit.case]
        for what in over_budget(unit.kernel, one, case.aligned, case.bytes_per_token):
            yield f"{unit}: {what}"
