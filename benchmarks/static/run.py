"""Compiles all cases in a few processes, and keeps and compares their figures."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import make_progress
from benchmarks.static.budgets import over_budget, worse
from benchmarks.static.cases import CASES, Case
from benchmarks.static.compiling import compile_kernel
from benchmarks.static.figures import Figures, figures_of

_CASES = {case.name: case for case in CASES}


class Unit(NamedTuple):
    """One kernel of one case for one compute capability."""

    case: str
    kernel: str
    cc: int

    def __str__(self) -> str:
        return f"{self.case}/{self.kernel} cc {self.cc}"


def units(ccs: Iterable[int], kernels: Iterable[str] | None = None) -> list[Unit]:
    """All that is compiled, or the kernels named."""
    chosen = None if kernels is None else set(kernels)
    return [
        Unit(case.name, kernel, cc)
        for case in CASES
        for kernel in case.kernels
        for cc in ccs
        if chosen is None or kernel in chosen
    ]


def case_of(unit: Unit) -> Case:
    """The unit's case."""
    return _CASES[unit.case]


def _measure(unit: Unit) -> Figures:
    case = case_of(unit)
    compiled = compile_kernel(lambda: case.launch(case.shape), unit.kernel, unit.cc)
    return figures_of(compiled, unit.cc, case.routes.get(unit.kernel, ()))


def measure(wanted: Sequence[Unit]) -> dict[Unit, Figures]:
    """Compile and count, with a progress bar; in as many processes as there are cores.

    Raises:
        RuntimeError: names the unit that could not be compiled or followed.
    """
    workers = min(len(wanted), len(os.sched_getaffinity(0)))
    spawn = multiprocessing.get_context("spawn")  # compilers' threads do not survive a fork
    figures: dict[Unit, Figures] = {}
    with make_progress() as progress, ProcessPoolExecutor(workers, spawn) as pool:
        task = progress.add_task("Compiling", total=len(wanted))
        jobs = {pool.submit(_measure, unit): unit for unit in wanted}
        try:
            for job in as_completed(jobs):
                unit = jobs[job]
                try:
                    figures[unit] = job.result()
                except Exception as error:
                    raise RuntimeError(f"{unit}: {type(error).__name__}: {error}") from error
                progress.update(task, advance=1, description=f"Compiled {unit}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {unit: figures[unit] for unit in wanted}


@dataclass(frozen=True)
class Stored:
    """Figures as the repository keeps them, and the compiler that they were obtained with."""

    compiler: str
    figures: Mapping[Unit, Figures]

    def write(self, path: Path) -> None:
        """Write JSON: no date and no machine, so that the same code gives the same file."""
        records = [{**unit._asdict(), **f.record()} for unit, f in self.figures.items()]
        lines = ",\n".join(json.dumps(record) for record in records)
        path.write_text(f'{{"compiler": "{self.compiler}", "kernels": [\n{lines}\n]}}\n')

    @staticmethod
    def read(path: Path) -> Stored:
        """What :meth:`write` wrote.

        Raises:
            OSError: the file can't be read.
        """
        content: dict[str, Any] = json.loads(path.read_text())
        figures = {}
        for record in content["kernels"]:
            unit = Unit(*(record.pop(field) for field in Unit._fields))
            figures[unit] = Figures.of_record(record)
        return Stored(content["compiler"], figures)


def broken_promises(figures: Mapping[Unit, Figures]) -> Iterator[str]:
    """What does not keep its budget."""
    for unit, one in figures.items():
        case = case_of(unit)
        for what in over_budget(unit.kernel, one, case.aligned, case.shape.bytes_per_token):
            yield f"{unit}: {what}"


class Comparison(NamedTuple):
    """Figures beside those stored."""

    complaints: list[str]
    summary: str


def compare(now: Stored, stored: Stored, complete: bool) -> Comparison:
    """What got worse, or is on one side only; ``complete`` where all kernels were compiled."""
    if now.compiler != stored.compiler:
        return Comparison(
            [],
            f"The stored figures are {stored.compiler}'s, these are {now.compiler}'s: they are not "
            "compared, budgets alone are checked.",
        )
    complaints, changed = [], 0
    for unit, figures in now.figures.items():
        if unit not in stored.figures:
            complaints.append(f"{unit}: no figures are stored")
            continue
        changed += figures != stored.figures[unit]
        complaints += [f"{unit}: {what}" for what in worse(figures, stored.figures[unit])]
    if complete:
        gone = stored.figures.keys() - now.figures.keys()
        complaints += [f"{unit}: figures are stored, but there is no such kernel" for unit in gone]
    summary = (
        f"{len(now.figures)} kernels of {now.compiler} compared, {changed} have other figures than "
        "stored."
    )
    if changed or complaints:
        summary += " `python -m benchmarks.static --write` stores them."
    return Comparison(complaints, summary)
