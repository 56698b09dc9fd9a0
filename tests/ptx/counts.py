"""What rows cost, in instructions executed from PTX: ``python -m tests.ptx.counts [FILTER]``.

    python -m tests.ptx.counts                        # all cases
    python -m tests.ptx.counts peaked top_k=65        # those with all of these words in their names
    python -m tests.ptx.counts peaked top_k=65 --lines draw    # where draw's instructions are
    python -m tests.ptx.counts --write                # into benchmarks/results/ptx.md
    python -m tests.ptx.counts --check                # fail where one is worse than stored there

A program of more than 400,000 instructions a warp is a cliff: it is given up there, which a "+"
shows. --whole goes on to the end.

A case is one row of V = 128,256 in bf16 with its parameters. For each launch of its call stand the
instructions and the barriers of the row's longest program, counted for its longest warp, and how
often the row is read: bytes that the row's programs load, by those of its logits. At B=256 a row
has the programs that it has in a batch of 256 on 132 multiprocessors, at B=1 all that a launch
takes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

import proxytune_kernels as ptk
from tests import rows
from tests.ptx import build
from tests.ptx.device import Device, Launched
from tests.ptx.instructions import NUMBER
from tests.ptx.program import Order, Program

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "ptx.md"
OPS: Any = ptk  # called with roles unpacked
CAPABILITY = 90
VOCAB_SIZE = 128_256
PROCESSORS = 132  # of an H100
CLIFF = 400_000
"""Instructions of a warp at which a program is given up: at 9 million it takes ten seconds."""
TOLERANCE = 1.02
"""torch's normal numbers differ in the last bit from one processor to another."""
IDLE = 100  # instructions: a launch that finds nothing to do

_ORDERS = ("vllm", "hf", "joint")
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature=0.7": dict(temperature=0.7),
    "greedy": dict(temperature=0.0),
    **{f"top_p={p}": dict(top_p=p) for p in (0.9, 0.95, 0.99, 0.999)},
    "top_p=0.9 temperature=0.7": dict(top_p=0.9, temperature=0.7),
    **{f"top_k={k}": dict(top_k=k) for k in (50, 64, 65, 100, 200, 1000)},
    **{f"min_p={p}": dict(min_p=p) for p in (0.01, 0.02, 0.05, 0.1)},
    **{f"top_k={k} min_p={p}": dict(top_k=k, min_p=p) for k in (50, 200) for p in (0.01, 0.05)},
    **{
        f"top_k={k} top_p={p} {order}": dict(top_k=k, top_p=p, filter_order=order)
        for k in (50, 64, 65, 100, 200, 1000)
        for p in (0.9, 0.95)
        for order in _ORDERS
    },
}
"""Parameters by a case's name, behind its kind of row."""
OF_ALL = tuple(
    name for name in SETTINGS
    if "top_k" not in name or name in ("top_k=50", "top_k=1000", "top_k=65 top_p=0.95 vllm")
)  # fmt: skip
"""Those of every kind and of both batches: the number of programs changes nothing in others."""
TOP = (5, 20, 64, 128)
"""Numbers of top_logprobs, of rows without a filter."""


class Case(NamedTuple):
    """One row: its kind, its parameters, top_logprobs, and the batch that it is part of."""

    kind: str
    setting: str
    top: int
    batch: int

    def __str__(self) -> str:
        top = f" top_logprobs={self.top}" if self.top else ""
        return f"{self.kind} {self.setting}{top} B={self.batch}"


class Cost(NamedTuple):
    """Of one launch, by the row's longest program; reads: of the row, by all of its programs."""

    instructions: int  # a warp
    barriers: int
    reads: float


Costs = dict[str, Cost]
"""By launch, in order."""


def cases() -> list[Case]:
    """All that is counted."""
    found = []
    for kind in rows.KINDS:
        few = kind in ("infinite", "constant")
        found += [Case(kind, name, 0, 1) for name in SETTINGS if not few or name in OF_ALL]
        found += [Case(kind, name, 0, 256) for name in OF_ALL]
        found += [Case(kind, "none", n, 1) for n in TOP]
    return found


