"""How many drafts are kept: both modes, both drafters, three kinds of text, side by side.

``python -m benchmarks.acceptance --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from operator import itemgetter
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness import agreement, decoding, options, report, trios
from benchmarks.harness.decoding import Prompts
from benchmarks.harness.options import parse_choices
from proxytune_kernels import Decoder, SamplingParams, Speculation, Trio
from proxytune_kernels.decoder.speculation import DRAFTERS, History
from proxytune_kernels.ops import VERIFY_MODES

_PROMPT_LENGTH = 32  # of text, which has no length of its own
_TOKENS = 32

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A decoded request: its prompt, its tokens, and how many of them came at a time."""

    prompt: list[int]
    token_ids: list[int]
    arrivals: list[int]

    def rounds(self) -> list[tuple[int, int]]:
        """(tokens before it, tokens from it) of each step behind the prompt."""
        found, start = [], self.arrivals[0]
        for emitted in self.arrivals[1:]:
            found.append((start, emitted))
            start += emitted
        return found


def decode(
    trio: Trio,
    prompts: Prompts,
    max_tokens: int,
    temperature: float,
    speculation: Speculation | None = None,
) -> list[Row]:
    """Sample without filters, past the end of the text; row i has seed i."""
    longest = max(len(prompt) for prompt in prompts)
    decoder = Decoder(trio, len(prompts), longest + max_tokens, speculation=speculation)
    params = [
        SamplingParams(temperature=temperature, seed=row, max_tokens=max_tokens, ignore_eos=True)
        for row in range(len(prompts))
    ]
    rows = [Row(list(prompt), [], []) for prompt in prompts]
    for event in decoder.stream([row.prompt for row in rows], params):
        rows[event.index].token_ids.extend(event.token_ids)
        rows[event.index].arrivals.append(len(event.token_ids))
    return rows


@dataclass(frozen=True)
class Tried:
    """A draft all of whose predecessors in its round were kept.

    ``position`` is how many output tokens come before it; ``draft`` the token where the drafter
    could have drawn nothing else, None for the expert's.
    """

    position: int
    accepted: bool
    draft: int | None


def tried_drafts(row: Row, drafter: str, drafts: int) -> list[Tried]:
    """Every draft of a row that was tried.

    The row is decoded to its end, with ``drafts`` to a round wherever the text had room for them.
    """
    found = []
    for start, emitted in row.rounds():
        room = min(drafts, len(row.token_ids) - start - 1)
        known: Sequence[int | None] = [None] * room
        if drafter == "prompt_lookup":
            known = looked_up([*row.prompt, *row.token_ids[:start]], drafts)[:room]
        kept = emitted - 1  # the last token of a round is no draft
        found += [Tried(start + j, j < kept, known[j]) for j in range(min(len(known), kept + 1))]
    return found


def looked_up(text: list[int], drafts: int) -> list[int]:
    """What prompt lookup drafts behind a text."""
    history = History(1, len(text) + 1, torch.device("cpu"))
    history.start(0, text)
    found: list[int] = history.lookup(1, drafts)[0].tolist()
    return [token_id for token_id in found if token_id >= 0]


@torch.inference_mode()
def probabilities(trio: Trio, row: Row, temperature: float) -> tuple[Tensor, Tensor]:
    """[n, V] of the target and of the expert along a row, from one forward over its whole text."""
    ids = torch.tensor([[*row.prompt, *row.token_ids[:-1]]])
    logits = {
        role: model(input_ids=ids, use_cache=False)
        .logits[0, len(row.prompt) - 1 :, : trio.vocab_size]
        .float()
        for role, model in trio.models.items()
    }
    target, expert = decoding.combined(logits) / temperature, logits["expert"] / temperature
    return torch.softmax(target, -1), torch.softmax(expert, -1)


def overlap(tried: Tried, target: Tensor, expert: Tensor) -> float:
    """Sum over tokens of min(target, drafter): 1 less their total variation distance."""
    row = target[tried.position]
    if tried.draft is not None:
        return float(row[tried.draft])
    # Rounded sums of a whole vocabulary may pass 1.
    return min(1.0, float(torch.minimum(row, expert[tried.position]).sum()))


