"""How many drafts are kept: both modes, both drafters, three kinds of text, side by side.

``python -m benchmarks.acceptance --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import options
from benchmarks.agreement import ComputedTwice, Mismatch, first_mismatch
from benchmarks.choices import parse_choices
from benchmarks.decoding_plots import plot_acceptance
from benchmarks.drafts import Row, Run, decode, expected, text_of, tokens_per_round, tried_drafts
from benchmarks.prompts import KINDS, make_prompts, task_batches, task_tokens
from benchmarks.providers import NaiveLoop, Prompts
from benchmarks.report import (
    RESULTS,
    console,
    fixed,
    machine_line,
    make_progress,
    make_table,
    write_json_lines,
)
from benchmarks.trios import open_trio
from proxytune_kernels import Speculation, Trio
from proxytune_kernels.decoder.speculation import DRAFTERS
from proxytune_kernels.ops import VERIFY_MODES

_PROMPT_LENGTH = 32  # of text, which has no length of its own
_TOKENS = 32

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    trio: str
    dtype: str | None
    kinds: tuple[str, ...]
    drafts: tuple[int, ...]
    prompts: int
    tokens: int | None
    temperature: float

    def tokens_of(self, kind: str) -> int:
        """Output tokens of a request: as told; else as many as half of the solutions have."""
        return self.tokens or (task_tokens(self.trio) if kind == "arithmetic" else _TOKENS)

    @property
    def runs(self) -> int:
        """How many there are of a kind, plain decoding included."""
        return 1 + len(DRAFTERS) * len(VERIFY_MODES) * len(self.drafts)


def prompts_of(trio: Trio, settings: Settings, kind: str) -> Prompts:
    """Prompts of a kind, at most as many as asked for."""
    if kind == "text":
        return make_prompts(trio, settings.prompts, _PROMPT_LENGTH)
    tokens = settings.tokens_of(kind)
    return [
        prompt for [prompt] in task_batches(trio, settings.trio, kind, 1, tokens, settings.prompts)
    ]


class KindOfText:
    """Decodes the prompts of one kind in every way, and compares.

    Args:
        trio: the models.
        settings: what to measure.
        kind: of the prompts.
    """

    def __init__(self, trio: Trio, settings: Settings, kind: str) -> None:
        self.trio = trio
        self.settings = settings
        self.kind = kind
        self._prompts = prompts_of(trio, settings, kind)
        self._plain: Run | None = None
        self._computed: dict[int, ComputedTwice] = {}

    def measure(self, tick: Callable[[str], object]) -> list[Record]:
        """A record for each drafter, mode and number of drafts; ``tick`` after each run."""
        self._plain = self._decode(None)
        tick(f"{self.kind}: plain")
        records = []
        for drafter, mode, drafts in product(DRAFTERS, VERIFY_MODES, self.settings.drafts):
            records.append(self._record(drafter, mode, drafts))
            tick(f"{self.kind}: {drafter}, {mode}, {drafts}")
        return records

    def _decode(self, speculation: Speculation | None) -> Run:
        tokens, temperature = self.settings.tokens_of(self.kind), self.settings.temperature
        return decode(self.trio, self._prompts, tokens, temperature, speculation)

    def _record(self, drafter: str, mode: str, drafts: int) -> Record:
        run = self._decode(
            Speculation(drafter=drafter, mode=mode, max_drafts=drafts, adaptive=False)
        )
        tried = [(row, t) for row in run.rows for t in tried_drafts(row, drafter, drafts)]
        per_round, rounds = tokens_per_round(run.rows, drafts)
        record: Record = {
            "kind": self.kind,
            "drafter": drafter,
            "mode": mode,
            "drafts": drafts,
            "sequences": len(run.rows),
            "tokens": sum(len(row.token_ids) for row in run.rows),
            "seconds": run.seconds,
            "tried": len(tried),
            "accepted": sum(t.accepted for _, t in tried),
            "tokens_per_round": per_round,
            "rounds": rounds,
            "expected": None,
            "equal": None,
            "mismatches": None,
        }
        if drafts == max(self.settings.drafts) and tried:
            texts = {
                id(row): text_of(self.trio, row, self.settings.temperature) for row in run.rows
            }
            record["expected"] = expected((t, texts[id(row)].overlap(t)) for row, t in tried)
        if mode == "coupled":
            mismatches = self._mismatches(f"{self.kind}, {drafter}, {drafts} drafts", run.rows)
            record["equal"] = len(run.rows) - len(mismatches)
            record["mismatches"] = [
                {**asdict(m), "within_rounding": m.within_rounding} for m in mismatches
            ]
        return record

    def _mismatches(self, name: str, rows: Sequence[Row]) -> list[Mismatch]:
        """Where rows first leave plain decoding's tokens."""
        assert self._plain is not None
        found = []
        for i, (want, have) in enumerate(zip(self._plain.rows, rows, strict=True)):
            if want.token_ids != have.token_ids:
                if i not in self._computed:
                    naive = NaiveLoop(self.trio)
                    self._computed[i] = ComputedTwice(naive, want.prompt, want.token_ids)
                found.append(
                    first_mismatch(
                        name, i, self._computed[i], have.token_ids, self.settings.temperature, i
                    )
                )
        return found