def count(
    group: Sequence[Case],
    cut: int = CLIFF,
    executed: Callable[[Program], Any] = lambda program: None,
) -> dict[Case, Costs]:
    """Run cases of one batch and one top_logprobs, in one call; programs up to ``cut``."""
    costs: dict[Case, Costs] = {case: {} for case in group}
    made = {
        kind: rows.make(kind, 1, VOCAB_SIZE, torch.bfloat16) for kind in {c.kind for c in group}
    }
    roles: Any = [torch.cat([made[case.kind][i] for case in group]) for i in range(3)]
    each: Any = [ptk.SamplingParams(seed=3, **SETTINGS[case.setting]) for case in group]
    params, case = ptk.RowParams.from_sampling_params(each), group[0]

    def note(one: Launched) -> None:
        for case, cost in zip(group, _by_row(one, len(group)), strict=True):
            costs[case][one.name] = cost

    # As many programs a row as the batch would get: two waves over the device (splits_of).
    splits = -(-2 * PROCESSORS // case.batch)
    processors = len(group) * splits // 2
    order = Order(cut=cut)
    with Device(CAPABILITY, order, processors, on_launch=[note], executed=executed):
        OPS.sample(*roles, params, backend="triton", top_logprobs=case.top)
    return costs


def count_all(chosen: Sequence[Case], cut: int) -> dict[Case, Costs]:
    """In as many processes as there are cores."""
    groups: dict[tuple[str, int, int], list[Case]] = defaultdict(list)
    for case in chosen:
        groups[case.kind, case.top, case.batch].append(case)
    spawn = multiprocessing.get_context("spawn")  # compilers' threads do not survive a fork
    found: dict[Case, Costs] = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn) as pool:
        for costs in pool.map(count, groups.values(), itertools.repeat(cut)):
            found |= costs
    return {case: found[case] for case in chosen}


def _by_row(one: Launched, number: int) -> list[Cost]:
    """A launch's costs by row: the first dimension of a grid is of rows, or of rows' programs."""
    programs = len(one.report.steps)
    index = np.arange(programs)
    row = index % number if len(one.grid) > 1 else index // (programs // number)
    found = []
    for r in range(number):
        own = index[row == r]
        longest = own[one.report.steps[own].argmax()]
        reads = one.report.read[own].sum() / (3 * 2 * VOCAB_SIZE)
        steps, barriers = one.report.steps[longest], one.report.barriers[longest]
        found.append(Cost(int(steps), int(barriers), round(float(reads), 2)))
    return found


def longest(costs: Costs) -> int:
    return max(cost.instructions for cost in costs.values())


# The stored table ---------------------------------------------------------------------------------

_HEAD = f"""# Executed instructions

What `python -m tests.ptx.counts --write` counted; [docs/ptx.md](../../docs/ptx.md) says how. PTX
for compute capability {CAPABILITY / 10:.1f} by Triton {{version}}. One cell is one launch:
instructions a warp of the longest program, its barriers, how often the row is read. A launch that
finds nothing to do has none.

"""


def _number(instructions: int) -> str:
    """``400,000+`` where a program was given up."""
    return f"{instructions - 1:,}+" if instructions == CLIFF + 1 else f"{instructions:,}"