def expected(overlaps: Sequence[float], accepted: int) -> Record:
    """What the drafts that were tried should have come to, beside what they did.

    ``overlap`` is the mean, which is rejection's acceptance. ``bound``: the mean of
    (1 - d) / (1 + d), d = 1 - overlap, which coupled keeps at least. ``deviations``: accepted
    drafts less the sum of overlaps, over the standard deviation of that difference if each draft
    is kept with the probability of its overlap; None where nothing is left to chance.
    """
    variance = sum(o * (1 - o) for o in overlaps)
    return {
        "overlap": sum(overlaps) / len(overlaps),
        "bound": sum(o / (2 - o) for o in overlaps) / len(overlaps),
        "deviations": (accepted - sum(overlaps)) / math.sqrt(variance) if variance else None,
    }


def tokens_per_round(rows: Iterable[Row], drafts: int) -> tuple[float, int]:
    """Mean tokens of the steps that had room for all drafts, and how many steps those were."""
    emitted = [
        count
        for row in rows
        for start, count in row.rounds()
        if len(row.token_ids) - start - 1 >= drafts
    ]
    return (sum(emitted) / len(emitted) if emitted else math.nan), len(emitted)


def make_prompts(trio: Trio, name: str, kind: str, count: int, tokens: int) -> Prompts:
    """Prompts of a kind of text, which goes on for so many tokens."""
    if kind == "text":
        return trios.make_prompts(trio, count, _PROMPT_LENGTH)
    return [prompt for [prompt] in trios.task_batches(trio, name, kind, 1, tokens, count)]


def mismatches(
    trio: Trio, plain: Sequence[Row], rows: Sequence[Row], name: str, temperature: float
) -> list[agreement.Mismatch]:
    """Where rows first leave plain decoding's tokens; row i has seed i."""
    found = []
    for i, (want, have) in enumerate(zip(plain, rows, strict=True)):
        if want.token_ids != have.token_ids:
            naive = decoding.NaiveLoop(trio)
            computed = agreement.ComputedTwice(naive, want.prompt, want.token_ids)
            found.append(
                agreement.first_mismatch(name, i, computed, have.token_ids, temperature, i)
            )
    return found


def measure(
    trio: Trio,
    kind: str,
    prompts: Prompts,
    tokens: int,
    temperature: float,
    counts: Sequence[int],
    tick: Callable[[str], object],
) -> list[Record]:
    """Decode the prompts of a kind in every way; a record per drafter, mode and draft count."""
    plain = decode(trio, prompts, tokens, temperature)
    tick(f"{kind}: plain")
    records = []
    for drafter, mode, drafts in product(DRAFTERS, VERIFY_MODES, counts):
        speculation = Speculation(drafter=drafter, mode=mode, max_drafts=drafts, adaptive=False)
        start = time.perf_counter()
        rows = decode(trio, prompts, tokens, temperature, speculation)
        seconds = time.perf_counter() - start
        tried = [(row, t) for row in rows for t in tried_drafts(row, drafter, drafts)]
        accepted = sum(t.accepted for _, t in tried)
        per_round, rounds = tokens_per_round(rows, drafts)
        record: Record = {
            "kind": kind,
            "drafter": drafter,
            "mode": mode,
            "drafts": drafts,
            "sequences": len(rows),
            "tokens": sum(len(row.token_ids) for row in rows),
            "seconds": seconds,
            "tried": len(tried),
            "accepted": accepted,
            "tokens_per_round": per_round,
            "rounds": rounds,
            "expected": None,
            "equal": None,
            "mismatches": None,
        }
        if drafts == max(counts) and tried:
            texts = {id(row): probabilities(trio, row, temperature) for row in rows}
            overlaps = [overlap(t, *texts[id(row)]) for row, t in tried]
            record["expected"] = expected(overlaps, accepted)
        if mode == "coupled":
            name = f"{kind}, {drafter}, {drafts} drafts"
            found = mismatches(trio, plain, rows, name, temperature)
            record["equal"] = len(rows) - len(found)
            record["mismatches"] = [
                {**asdict(m), "within_rounding": m.within_rounding, "text": str(m)} for m in found
            ]
        records.append(record)
        tick(f"{kind}: {drafter}, {mode}, {drafts}")
    return records


