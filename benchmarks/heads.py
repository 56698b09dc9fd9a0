"""The heads: ``sample_hidden`` beside three heads and ``sample``, its time and its error.

``python -m benchmarks.heads --help``; docs/heads.md has the results and what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.choices import parse_choices
from benchmarks.head_cases import (
    APART,
    BATCH_SIZES,
    FUSED,
    PROVIDERS,
    SHAPES,
    HeadCase,
    accuracy,
    first_rows,
    make_calls,
    random_heads,
    trio_heads,
)
from benchmarks.measure import Summary, collect, interleaved, paired_ratios
from benchmarks.op_cases import DTYPES
from benchmarks.plots import plot_heads
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
from benchmarks.trios import TrioMissing, open_trio

_MS = 1e3
_ROWS = 64  # of an accuracy figure


def time_cases(
    shapes: Sequence[str], dtypes: Sequence[str], batch_sizes: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Check, then time; one record per case and provider."""
    records: list[dict[str, Any]] = []
    with make_progress() as progress:
        task = progress.add_task(
            "", total=len(shapes) * len(dtypes) * len(batch_sizes) * len(PROVIDERS) * repeats
        )
        for shape in shapes:
            for dtype in dtypes:
                progress.update(task, description=f"{shape} {dtype}: making weights")
                heads = random_heads(shape, DTYPES[dtype], max(batch_sizes))
                for batch_size in batch_sizes:
                    case = HeadCase(shape, dtype, batch_size)
                    progress.update(task, description=str(case))
                    samples = []
                    calls = make_calls(case, first_rows(heads, batch_size), PROVIDERS)
                    for sample in interleaved(calls, repeats):
                        samples.append(sample)
                        progress.advance(task)
                    records += _records(case, collect(samples))
    return records


def _records(case: HeadCase, seconds: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    for name, times in seconds.items():
        yield {
            "op": FUSED,
            "provider": name,
            **asdict(case),
            "vocab_size": case.vocab_size,
            "hidden_sizes": SHAPES[case.shape][1],
            "milliseconds": asdict(Summary.of(s * _MS for s in times)),
            "weight_gigabytes_per_second": case.weight_bytes / Summary.of(times).median / 1e9,
            "time_over_ours": asdict(paired_ratios(times, seconds[FUSED])),
        }


def measure_accuracy() -> list[dict[str, Any]]:
    """Errors of x in bf16: real hidden states where there is a trio, else random ones."""
    records: list[dict[str, Any]] = []
    for name in ("shipped", "qwen"):
        try:
            trio = open_trio(name, "bfloat16")
        except TrioMissing as error:
            console.print(f"No accuracy of {name}: {error}", soft_wrap=True)
            continue
        heads = trio_heads(trio, 4, _ROWS // 4)
        figures = accuracy(heads, trio.vocab_size, _ROWS)
        records.append({"op": "heads accuracy", "heads": f"{name} trio", **figures})
    heads = random_heads("llama-2", torch.bfloat16, _ROWS)
    figures = accuracy(heads, SHAPES["llama-2"][0], _ROWS)
    records.append({"op": "heads accuracy", "heads": "llama-2 shape, random", **figures})
    return records


def print_times(records: Sequence[dict[str, Any]]) -> None:
    """Table of times."""
    columns = ("provider", "ms", "p10", "p90", "GB/s", "x ours")
    caption = (
        "GB/s: bytes of the three weights, each counted once, over the time. x ours: paired by "
        f"repeat. Medians. top_p 0.9. {machine_line()}"
    )
    table = make_table("From hidden states to tokens", columns, caption)
    previous = None
    for r in records:
        case = HeadCase(r["shape"], r["dtype"], r["batch_size"])
        if case != previous:
            table.add_section()
            table.add_row(f"[bold]{case}")
            previous = case
        times = r["milliseconds"]
        table.add_row(
            r["provider"],
            *(significant(times[name]) for name in ("median", "p10", "p90")),
            significant(r["weight_gigabytes_per_second"]),
            significant(r["time_over_ours"]["median"]),
        )
    console.print(table)


def print_accuracy(records: Sequence[dict[str, Any]]) -> None:
    """Table of errors."""
    columns = ("x in bf16 models", "largest error", "rms", "greedy", "kept", "drawn")
    caption = (
        "Against exact heads, fp64, at alpha 1. greedy, kept, drawn: rows whose likeliest token, "
        "kept set (T 0.7, top_p 0.9) or draw of the same seed is another."
    )
    table = make_table("", columns, caption)
    for r in records:
        table.add_section()
        table.add_row(f"[bold]{r['heads']}, {r['rows']} rows, |x| up to {r['largest_x']:.0f}")
        for name in (FUSED, APART):
            f = r[name]
            differ = (f["greedy_differs"], f["kept_differs"], f["token_differs"])
            errors = (f"{f['largest_error']:.2g}", f"{f['rms_error']:.2g}")
            table.add_row(name, *errors, *(fixed(n, 0) for n in differ))
        table.add_row("bound of sample_hidden", f"{r['bound']:.2g}")
    console.print(table)


def main(
    shapes: Annotated[str, typer.Option(help=f"Of {','.join(SHAPES)}.")] = ",".join(SHAPES),
    dtypes: Annotated[str, typer.Option(help=f"Of {','.join(DTYPES)}.")] = "bfloat16,float32",
    batch_sizes: Annotated[
        str, typer.Option(help=f"Of {','.join(map(str, BATCH_SIZES))}.")
    ] = ",".join(map(str, BATCH_SIZES)),
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each, interleaved.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1,
    output: Annotated[Path, typer.Option(help="JSON lines.")] = RESULTS / "heads.jsonl",
    plot: Annotated[bool, typer.Option(help="Also a PNG beside the output.")] = True,
    errors: Annotated[bool, typer.Option(help="Also the error of x.")] = True,
) -> None:
    """Time heads and sampling, fused and apart, and measure the error of x. On a CPU."""
    torch.set_num_threads(threads)
    records = time_cases(
        parse_choices("--shapes", shapes, SHAPES, None),
        parse_choices("--dtypes", dtypes, DTYPES, None),
        parse_choices("--batch-sizes", batch_sizes, BATCH_SIZES, None),
        repeats,
    )
    accuracies = measure_accuracy() if errors else []
    write_json_lines(output, "heads", [*records, *accuracies])
    print_times(records)
    if accuracies:
        print_accuracy(accuracies)
    console.print(f"Wrote {output}", soft_wrap=True)
    if plot:
        picture = output.with_suffix(".png")
        plot_heads(records, picture)
        console.print(f"Wrote {picture}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