def table(costs: dict[Case, Costs]) -> str:
    """Markdown, one line for a case."""
    launches = list(dict.fromkeys(name for one in costs.values() for name in one))
    lines = [["case", "longest", *launches], ["---"] * (2 + len(launches))]
    for case, one in costs.items():
        cells = [
            f"{_number(c.instructions)} / {c.barriers:,} / {c.reads:.2f}"
            if (c := one.get(name)) is not None and c.instructions >= IDLE
            else ""
            for name in launches
        ]
        lines.append([str(case), _number(longest(one)), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read(text: str) -> dict[str, Costs]:
    """The costs of a table, by case."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line[:1] == "|"]
    (_, _, *launches), _, *body = ([cell.strip() for cell in line] for line in lines)
    found: dict[str, Costs] = {}
    for name, _, *cells in body:
        parts = [cell.replace(",", "").split(" / ") for cell in cells]
        found[name] = {
            launch: Cost(int(part[0].strip("+")), int(part[1]), float(part[2]))
            for launch, part in zip(launches, parts, strict=True)
            if part[0]
        }
    return found


def worse(now: Costs, stored: Costs) -> Iterator[str]:
    """What a case takes more of, with both values; work may move from one launch to another."""
    if min(longest(now), longest(stored)) >= CLIFF:
        return  # both were given up somewhere
    measures: dict[str, Callable[[Costs], float]] = {
        "instructions of the longest program": longest,
        "instructions of the longest programs of all launches": lambda costs: sum(
            cost.instructions for cost in costs.values()
        ),
        "their barriers": lambda costs: sum(cost.barriers for cost in costs.values()),
        "reads of the row": lambda costs: sum(cost.reads for cost in costs.values()),
    }
    busy = {name: cost for name, cost in now.items() if cost.instructions >= IDLE}
    for name, measure in measures.items():
        new, old = measure(busy), measure(stored)
        if new > old * TOLERANCE + 0.05:
            yield f"{new:,.4g} {name}, were {old:,.4g}"


# Source lines -------------------------------------------------------------------------------------


def lines_of(program: Program, executed: Any) -> list[tuple[int, int, str]]:
    """Executed instructions and barriers by source line, the most first."""
    where = "?"
    at: dict[int, str] = {}
    for number, line in enumerate(program.lines, 1):
        if found := re.search(r"\.loc\s.*//\s*(.*)", line):
            names = re.findall(r"(\w+\.py:\d+)", found[1])
            own = [name for name in names if not name.startswith("standard")]
            where = " < ".join(own[:4]) or "?"
        at[number] = where
    steps: Counter[str] = Counter()
    barriers: Counter[str] = Counter()
    for words, times in zip(program.words, executed, strict=True):
        steps[at[int(words[18])]] += int(times)
        barriers[at[int(words[18])]] += int(times) * (words[0] == NUMBER["bar.sync"])
    return [(times, barriers[name], name) for name, times in steps.most_common()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("filter", nargs="*", help="words that a case's name holds")
    parser.add_argument(
        "--lines", metavar="LAUNCH", help="its instructions by source line, of all warps"
    )
    parser.add_argument("--write", action="store_true", help=f"store them: {RESULTS.name}")
    parser.add_argument("--check", action="store_true", help="fail where one is worse than stored")
    parser.add_argument("--whole", action="store_true", help="programs to their end, cliffs too")
    given = parser.parse_intermixed_args()
    if (reason := build.missing()) is not None:
        print(f"Nothing is counted: {reason}")
        return
    stored = read(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = [case for case in cases() if set(given.filter) <= set(str(case).split())]
    if not chosen:
        sys.exit(f"no case has all of {given.filter} in its name; kinds: {', '.join(rows.KINDS)}")
    counters: dict[str, tuple[Program, Any]] = {}

    def counter(program: Program) -> Any:
        if given.lines not in program.name:
            return None
        kept = counters.setdefault(program.name, (program, np.zeros(len(program.words), np.int64)))
        return kept[1]

    if given.lines is not None and len({(case.top, case.batch) for case in chosen}) > 1:
        sys.exit("--lines is for cases of one batch and one top_logprobs: name B=1 or B=256")
    cut = 0 if given.whole else CLIFF
    costs = count_all(chosen, cut) if given.lines is None else count(chosen, cut, counter)
    print(table(costs), end="")
    for program, executed in counters.values():
        print(f"\n{program.name}, warp instructions {executed.sum():,}:")
        for times, barriers, where in lines_of(program, executed)[:30]:
            print(
                f"{times / max(1, executed.sum()):6.1%} {times:12,} barriers {barriers:9,}  {where}"
            )
    if given.write:
        assert not given.filter, "--write stores all cases"
        RESULTS.write_text(_HEAD.format(version=triton.__version__) + table(costs))
    if given.check:
        if f"Triton {triton.__version__}" not in RESULTS.read_text():
            print(f"No counts of Triton {triton.__version__} are stored.")
            return
        pairs = {case: (one, stored.get(str(case))) for case, one in costs.items()}
        bad = [f"{case}: no counts are stored" for case, (_, old) in pairs.items() if not old]
        both = [(case, one, old) for case, (one, old) in pairs.items() if old]
        bad += [f"{case}: {what}" for case, one, old in both for what in worse(one, old)]
        better = sum(longest(one) < longest(old) / TOLERANCE for _, one, old in both)
        print(
            f"{len(both)} cases compared: {len(bad)} complaints, {better} are better than stored."
        )
        if bad:
            sys.exit("\n".join(bad))


if __name__ == "__main__":
    main()
