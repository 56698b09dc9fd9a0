"""The decoder on a GPU: ways to decode a trio side by side, step times over the bytes they read.

Measured as ``benchmarks.throughput`` does. With random weights a draft is accepted by chance alone,
so what is measured of speculation is the time of a round of k drafts. How many tokens it emits
depends on the acceptance, which is a property of real models and their text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import proxytune_kernels as ptk
from benchmarks.gpu import trace
from benchmarks.gpu.device import Device, Journal, Record, release, say
from benchmarks.harness.agreement import (
    CHECKED_PROMPT,
    CHECKED_ROWS,
    CHECKED_TOKENS,
    check_greedy,
)
from benchmarks.harness.decoding import Case, DecoderProvider, NaiveLoop, Provider
from benchmarks.harness.measure import no_tick
from benchmarks.harness.random_models import (
    SEPARATE,
    SHARED,
    TrioShape,
    build_trios,
    step_bytes,
    weight_bytes,
    with_shared_pair,
)
from benchmarks.harness.report import (
    Column,
    cells,
    decimals,
    fixed,
    markdown_table,
    print_table,
    significant,
)
from benchmarks.harness.trios import make_prompts, quiet_loading
from benchmarks.throughput import Work, time_case
from proxytune_kernels import Trio

Trios = Mapping[str, Trio]

NAIVE, OURS = "naive", "ours"
PAPER = {"13b": 2.4, "70b": 1.5}
"""Proxy-tuned over tuned model, per token, by trio: Liu et al. 2024, arXiv 2401.08565. A tuned
model of the base's size costs what the base alone costs."""

_PROMPT, _TOKENS = 32, 33
"""Short, so that the keys and values are under 1% of the weights at batch 1."""
_MAX_SEQ_LEN = 80  # more than either needs
_REPEATS = 5


class Mode(NamedTuple):
    """One way to decode.

    ``options`` are :class:`proxytune_kernels.Decoder`'s, None for the loop a researcher writes;
    ``pair`` is which of the trios it decodes; ``drafts`` those of each round of speculation, always
    as many, 0 without it; ``any_batch``: it is timed at batches of several rows too.
    """

    name: str
    options: Mapping[str, Any] | None
    pair: str = SEPARATE
    drafts: int = 0
    any_batch: bool = False

    def make(self, trios: Trios, max_batch_size: int, max_seq_len: int) -> Provider:
        """Make what decodes, with room for so many rows of so many tokens."""
        trio = trios[self.pair]
        if self.options is None:
            return NaiveLoop(trio)
        options = dict(self.options)
        if self.drafts:
            # Not adaptive: with drafts that are never accepted it would turn itself off.
            options["speculation"] = ptk.Speculation(max_drafts=self.drafts, adaptive=False)
        return DecoderProvider(
            self.name, trio, max_batch_size=max_batch_size, max_seq_len=max_seq_len, **options
        )


_SEPARATE_PAIR = {"pair": "separate"}
MODES = (
    Mode(NAIVE, None, any_batch=True),
    Mode("base-only", {"roles": ("base",)}, any_batch=True),
    Mode(OURS, _SEPARATE_PAIR, any_batch=True),
    Mode("ours-shared-pair", {"pair": "shared"}, pair=SHARED, any_batch=True),
    Mode("ours-eager", {"pair": "separate", "graphs": False}),
    *(
        Mode(f"ours-speculative-{k}", _SEPARATE_PAIR, drafts=k, any_batch=k == 4)
        for k in (1, 2, 4, 8)
    ),
    # Last: it holds the pair's weights once more, and may not fit.
    Mode("ours-batched-pair", {"pair": "batched"}),
)
"""In the order of the table."""


def run(
    device: Device, shapes: Sequence[TrioShape], batch_sizes: Sequence[int], output: Path,
    budget: float,
) -> int:  # fmt: skip
    """Check, build, time, profile; the exit code is 1 where ours failed or was wrong."""
    journal, end = Journal(output, device.describe()), time.monotonic() + budget
    check("cuda")
    journal.add([device.copy_record()])
    for shape in shapes:
        with journal.guarded(shape.name):
            trios = build_trios(shape, "cuda")
            weights = weights_record(shape, trios)
            journal.add([weights])
            say(weights_line(weights))
            for batch_size in batch_sizes:
                what = f"{shape.name}, batch {batch_size}"
                if time.monotonic() > end:
                    journal.note(f"{what}: not run for lack of time")
                    continue
                with journal.guarded(what):
                    modes = [mode for mode in MODES if batch_size == 1 or mode.any_batch]
                    measure(shape, trios, modes, batch_size, journal)
                release()
            del trios
        release()
    timed = [r for r in journal.records if r["op"] == "decode"]
    rows = [(heading, row) for heading, group in groups(timed) for row in group]
    said = caption(journal)
    print_table("The decoder on a GPU, random weights", [h for h, *_ in COLUMNS], said, rows)
    return journal.conclude(markdown(journal.records, said))


def check(device: str) -> None:
    """Hold all modes to the naive loop on the shipped trio in fp32, as throughput does.

    typer.Exit: a mode decodes other tokens. That speculation draws what plain decoding draws is
    held by tests/decoder.
    """
    quiet_loading()
    trios = with_shared_pair(ptk.load_trio("shipped", dtype="float32", device=device))
    rows, length = CHECKED_ROWS, CHECKED_PROMPT + CHECKED_TOKENS
    check_greedy([mode.make(trios, rows, length) for mode in MODES if mode.name != NAIVE])


