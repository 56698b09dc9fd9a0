"""The operators alone: microseconds, GB/s and memory of ``sample`` beside its peers.

``python -m benchmarks.kernels --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import proxytune_kernels as ptk
from benchmarks.choices import parse_choices
from benchmarks.logits import KINDS
from benchmarks.measure import Summary, collect, interleaved, paired_ratios
from benchmarks.memory import in_fresh_process
from benchmarks.op_cases import (
    ALL_CASES,
    BATCH_SIZES,
    DEFAULT_CASES,
    DTYPES,
    FILTERS,
    OURS,
    PROVIDERS,
    VOCAB_SIZES,
    OpCase,
    make_calls,
)
from benchmarks.peers import ALPHA
from benchmarks.plots import plot_kernels
from benchmarks.report import (
    RESULTS,
    console,
    fixed,
    machine_line,
    make_progress,
    make_table,
    significant,
    write_json_lines,
)
from proxytune_kernels.ops.table import OPERATORS

_US = 1e6
_MIB = 2**20


def time_cases(
    cases: Sequence[OpCase], providers: Sequence[str], repeats: int, buffers: int
) -> list[dict[str, Any]]:
    """Check, then time every case; one record per case and provider."""
    records = []
    with make_progress() as progress:
        task = progress.add_task("", total=len(cases) * len(providers) * repeats)
        for case in cases:
            progress.update(task, description=f"{case}: checking")
            calls = make_calls(case, providers, buffers)
            progress.update(task, description=str(case))
            samples = []
            for sample in interleaved(calls, repeats):
                samples.append(sample)
                progress.advance(task)
            records += _records(case, collect(samples))
    return records


def _records(case: OpCase, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    ours = seconds.get(OURS)
    filters = FILTERS[case.filters]
    return [
        {
            "op": "sample",
            "provider": name,
            **asdict(case),
            "sampling": {"alpha": ALPHA, **asdict(filters)},
            "microseconds": asdict(Summary.of(s * _US for s in times)),
            "gigabytes_per_second": case.logits_bytes / Summary.of(times).median / 1e9,
            "time_over_ours": None if ours is None else asdict(paired_ratios(times, ours)),
        }
        for name, times in seconds.items()
    ]


def time_overhead(repeats: int) -> dict[str, Any]:
    """Microseconds of a call that has nothing to do: B = 1, V = 1, parameters prepared.

    The whole of it bounds what ``ptk.sample`` adds to the kernel's own time from above. With the
    C++ backend the bare operator on prepared outputs is timed beside it: its share is the
    dispatcher and the kernel's entry, the rest Python.
    """
    row = torch.zeros(1, 1)
    logits = (row, row.clone(), row.clone())
    params = ptk.RowParams.make(1, temperature=0.7, top_p=0.9)
    out = ptk.sample(*logits, params)
    calls: dict[str, Any] = {
        "sample": lambda: ptk.sample(*logits, params),
        "sample, out given": lambda: ptk.sample(*logits, params, out=out),
    }
    if ptk.backends()["cpu"] is None:
        arguments = (*logits, *params, None, None, 1, 0, 0)
        results = torch.ops.proxytune.sample(*arguments)
        outputs = dict(zip(OPERATORS["sample"].out_names, results, strict=True))
        calls["bare operator"] = lambda: torch.ops.proxytune.sample_out(*arguments, **outputs)
    seconds = collect(interleaved(calls, repeats))
    return {
        "op": "sample overhead",
        "microseconds": {n: asdict(Summary.of(s * _US for s in t)) for n, t in seconds.items()},
    }


def measure_memory(threads: int) -> list[dict[str, Any]]:
    """Peak extra memory of the operators, each in a fresh process."""
    vocab_size, tokens, dtype = 128_256, 512, "float32"
    where = {"vocab_size": vocab_size, "dtype": dtype, "threads": threads}
    peaks = [
        {
            "op": "sample memory",
            **where,
            "batch_size": size,
            **in_fresh_process("benchmarks.op_memory:sample_peak", batch_size=size, **where),
        }
        for size in BATCH_SIZES
    ]
    score = in_fresh_process("benchmarks.op_memory:score_peak", tokens=tokens, **where)
    control = in_fresh_process("benchmarks.op_memory:control_peak", vocab_size=vocab_size)
    return [
        *peaks,
        {"op": "score memory", **where, "batch_size": 1, "tokens": tokens, **score},
        {"op": "memory control", "vocab_size": vocab_size, **control},
    ]


def print_times(records: Sequence[dict[str, Any]]) -> None:
    """Table of times."""
    columns = ("provider", "us", "p10", "p90", "GB/s", "x ours")
    caption = (
        "GB/s: bytes of the three roles' logits, each counted once, over the time. x ours: paired "
        f"by repeat. Medians. {machine_line()}"
    )
    table = make_table("sample: combine, filter and draw one token per row", columns, caption)
    previous = None
    for r in records:
        case = OpCase(r["kind"], r["dtype"], r["filters"], r["vocab_size"], r["batch_size"])
        if case != previous:
            table.add_section()
            table.add_row(f"[bold]{case.kind} {case.dtype} {case.filters}")
            table.add_row(f"[bold]V={case.vocab_size:,} B={case.batch_size}")
            previous = case
        times, ratio = r["microseconds"], r["time_over_ours"]
        table.add_row(
            r["provider"],
            *(significant(times[name]) for name in ("median", "p10", "p90")),
            significant(r["gigabytes_per_second"]),
            significant(ratio and ratio["median"]),
        )
    console.print(table)


def print_memory(records: Sequence[dict[str, Any]]) -> None:
    """Table of peak extra memory."""
    columns = ("peak extra memory, V = 128,256, fp32", "MiB", "fp32 rows", "share of logits")
    caption = (
        "Each in a fresh process. The control writes one row: how far its figure is from 1 row is "
        "how far any of these may be."
    )
    table = make_table("", columns, caption)
    for r in records:
        name = r["op"].removesuffix(" memory")
        shape = f" [1, {r['tokens']}, V]" if "tokens" in r else ""
        shape = f" B={r['batch_size']}" if name == "sample" else shape
        share = 100 * r["extra_bytes"] / r["logits_bytes"] if "logits_bytes" in r else None
        table.add_row(
            f"{name}{shape}",
            fixed(r["extra_bytes"] / _MIB),
            fixed(r["extra_bytes"] / r["row_bytes"], 1),
            fixed(share, 1, "%"),
        )
    console.print(table)


def main(
    full: Annotated[bool, typer.Option(help="Every combination instead of a subset.")] = False,
    kinds: Annotated[str | None, typer.Option(help=f"Of {','.join(KINDS)}.")] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"Of {','.join(DTYPES)}.")] = None,
    filters: Annotated[str | None, typer.Option(help=f"Of {','.join(FILTERS)}.")] = None,
    vocab_sizes: Annotated[
        str | None, typer.Option(help=f"Of {','.join(map(str, VOCAB_SIZES))}.")
    ] = None,
    batch_sizes: Annotated[
        str | None, typer.Option(help=f"Of {','.join(map(str, BATCH_SIZES))}.")
    ] = None,
    providers: Annotated[str, typer.Option(help=f"Of {','.join(PROVIDERS)}.")] = ",".join(
        PROVIDERS
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each, interleaved.")] = 9,
    buffers: Annotated[
        int, typer.Option(min=1, help="Sets of logits to go through in turn at B = 1.")
    ] = 4,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1,
    output: Annotated[Path, typer.Option(help="JSON lines.")] = RESULTS / "kernels.jsonl",
    plot: Annotated[bool, typer.Option(help="Also a PNG beside the output.")] = True,
    memory: Annotated[bool, typer.Option(help="Also peak memory.")] = True,
) -> None:
    """Time `sample` alone beside its peers. Naming any axis measures the product of the axes."""
    torch.set_num_threads(threads)
    axes = (
        ("--kinds", kinds, KINDS, "peaked"),
        ("--dtypes", dtypes, DTYPES, "float32"),
        ("--filters", filters, FILTERS, "top_p"),
        ("--vocab-sizes", vocab_sizes, VOCAB_SIZES, 128_256),
        ("--batch-sizes", batch_sizes, BATCH_SIZES, 1),
    )
    cases: Sequence[OpCase] = ALL_CASES if full else DEFAULT_CASES
    if any(text is not None for _, text, _, _ in axes):
        cases = [OpCase(*values) for values in product(*(parse_choices(*axis) for axis in axes))]
    names = parse_choices("--providers", providers, PROVIDERS, OURS)
    overhead = time_overhead(repeats)
    records = time_cases(cases, names, repeats, buffers)
    peaks = measure_memory(threads) if memory else []
    write_json_lines(output, "kernels", [*records, overhead, *peaks])
    print_times(records)
    microseconds = {n: f"{s['median']:.1f}" for n, s in overhead["microseconds"].items()}
    console.print(f"Per call with nothing to do (B = 1, V = 1), us: {microseconds}")
    if peaks:
        print_memory(peaks)
    console.print(f"Wrote {output}", soft_wrap=True)
    if plot:
        picture = output.with_suffix(".png")
        plot_kernels(records, picture)
        console.print(f"Wrote {picture}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
