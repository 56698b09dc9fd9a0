"""How many drafts are kept: both modes, both drafters, three kinds of text, side by side.

``python -m benchmarks.acceptance --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise, product
from operator import itemgetter
from statistics import fmean
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import options, report, trios
from benchmarks.harness.agreement import find_mismatches
from benchmarks.harness.decoding import (
    DecoderProvider,
    Generation,
    NaiveLoop,
    Prompts,
    Sampling,
    combined,
)
from benchmarks.harness.options import parse_choices
from proxytune_kernels import Speculation, Trio
from proxytune_kernels.decoder.speculation import DRAFTERS
from proxytune_kernels.ops import VERIFY_MODES

_PROMPT_LENGTH = 32  # of text, which has no length of its own
_TOKENS = 32

Record = dict[str, Any]


def decode(
    trio: Trio,
    prompts: Prompts,
    max_tokens: int,
    temperature: float,
    speculation: Speculation | None = None,
) -> Generation:
    """Sample without filters, past the end of the text; row i has seed i."""
    sampling, length = Sampling(temperature, 1.0), max(map(len, prompts)) + max_tokens
    room = {"max_batch_size": len(prompts), "max_seq_len": length}
    provider = DecoderProvider("", trio, sampling, speculation=speculation, **room)
    return provider.generate(prompts, max_tokens)


def full_rounds(times: Sequence[float], drafts: int) -> list[int]:
    """Tokens of each round of a row that had room for all drafts, given when each token came.

    The first token is the prompt's; tokens of a round come together, and its last is no draft.
    """
    ends = [i + 1 for i in range(len(times)) if i + 1 == len(times) or times[i] != times[i + 1]]
    return [end - start for start, end in pairwise(ends) if len(times) - start > drafts]


@torch.inference_mode()
def overlap(
    trio: Trio, prompt: Sequence[int], token_ids: Sequence[int], temperature: float
) -> float:
    """Mean over a text's tokens of sum min(p, q), p the target's and q the expert's probability.

    It is what a first draft of the expert is kept with in rejection mode.
    """
    ids = torch.tensor([[*prompt, *token_ids[:-1]]])
    logits = {
        role: model(input_ids=ids, use_cache=False)
        .logits[0, len(prompt) - 1 :, : trio.vocab_size]
        .float()
        for role, model in trio.models.items()
    }
    target = torch.softmax(combined(logits) / temperature, -1)
    expert = torch.softmax(logits["expert"] / temperature, -1)
    return float(torch.minimum(target, expert).sum(-1).mean())


def make_prompts(trio: Trio, name: str, kind: str, count: int, tokens: int) -> Prompts:
    """Prompts of a kind of text, which goes on for so many tokens."""
    if kind == "text":
        return trios.make_prompts(trio, count, _PROMPT_LENGTH)
    return [prompt for [prompt] in trios.task_batches(trio, name, kind, 1, tokens, count)]


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
    texts = zip(prompts, plain.token_ids, strict=True)
    mean_overlap = fmean(overlap(trio, prompt, ids, temperature) for prompt, ids in texts)
    tick(f"{kind}: plain")
    records = []
    for drafter, mode, drafts in product(DRAFTERS, VERIFY_MODES, counts):
        speculation = Speculation(drafter=drafter, mode=mode, max_drafts=drafts, adaptive=False)
        found = decode(trio, prompts, tokens, temperature, speculation)
        rounds = [n for times in found.seconds for n in full_rounds(times, drafts)]
        drafted, wrong = found.counts["drafted"], None
        if mode == "coupled":
            both = plain.token_ids, found.token_ids
            name = f"{kind}, {drafter}, {drafts} drafts"
            wrong = find_mismatches(name, NaiveLoop(trio), prompts, *both, temperature)
        record: Record = {
            "kind": kind, "drafter": drafter, "mode": mode, "drafts": drafts,
            "sequences": len(prompts), "tokens": sum(map(len, found.token_ids)),
            "drafted": drafted,
            "accepted": found.counts["accepted"],
            "kept": found.counts["accepted"] / drafted if drafted else None,
            "rounds": len(rounds),
            "tokens_per_round": fmean(rounds) if rounds else None,
            "overlap": mean_overlap,
            "equal": None if wrong is None else len(prompts) - len(wrong),
            "mismatches": None if wrong is None else [
                {**asdict(m), "within_rounding": m.within_rounding, "text": str(m)} for m in wrong
            ],
        }  # fmt: skip
        records.append(record)
        tick(f"{kind}: {drafter}, {mode}, {drafts}")
    return records


COLUMNS: tuple[report.Column, ...] = (
    ("drafts", "drafter", lambda name: name.removeprefix("prompt_")),
    ("mode", "mode", str),
    ("k", "drafts", str),
    ("kept", "kept", report.percent),
    ("tokens\na round", "tokens_per_round", report.fixed),
    ("min\n(p,q)", "overlap", report.percent),
    ("as\nplain", "equal", str),
)
CAPTION = (
    "kept: share of the drafts. a round: of those with room for k drafts. min(p, q): its sum over "
    "tokens, p the target's and q the expert's probability, mean over the text: what rejection "
    "keeps of the expert's first drafts. as plain: sampled sequences with plain decoding's tokens."
)


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
    shared = {"trio": name, "dtype": of, "temperature": temperature}
    report.write_results(output, "acceptance", shared, records, name)
    found = [m for record in records for m in record["mismatches"] or ()]
    for mismatch in found:
        report.say(mismatch["text"], "yellow" if mismatch["within_rounding"] else "red")
    kind = trios.dtype_label(opened)
    title = f"Drafts that are kept, trio {name}, {kind}, temperature {temperature:g}"
    report.print_records(title, CAPTION, records, COLUMNS, itemgetter("kind"))
    if not all(mismatch["within_rounding"] for mismatch in found):
        report.say("Coupled tokens are not plain decoding's.", "red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