def measure(
    shape: TrioShape, trios: Trios, modes: Sequence[Mode], batch_size: int, journal: Journal
) -> None:
    """Run all modes in turn, after one run of each; what is captured is there by then."""
    trio, what = trios[SEPARATE], f"{shape.name}, batch {batch_size}"
    made: dict[str, tuple[Mode, Provider]] = {}
    for mode in modes:
        with journal.guarded(f"{what}: {mode.name}"):
            made[mode.name] = mode, mode.make(trios, batch_size, _MAX_SEQ_LEN)
    say(f"{what}: timing {len(made)} modes")
    work = Work(Case(batch_size, _PROMPT, _TOKENS), [make_prompts(trio, batch_size, _PROMPT)])
    providers = [provider for _, provider in made.values()]
    lines = time_case({}, providers, work, _REPEATS, no_tick)
    shared = {"op": "decode", "trio": shape.name, "title": shape.title}
    journal.add([
        {**shared, **line, **floor(*made[line["provider"]], line, journal.copy_rate)}
        for line in lines
    ])  # fmt: skip
    ours = made[OURS][1] if OURS in made else None
    if batch_size == 1 and isinstance(ours, DecoderProvider):
        with journal.guarded(f"{shape.name}: profile"):
            record = trace.profile(ours, _PROMPT)
            journal.add([{"trio": shape.name, **record}])
            say(f"{shape.name}: no kernel runs in {record['idle_share']:.1%} of the time")


def floor(mode: Mode, provider: Provider, line: Record, copy_rate: float) -> dict[str, Any]:
    """Bytes of weights that a step reads, and its time over theirs at a copy's rate.

    Those of a round of speculation are not counted: it reads some several times.
    """
    info = provider.decoder.info() if isinstance(provider, DecoderProvider) else None
    if mode.drafts:
        return {"drafts": mode.drafts, "decoder": info}
    read = step_bytes([provider.trio.models[role] for role in provider.roles])
    floor_ms = 1e3 * read / copy_rate
    over = line["token_ms"]["median"] / floor_ms
    return {"step_bytes": read, "floor_ms": floor_ms, "step_over_floor": over, "decoder": info}


def weights_record(shape: TrioShape, trios: Trios) -> dict[str, Any]:
    """A line of results: bytes of weights by role, and those that a step reads."""
    by_name = {role: [model] for role, model in trios[SEPARATE].models.items()}
    by_name["shared pair"] = [trios[SHARED].expert, trios[SHARED].anti]
    return {
        "op": "weights",
        "title": shape.title,
        "bytes": {name: weight_bytes(models) for name, models in by_name.items()},
        "step_bytes": {name: step_bytes(models) for name, models in by_name.items()},
    }


def weights_line(record: Record) -> str:
    """One sentence: bytes of weights by role."""
    sizes = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in record["bytes"].items())
    return f"{record['title']}: weights of {sizes}."


def _inverse(speed: float) -> str:
    return fixed(1 / speed)


COLUMNS: tuple[Column, ...] = (
    ("mode", "provider", str),
    ("token\nms", "token_ms/median", significant),
    ("\nGB", "step_bytes", decimals(1, 1e-9)),
    ("x\nbytes", "step_over_floor", fixed),
    ("x base\nonly", "token_speed_over/base-only/median", _inverse),
    ("naive\nover it", "token_speed_over/naive/median", fixed),
    ("step, round\nms", "arrival_ms/p50", significant),
)


def groups(timed: Sequence[Record]) -> list[tuple[str, list[list[str]]]]:
    """Rows of modes measured together, under what they were measured on.

    The paper's ratio stands below them at batch 1.
    """
    found = []
    for (trio, title, batch_size), group in groupby(
        timed, lambda r: (r["trio"], r["title"], r["batch_size"])
    ):
        rows = [cells(record, COLUMNS) for record in group]
        if batch_size == 1 and trio in PAPER:
            rows.append(["the paper", "", "", "", fixed(PAPER[trio]), "", ""])
        found.append((f"{title}, batch {batch_size}", rows))
    return found


def caption(journal: Journal) -> str:
    """What the columns mean, and what was measured on."""
    return (
        "token ms: mean time of a token after the first, in the caller's hands. GB: weights that a "
        f"step reads. x bytes: time over what they take at the {journal.copy_rate / 1e9:,.0f} "
        "GB/s, read and written, of a device-to-device copy in this run. x base only: over the "
        "base alone. naive over it: how much longer the naive loop takes. step, round: median "
        "time from one arrival at a row's caller to the next. the paper: proxy-tuned over tuned "
        f"model, whose cost is the base's (Liu et al. 2024). {journal.where}"
    )


def markdown(lines: Sequence[Record], said: str) -> str:
    """The same table for a document."""
    page = [f"`python -m benchmarks.gpu --decoder`. {said}", ""]
    page += [*(f"- {weights_line(r)}" for r in lines if r["op"] == "weights"), ""]
    columns = [" ".join(heading.split()) for heading, *_ in COLUMNS]
    for heading, rows in groups([r for r in lines if r["op"] == "decode"]):
        page += [f"**{heading}**", "", *markdown_table(columns, rows), ""]
    return "\n".join(page)
