"""The decoder on a GPU: ways to decode a trio side by side, step times over the bytes they read.

Measured as ``benchmarks.throughput`` does. With random weights a draft is accepted by chance alone,
so what is measured of speculation is the time of a round of k drafts. How many tokens it emits
depends on the acceptance, which is a property of real models and their text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import proxytune_kernels as ptk
from benchmarks.gpu.device import Device, Journal, Record, release, say
from benchmarks.harness import agreement, report
from benchmarks.harness.decoding import Case, DecoderProvider, NaiveLoop, Provider
from benchmarks.harness.measure import no_tick
from benchmarks.harness.random_models import (
    SEPARATE,
    SHARED,
    TrioShape,
    build_trios,
    step_bytes,
    with_shared_pair,
)
from benchmarks.harness.trios import make_prompts, quiet_loading
from benchmarks.throughput import Work, time_case
from proxytune_kernels import Trio

Trios = Mapping[str, Trio]

NAIVE, OURS = "naive", "ours"
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
    Mode("ours-2-streams", _SEPARATE_PAIR | {"streams": 2}),
    Mode("ours-1-stream", _SEPARATE_PAIR | {"streams": 1}),
    Mode("ours-not-compiled", _SEPARATE_PAIR | {"compile": False}),
    Mode("ours-eager", _SEPARATE_PAIR | {"compile": False, "graphs": False}),
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
    """Check, build, time; the exit code is 1 where ours failed or was wrong."""
    journal, end = Journal(output, device.describe()), time.monotonic() + budget
    check("cuda")
    journal.add([device.copy_record()])
    for shape in shapes:
        with journal.guarded(shape.name):
            trios = build_trios(shape, "cuda")
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
    caption = (
        "token ms: mean time of a token after the first, in the caller's hands. GB: weights that a "
        f"step reads. x bytes: time over what they take at the {journal.copy_rate / 1e9:,.0f} "
        "GB/s, read and written, of a device-to-device copy in this run. x base only: over the "
        "base alone. naive over it: how much longer the naive loop takes. step, round: median "
        "time from one arrival at a row's caller to the next. Host:"
    )
    report.print_records(
        f"The decoder on {device}, random weights",
        caption,
        timed,
        COLUMNS,
        section="{title}, batch {batch_size}".format_map,
    )
    return journal.conclude()


def check(device: str) -> None:
    """Hold all modes to the naive loop on the shipped trio in fp32, as throughput does.

    typer.Exit: a mode decodes other tokens. That speculation draws what plain decoding draws is
    held by tests/decoder.
    """
    quiet_loading()
    trios = with_shared_pair(ptk.load_trio("shipped", dtype="float32", device=device))
    rows, length = agreement.CHECKED_ROWS, agreement.CHECKED_LENGTH
    agreement.check_greedy([mode.make(trios, rows, length) for mode in MODES if mode.name != NAIVE])


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


COLUMNS: tuple[report.Column, ...] = (
    ("mode", "provider", str),
    ("token\nms", "token_ms/median", report.significant),
    ("\nGB", "step_bytes", report.decimals(1, 1e-9)),
    ("x\nbytes", "step_over_floor", report.fixed),
    ("x base\nonly", "token_speed_over/base-only/median", lambda speed: report.fixed(1 / speed)),
    ("naive\nover it", "token_speed_over/naive/median", report.fixed),
    ("step, round\nms", "arrival_ms/p50", report.significant),
)