def print_records(records: Sequence[Record], counts: Sequence[int], title: str) -> None:
    """A section for each kind of text."""
    shown = [drafts for drafts in counts if drafts in (1, 4, 8)] or counts
    caption = (
        f"tried, kept (%): drafts whose predecessors were kept, {max(counts)} to a round. "
        "min(p, q) (%): its sum over tokens, p the target's and q the drafter's probability, mean "
        "over these drafts: what rejection keeps, and both modes of lookup. off: what was kept "
        "less that, in standard deviations. bound (%): mean of (1 - d) / (1 + d), where "
        "d = 1 - sum min(p, q): coupled keeps no less. round: tokens a round. as plain: sampled "
        "sequences that have plain decoding's tokens, over all k."
    )
    columns: list[report.Column] = [
        ("drafts", "name", str),
        ("tried", "tried", str),
        ("kept", "kept", report.decimals(1, 100)),
        ("min\n(p,q)", "expected/overlap", report.decimals(1, 100)),
        ("off\nsd", "expected/deviations", report.decimals(1)),
        ("bound", "expected/bound", report.decimals(1, 100)),
        *((f"round\nk={k}", f"round/{k}", report.fixed) for k in shown),
        ("as\nplain", "as_plain", str),
    ]
    rows = []
    for (_, drafter, mode), group in groupby(records, itemgetter("kind", "drafter", "mode")):
        own = list(group)
        last, equal = own[-1], [r["equal"] for r in own if r["equal"] is not None]
        of_all = f"{sum(equal)}/{sum(r['sequences'] for r in own)}" if equal else None
        rows.append(
            {
                **last,
                "name": f"{drafter.removeprefix('prompt_')}, {mode}",
                "kept": last["accepted"] / last["tried"] if last["tried"] else None,
                "round": {str(r["drafts"]): r["tokens_per_round"] for r in own},
                "as_plain": of_all,
            }
        )
    report.print_records(title, caption, rows, columns, lambda r: r["kind"])


def main(
    trio: options.TrioName = "shipped",
    kinds: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(trios.PROMPTS)}.")
    ] = ",".join(trios.PROMPTS),
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
    output: options.Output = None,
) -> None:
    """Count the drafts that are kept, on three kinds of text, beside what they should come to.

    Exits with code 1 where coupled tokens differ from plain decoding's and there is no tie.
    """
    options.set_threads(threads)
    wanted = parse_choices("--kinds", kinds, trios.PROMPTS, None)
    counts = sorted(set(parse_choices("--drafts", drafts, range(1, 9), None)))
    runs = len(wanted) * (1 + len(DRAFTERS) * len(VERIFY_MODES) * len(counts))
    records: list[Record] = []
    with options.user_errors(), report.progress_bar(runs) as tick:
        opened = trios.open_trio(trio, dtype)
        for kind in wanted:
            own = tokens or (trios.task_tokens(trio) if kind == "arithmetic" else _TOKENS)
            given = make_prompts(opened, trio, kind, prompts, own)
            records += measure(opened, kind, given, own, temperature, counts, tick)
    name, of = options.trio_label(trio), trios.dtypes(opened)
    output = output or report.RESULTS / f"acceptance-{name}.jsonl"
    shared = {"trio": name, "dtype": of, "temperature": temperature}
    report.write_json_lines(output, "acceptance", [{**shared, **record} for record in records])
    title = (
        f"Drafts that are kept, trio {name}, {trios.dtype_label(opened)}, "
        f"temperature {temperature:g}"
    )
    found = [m for record in records for m in record["mismatches"] or ()]
    for mismatch in found:
        report.say(mismatch["text"], "yellow" if mismatch["within_rounding"] else "red")
    print_records(records, counts, title)
    report.say(f"Wrote {output}")
    if not all(mismatch["within_rounding"] for mismatch in found):
        report.say("Coupled tokens are not plain decoding's.", "red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
