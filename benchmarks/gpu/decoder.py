"""The decoder on a GPU: ways to decode a trio side by side, step times over the bytes they read.

With random weights a draft is accepted by chance alone, so what is measured of speculation is the
time of a round of k drafts. How many tokens it emits depends on the acceptance, which is a property
of real models and their text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
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
from benchmarks.harness.decoding import DecoderProvider, Generation, NaiveLoop, Provider
from benchmarks.harness.measure import in_turns, ratios, summary
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
from proxytune_kernels import Trio

Trios = Mapping[str, Trio]

NAIVE, BASE_ONLY, OURS = "naive", "base-only", "ours"
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
    Mode(BASE_ONLY, {"roles": ("base",)}, any_batch=True),
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
    """Run all modes in turn; each has run before: what is compiled or captured is there."""
    prompts = make_prompts(trios[SEPARATE], batch_size, _PROMPT)
    providers: dict[str, Provider] = {}
    what = f"{shape.name}, batch {batch_size}"
    for mode in modes:
        with journal.guarded(f"{what}: {mode.name}"):
            provider = mode.make(trios, batch_size, _MAX_SEQ_LEN)
            provider.generate(prompts, _TOKENS)
            providers[mode.name] = provider
    say(f"{what}: timing {len(providers)} modes")

    def generate(provider: Provider, repeat: int) -> Generation:
        return provider.generate(prompts, _TOKENS)

    found = in_turns({name: partial(generate, p) for name, p in providers.items()}, _REPEATS)
    timed = [
        ModeTimes(mode, providers[mode.name], found[mode.name]) for mode in modes
        if mode.name in providers
    ]  # fmt: skip
    shared: Record = {"op": "decode", "trio": shape.name, "title": shape.title}
    shared = {**shared, "prompt_length": _PROMPT, "output_length": _TOKENS}
    lines = records(timed, batch_size, _TOKENS, journal.copy_rate)
    journal.add([{**shared, **line} for line in lines])
    if batch_size == 1 and isinstance(plain := providers.get(OURS), DecoderProvider):
        with journal.guarded(f"{shape.name}: profile"):
            record = trace.profile(plain, _PROMPT)
            journal.add([{"trio": shape.name, **record}])
            say(f"{shape.name}: no kernel runs in {record['idle_share']:.1%} of the time")


class ModeTimes(NamedTuple):
    """One mode's measurements: in each repeat, what every row's caller got and when."""

    mode: Mode
    provider: Provider
    generations: Sequence[Generation]


def intervals(generation: Generation, drafts: int) -> list[float]:
    """Seconds between what a row's caller got and what it got next, all rows after each other.

    A plain step gives a token, a round of speculation one to ``drafts + 1`` at once. Rounds that
    had to end the text are left out: they may draft less.
    """
    return [
        times[i] - times[i - 1]
        for times in generation.seconds
        for i in range(1, len(times))
        if times[i] != times[i - 1] and len(times) - i > drafts
    ]


def records(
    timed: Sequence[ModeTimes], batch_size: int, max_tokens: int, copy_rate: float
) -> list[dict[str, Any]]:
    """A line of results for each mode, measured in the same repeats; ratios are paired by repeat.

    ``copy_rate`` is bytes per second, read and written, of a device-to-device copy. The bytes that
    a round of speculation reads are not counted: it reads some several times.
    """
    all_steps = {
        t.mode.name: [intervals(generation, t.mode.drafts) for generation in t.generations]
        for t in timed
    }
    medians = {name: [median(s) for s in steps] for name, steps in all_steps.items()}

    def over(name: str, other: str) -> dict[str, float] | None:
        """Steps of one over another's; None where one was not measured."""
        both = name in medians and other in medians
        return ratios(medians[name], medians[other]) if both else None

    lines = []
    for t in timed:
        name, steps, models = t.mode.name, medians[t.mode.name], t.provider.trio.models
        read = None if t.mode.drafts else step_bytes([models[r] for r in t.provider.roles])
        floor = None if read is None else read / copy_rate
        totals = [max(times[-1] for times in g.seconds) for g in t.generations]
        counts = [g.counts for g in t.generations]
        ours = isinstance(t.provider, DecoderProvider)
        line = {
            "mode": name,
            "drafts": t.mode.drafts,
            "batch_size": batch_size,
            "repeats": len(steps),
            "set_up_seconds": t.provider.set_up_seconds,
            "step_ms": summary(steps, 1e3),
            "tokens_per_second": summary(batch_size * max_tokens / s for s in totals),
            "step_bytes": read,
            "floor_ms": None if floor is None else floor * 1e3,
            "step_over_floor": None if floor is None else ratios(steps, [floor] * len(steps)),
            "step_over_base_only": over(name, BASE_ONLY),
            "naive_over_step": over(NAIVE, name),
            "step_over_ours": over(name, OURS),
            "counted": {key: sum(c[key] for c in counts) for key in counts[0]},
            "decoder": t.provider.decoder.info() if ours else None,  # type: ignore[attr-defined]
        }
        lines.append(line)
    return lines


def weights_record(shape: TrioShape, trios: Trios) -> dict[str, Any]:
    """A line of results: bytes of weights by role, and those that a step reads."""
    by_name = {role: [model] for role, model in trios[SEPARATE].models.items()}
    by_name["shared pair"] = [trios[SHARED].expert, trios[SHARED].anti]
    return {
        "op": "weights",
        "trio": shape.name,
        "title": shape.title,
        "bytes": {name: weight_bytes(models) for name, models in by_name.items()},
        "step_bytes": {name: step_bytes(models) for name, models in by_name.items()},
    }


def weights_line(record: Record) -> str:
    """One sentence: bytes of weights by role."""
    sizes = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in record["bytes"].items())
    return f"{record['title']}: weights of {sizes}."


COLUMNS: tuple[Column, ...] = (
    ("mode", "mode", str),
    ("\nms", "step_ms/median", significant),
    ("\nGB", "step_bytes", decimals(1, 1e-9)),
    ("x\nbytes", "step_over_floor/median", fixed),
    ("x base\nonly", "step_over_base_only/median", fixed),
    ("x\nours", "step_over_ours/median", fixed),
    ("naive\nover it", "naive_over_step/median", fixed),
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
        "ms: median time of a step in the caller's hands, of a round where it speculates. GB: "
        "weights that a step reads. x bytes: time over what they take at the "
        f"{journal.copy_rate / 1e9:,.0f} GB/s, read and written, of a device-to-device copy in "
        "this run. x base only, x ours: over the base alone, and over plain steps of ours. naive "
        "over it: how much longer the naive loop takes. the paper: proxy-tuned over tuned model, "
        f"whose cost is the base's (Liu et al. 2024). {journal.where}"
    )


def markdown(lines: Sequence[Record], said: str) -> str:
    """The same table for a document."""
    page = [f"`python -m benchmarks.gpu --decoder`. {said}", ""]
    page += [*(f"- {weights_line(r)}" for r in lines if r["op"] == "weights"), ""]
    columns = [" ".join(heading.split()) for heading, *_ in COLUMNS]
    for heading, rows in groups([r for r in lines if r["op"] == "decode"]):
        page += [f"**{heading}**", "", *markdown_table(columns, rows), ""]
    return "\n".join(page)
