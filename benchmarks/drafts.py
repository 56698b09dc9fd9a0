"""Decodes with speculation, and says of each draft whether it was kept and how likely that was."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers import Prompts, combined
from proxytune_kernels import Decoder, SamplingParams, Speculation, Trio
from proxytune_kernels.decoder.speculation import History

_CPU = torch.device("cpu")


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


@dataclass(frozen=True)
class Run:
    """Requests that were decoded together, to the same number of tokens."""

    rows: list[Row]
    seconds: float


def decode(
    trio: Trio,
    prompts: Prompts,
    max_tokens: int,
    temperature: float,
    speculation: Speculation | None = None,
) -> Run:
    """Sample without filters, past the end of the text; row i has seed i."""
    longest = max(len(prompt) for prompt in prompts)
    decoder = Decoder(trio, len(prompts), longest + max_tokens, speculation=speculation)
    params = [
        SamplingParams(temperature=temperature, seed=row, max_tokens=max_tokens, ignore_eos=True)
        for row in range(len(prompts))
    ]
    rows = [Row(list(prompt), [], []) for prompt in prompts]
    start = time.perf_counter()
    for event in decoder.stream([row.prompt for row in rows], params):
        rows[event.index].token_ids.extend(event.token_ids)
        rows[event.index].arrivals.append(len(event.token_ids))
    return Run(rows, time.perf_counter() - start)


@dataclass(frozen=True)
class Tried:
    """A draft all of whose predecessors in its round were kept."""

    position: int
    """In the output: how many tokens come before it."""
    accepted: bool
    draft: int | None
    """The token, where the drafter could have drawn nothing else; None for the expert's."""


def tried_drafts(row: Row, drafter: str, drafts: int) -> list[Tried]:
    """Every draft of a row that was tried.

    Args:
        row: decoded to its end, with ``drafts`` to a round wherever the text had room for them.
        drafter: of :class:`proxytune_kernels.Speculation`.
        drafts: of each round.
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
    history = History(1, len(text) + 1, _CPU)
    history.start(0, text)
    found: list[int] = history.lookup(1, drafts)[0].tolist()
    return [token_id for token_id in found if token_id >= 0]


@dataclass(frozen=True)
class Text:
    """What a row's tokens were drawn from: probabilities [n, V] of the target and the expert."""

    target: Tensor
    expert: Tensor

    def overlap(self, tried: Tried) -> float:
        """Sum over tokens of min(target, drafter): 1 less their total variation distance."""
        target = self.target[tried.position]
        if tried.draft is not None:
            return float(target[tried.draft])
        return float(torch.minimum(target, self.expert[tried.position]).sum())


@torch.inference_mode()
def text_of(trio: Trio, row: Row, temperature: float) -> Text:
    """The probabilities along a row, from one forward of each role over its whole text."""
    ids = torch.tensor([[*row.prompt, *row.token_ids[:-1]]])
    logits = {
        role: model(input_ids=ids, use_cache=False)
        .logits[0, len(row.prompt) - 1 :, : trio.vocab_size]
        .float()
        for role, model in trio.models.items()
    }
    target = torch.softmax(combined(logits) / temperature, -1)
    return Text(target, torch.softmax(logits["expert"] / temperature, -1))


def expected(pairs: Iterable[tuple[Tried, float]]) -> dict[str, Any]:
    """What the drafts that were tried should have come to, beside what they did.

    Args:
        pairs: drafts that were tried, each with its overlap.

    Returns:
        ``overlap``: the mean, which is rejection's acceptance. ``bound``: the mean of
        (1 - d) / (1 + d), d = 1 - overlap, which is at most coupled's. ``deviations``: accepted
        drafts less the sum of overlaps, over the standard deviation of that difference if each
        draft is kept with the probability of its overlap; None where nothing is left to chance.
    """
    overlaps, accepted = [], 0
    for tried, overlap in pairs:
        # Rounded sums of a whole vocabulary may pass 1.
        overlaps.append(min(overlap, 1.0))
        accepted += tried.accepted
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