def print_tables(records: Sequence[Record], settings: Settings, title: str) -> None:
    """A section for each kind of text."""
    shown = [drafts for drafts in settings.drafts if drafts in (1, 4, 8)] or settings.drafts
    columns = (
        "drafts", "tried", "kept", "min\n(p,q)", "off\nsd", "bound",
        *(f"{'round' if i == 0 else ''}\nk={k}" for i, k in enumerate(shown)),
        "as\nplain",
    )  # fmt: skip
    caption = (
        f"tried, kept (%): drafts whose predecessors were kept, {max(settings.drafts)} to a round. "
        "min(p, q) (%): its sum over tokens, p the target's and q the drafter's probability, mean "
        "over these drafts: what rejection keeps, and both modes of lookup. off: what was kept "
        "less that, in standard deviations. bound (%): mean of (1 - d) / (1 + d), where "
        "d = 1 - sum min(p, q): coupled keeps no less. round: tokens a round. as plain: sampled "
        f"sequences that have plain decoding's tokens, over all k. {machine_line()}"
    )
    table = make_table(title, columns, caption)
    for kind in settings.kinds:
        table.add_section()
        table.add_row(f"[bold]{kind}")
        for drafter, mode in product(DRAFTERS, VERIFY_MODES):
            own = [
                r for r in records if (r["kind"], r["drafter"], r["mode"]) == (kind, drafter, mode)
            ]
            name = drafter.removeprefix("prompt_")
            table.add_row(f"{name}, {mode}", *_cells(own, shown))
    console.print(table)


def _cells(own: Sequence[Record], shown: Sequence[int]) -> list[str]:
    by_drafts = {record["drafts"]: record for record in own}
    last = by_drafts[max(by_drafts)]
    found = last["expected"]
    equal = "-"
    if last["equal"] is not None:
        equal = f"{sum(r['equal'] for r in own)}/{sum(r['sequences'] for r in own)}"
    return [
        str(last["tried"]),
        fixed(found and 100 * last["accepted"] / last["tried"], 1),
        fixed(found and 100 * found["overlap"], 1),
        fixed(found and found["deviations"], 1),
        fixed(found and 100 * found["bound"], 1),
        *(fixed(by_drafts[k]["tokens_per_round"]) for k in shown),
        equal,
    ]


def print_mismatches(records: Sequence[Record]) -> bool:
    """Say where coupled tokens left plain decoding's; whether each such place is a tie."""
    found = [m for record in records for m in record["mismatches"] or ()]
    for values in found:
        ties = values["within_rounding"]
        mismatch = Mismatch(**{k: v for k, v in values.items() if k != "within_rounding"})
        console.print(str(mismatch), style="yellow" if ties else "red", soft_wrap=True)
    return all(values["within_rounding"] for values in found)


def run(settings: Settings, output: Path, plot: bool) -> None:
    """Load, measure, write and show.

    Raises:
        typer.Exit: code 1, coupled tokens differ from plain decoding's where there is no tie.
    """
    trio = open_trio(settings.trio, settings.dtype)
    kinds = [KindOfText(trio, settings, kind) for kind in settings.kinds]
    records: list[Record] = []
    with make_progress() as progress:
        task = progress.add_task("decoding", total=len(kinds) * settings.runs)
        for kind in kinds:
            records += kind.measure(lambda d: progress.update(task, advance=1, description=d))
    info = trio.info()["roles"]
    dtypes = {role: info[role]["dtype"] for role in info}
    name = settings.trio if settings.trio in ("shipped", "qwen") else Path(settings.trio).name
    shared = {"trio": name, "dtype": dtypes, "temperature": settings.temperature}
    write_json_lines(output, "acceptance", [{**shared, **record} for record in records])
    title = (
        f"Drafts that are kept, trio {name}, {'/'.join(dict.fromkeys(dtypes.values()))}, "
        f"temperature {settings.temperature:g}"
    )
    all_ties = print_mismatches(records)
    print_tables(records, settings, title)
    console.print(f"Wrote {output}", soft_wrap=True)
    if plot:
        picture = output.with_suffix(".png")
        plot_acceptance(records, picture, title)
        console.print(f"Wrote {picture}", soft_wrap=True)
    if not all_ties:
        console.print("Coupled tokens are not plain decoding's.", style="red")
        raise typer.Exit(1)


def main(
    trio: Annotated[
        str, typer.Option(help="shipped, qwen, or a directory with a trio.json.")
    ] = "shipped",
    kinds: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(KINDS)}.")] = ",".join(
        KINDS
    ),
    drafts: Annotated[
        str, typer.Option(help="Comma-separated drafts of a round, 1 to 8.")
    ] = "1,2,3,4,5,6,7,8",
    prompts: Annotated[int, typer.Option(min=1, help="Of each kind, one batch.")] = 12,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Of each prompt.", show_default="32; 15 for shipped arithmetic"),
    ] = None,
    temperature: Annotated[float, typer.Option(min=1e-3)] = 1.0,
    threads: options.Threads = None,
    dtype: options.Dtype = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON lines.", show_default="benchmarks/results/acceptance-<trio>.jsonl"),
    ] = None,
    plot: Annotated[bool, typer.Option(help="Also a PNG beside the output.")] = True,
) -> None:
    """Count the drafts that are kept, on three kinds of text, beside what they should come to."""
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(
        trio=trio,
        dtype=dtype,
        kinds=tuple(parse_choices("--kinds", kinds, KINDS, None)),
        drafts=tuple(sorted(set(parse_choices("--drafts", drafts, range(1, 9), None)))),
        prompts=prompts,
        tokens=tokens,
        temperature=temperature,
    )
    try:
        run(settings, output or RESULTS / f"acceptance-{Path(trio).name}.jsonl", plot)
    except ValueError as error:
        # A user's mistake: an absent trio, a dtype that does not exist. Bugs keep their traceback.
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
