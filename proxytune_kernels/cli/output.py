"""Writes what is decoded: as text, as JSON lines, or the base alone beside the proxy-tuned."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, zip_longest
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from proxytune_kernels.cli.options import printable
from proxytune_kernels.decoder import Decoder, RequestOutput, StreamEvent
from proxytune_kernels.params import SamplingParams

BASE_ALONE = "base alone"
PROXY_TUNED = "proxy-tuned"
# Controls that JSON leaves as they are.
_C1 = re.compile(r"[\x7f-\x9f]")


@dataclass(frozen=True)
class CliRequest:
    """A prompt, in any form that the decoder takes, and how to sample for it.

    With a completion it is a text that is given: the prompt, if it has one, and what follows it.
    """

    prompt: Any
    params: SamplingParams
    completion: str | None = None

    @property
    def label(self) -> str:
        """The prompt as text, for people."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt)


def write_text(events: Iterable[StreamEvent], requests: Sequence[CliRequest]) -> None:
    """Texts in the order of the prompts, as they come; under headings if there are several."""
    places = _places(requests)
    requests = [request for request in requests for _ in range(request.params.n)]
    waiting = [""] * len(requests)
    finished = [False] * len(requests)
    current = 0
    _heading(requests, current)
    for event in events:
        place = places[event.index] + event.sample
        waiting[place] += event.text
        finished[place] |= event.output is not None
        while current < len(requests):
            print(_shown(waiting[current]), end="", flush=True)
            waiting[current] = ""
            if not finished[current]:
                break
            print(flush=True)
            current += 1
            _heading(requests, current)


def _places(requests: Sequence[CliRequest]) -> list[int]:
    """The place of each prompt's first output among all."""
    return [0, *accumulate(request.params.n for request in requests)]


def _shown(text: str) -> str:
    """A text as it is; without control characters where a terminal would obey them."""
    return printable(text) if sys.stdout.isatty() else text


def _heading(requests: Sequence[CliRequest], index: int) -> None:
    if len(requests) > 1 and index < len(requests):
        label = " ".join(requests[index].label.split())
        print(f"{'' if index == 0 else chr(10)}==> {printable(label)} <==", flush=True)


def write_jsonl(events: Iterable[StreamEvent], requests: Sequence[CliRequest]) -> None:
    """One object per output, in the order of the prompts, as soon as it is there."""
    outputs: dict[int, RequestOutput] = {}
    places = _places(requests)
    current = 0
    for event in events:
        if event.output is not None:
            outputs[places[event.index] + event.sample] = event.output
        while current in outputs:
            line = json.dumps(_record(outputs.pop(current)), ensure_ascii=False)
            print(_C1.sub(lambda match: f"\\u00{ord(match[0]):02x}", line), flush=True)
            current += 1


def _record(output: RequestOutput) -> dict[str, Any]:
    return {
        "index": output.index,
        **({"sample": output.sample} if output.sample else {}),
        "prompt": output.prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        "logprobs": output.logprobs,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "seed": output.seed,
        **{
            name: value
            for name in ("top_logprobs", "prompt_logprobs")
            if (value := getattr(output, name)) is not None
        },
        **({} if output.steering is None else {"steering": [s._asdict() for s in output.steering]}),
        **({} if output.speculation is None else {"speculation": asdict(output.speculation)}),
    }


def side_by_side(
    base: Decoder, tuned: Decoder, requests: Sequence[CliRequest]
) -> list[tuple[str, str]]:
    """Stream both decoders' texts in two columns, a batch of prompts at a time.

    Plain blocks of text instead where standard output is not a terminal.

    Returns:
        Per prompt, the base's text and the proxy-tuned one.
    """
    console = Console(file=sys.stdout)
    live = console.is_terminal and not console.is_dumb_terminal
    texts: list[tuple[str, str]] = []
    for first in range(0, len(requests), tuned.max_batch_size):
        batch = requests[first : first + tuned.max_batch_size]
        progress = _together(base, tuned, batch)
        rows = _show_live(console, batch, progress) if live else _show_plain(batch, progress)
        texts += [(left, right) for left, right in rows]
    return texts


def _together(
    base: Decoder, tuned: Decoder, batch: Sequence[CliRequest]
) -> Iterator[list[list[str]]]:
    """The texts so far, [base, tuned] per prompt, after each token of either decoder."""
    prompts, params = [r.prompt for r in batch], [r.params for r in batch]
    rows = [["", ""] for _ in batch]
    for events in zip_longest(base.stream(prompts, params), tuned.stream(prompts, params)):
        for column, event in enumerate(events):
            if event is not None:
                rows[event.index][column] += event.text
        yield rows


def _show_live(
    console: Console, batch: Sequence[CliRequest], progress: Iterator[list[list[str]]]
) -> list[list[str]]:
    rows: list[list[str]] = []
    with Live(console=console, refresh_per_second=12) as live:
        for rows in progress:
            live.update(_table(batch, rows))
    return rows


def _table(batch: Sequence[CliRequest], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(show_lines=True, expand=True)
    table.add_column("prompt", ratio=1)
    table.add_column(BASE_ALONE, ratio=1)
    table.add_column(PROXY_TUNED, ratio=1, style="bold")
    for request, row in zip(batch, rows, strict=True):
        table.add_row(*(Text(printable(text.strip())) for text in (request.label, *row)))
    return table


def _show_plain(
    batch: Sequence[CliRequest], progress: Iterator[list[list[str]]]
) -> list[list[str]]:
    rows: list[list[str]] = []
    for latest in progress:
        rows = latest
    for request, (base, tuned) in zip(batch, rows, strict=True):
        for name, text in (("prompt", request.label), (BASE_ALONE, base), (PROXY_TUNED, tuned)):
            print(f"{name}:\n{textwrap.indent(_shown(text.strip()), '    ')}", flush=True)
        print(flush=True)
    return rows
