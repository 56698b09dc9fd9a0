"""What a base loses of which only the likeliest tokens are known, and what a call to it costs.

``python -m benchmarks.remote --help``; docs/remote.md says what the columns mean.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from statistics import median
from typing import Annotated, Any
from urllib.error import URLError

import torch
import typer
from torch import Tensor

from benchmarks.acceptance import decode, make_prompts
from benchmarks.harness import options, report, trios
from benchmarks.harness.decoding import Prompts, combined
from benchmarks.harness.options import parse_choices
from proxytune_kernels import Decoder, RemoteBase, SamplingParams, Trio
from proxytune_kernels.decoder.remote import complete
from proxytune_kernels.trio.remote import TAILS

_PORT = 18_431
_START_SECONDS = 300

Record = dict[str, Any]


@torch.inference_mode()
def log_probabilities(
    trio: Trio, prompt: Sequence[int], token_ids: Sequence[int]
) -> dict[str, Tensor]:
    """fp32 [tokens, V] of each role, before each of a text's output tokens."""
    ids = torch.tensor([[*prompt, *token_ids[:-1]]])
    return {
        role: model(input_ids=ids, use_cache=False)
        .logits[0, len(prompt) - 1 :, : trio.vocab_size]
        .float()
        .log_softmax(-1)
        for role, model in trio.models.items()
    }


def of_known(logits: dict[str, Tensor], known: int, tail: str) -> dict[str, Tensor]:
    """By position: coverage, agreement and total variation where ``known`` tokens are known."""
    full = combined(logits).log_softmax(-1)
    lowest = logits["base"].topk(min(known, logits["base"].shape[-1])).values[:, -1:]
    base = logits["base"].masked_fill(logits["base"] < lowest, -torch.inf)
    base, coverage = complete(base, logits["anti"], tail, None)
    found = combined({**logits, "base": base}).log_softmax(-1)
    return {
        "coverage": coverage,
        "agreement": (found.argmax(-1) == full.argmax(-1)).float(),
        "total_variation": (found.exp() - full.exp()).abs().sum(-1) / 2,
    }


def compare(
    trio: Trio, kind: str, prompts: Prompts, tokens: int, temperature: float, counts: Sequence[int]
) -> list[Record]:
    """A record for each number of known tokens and each tail, over the texts of the whole trio."""
    texts = decode(trio, prompts, tokens, temperature).token_ids
    rows: dict[tuple[int, str], list[dict[str, Tensor]]] = {}
    for prompt, ids in zip(prompts, texts, strict=True):
        logits = log_probabilities(trio, prompt, ids)
        for known in counts:
            for tail in TAILS:
                rows.setdefault((known, tail), []).append(of_known(logits, known, tail))
    records = []
    for (known, tail), each in rows.items():
        means = {name: float(torch.cat([row[name] for row in each]).mean()) for name in each[0]}
        shared = {"kind": kind, "known": known, "tail": tail, "tokens": sum(map(len, texts))}
        records.append({**shared, **means})
    return records


@contextmanager
def served(trio: Trio, dtype: str | None) -> Iterator[str]:
    """Our server, a process of its own with this many threads, over the base alone: its URL."""
    directory = trio.base.config._name_or_path
    given = ["--base", directory, "--tokenizer", trio.tokenizer.name_or_path]
    given += [] if dtype is None else ["--dtype", dtype]
    command = [sys.executable, "-m", "proxytune_kernels", "serve", "--port", str(_PORT), *given]
    url = f"http://127.0.0.1:{_PORT}"
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            end = time.monotonic() + _START_SECONDS
            while time.monotonic() < end and server.poll() is None:
                with suppress(URLError, ConnectionError):
                    urllib.request.urlopen(f"{url}/health", timeout=10).close()
                    break
                time.sleep(0.2)
            else:
                log.seek(0)
                raise RuntimeError(log.read()[-2000:].decode(errors="replace"))
            yield f"{url}/v1"
        finally:
            server.terminate()
            server.wait()


def speed(
    trio: Trio, url: str, prompts: Prompts, tokens: int, repeats: int, top_n: int
) -> list[Record]:
    """Tokens a second of the local trio and of the remote base, by turns; calls a token of all."""
    remote = Trio.from_models(RemoteBase(url, top_n=top_n), trio.expert, trio.anti, trio.tokenizer)
    decoders = {"local": Decoder(trio, len(prompts)), "remote": Decoder(remote, len(prompts))}
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    calls = 0
    for i in range(repeats + 1):
        for name, decoder in decoders.items():
            before, start = remote.base.endpoint.tries, time.perf_counter()
            decoder.generate(list(prompts), params)
            if i:  # the first is for warming up
                seconds[name].append(time.perf_counter() - start)
                calls += remote.base.endpoint.tries - before
    count = tokens * len(prompts)
    local, far = (count / median(seconds[name]) for name in ("local", "remote"))
    return [
        {
            "requests": len(prompts),
            "tokens": tokens,
            "known": top_n,
            "local": local,
            "remote": far,
            "ratio": far / local,
            "calls_per_token": calls / repeats / count,
        }
    ]


COLUMNS: tuple[report.Column, ...] = (
    ("known", "known", str),
    ("tail", "tail", str),
    ("coverage", "coverage", lambda x: f"{x:.3f}"),
    ("greedy\nagreement", "agreement", lambda x: f"{x:.3f}"),
    ("total\nvariation", "total_variation", lambda x: f"{x:.3f}"),
)
CAPTION = (
    "coverage: the base's probability of the known tokens. greedy agreement: share of positions "
    "whose likeliest token is the whole trio's. Means over the positions of the trio's own texts."
)
SPEED: tuple[report.Column, ...] = (
    ("requests", "requests", str),
    ("known", "known", str),
    ("local\ntokens/s", "local", report.fixed),
    ("remote\ntokens/s", "remote", report.fixed),
    ("ratio", "ratio", lambda x: f"{x:.2f}"),
    ("calls\na token", "calls_per_token", lambda x: f"{x:.3f}"),
)


def main(
    trio: options.TrioName = "shipped",
    kinds: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(trios.PROMPTS)}.")
    ] = "text,arithmetic",
    known: Annotated[str, typer.Option(help="Comma-separated: how many.")] = "5,20,100,1000",
    prompts: Annotated[int, typer.Option(min=1, help="Of each kind, one batch.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Of each prompt.")] = 15,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Of the texts.")] = 1.0,
    measure_speed: Annotated[
        bool, typer.Option("--speed", help="Decode with our own server as the base instead.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="With --speed.")] = 5,
    threads: options.Threads = None,
    dtype: options.Dtype = None,
    output: options.Output = None,
) -> None:
    """Say what is lost where a base tells of its likeliest tokens alone, or what calls cost."""
    options.set_threads(threads)
    wanted = parse_choices("--kinds", kinds, trios.PROMPTS, None)
    counts = sorted(set(parse_choices("--known", known, range(1, 1 << 20), None)))
    records: list[Record] = []
    steps: Sequence[Any] = counts if measure_speed else wanted
    with options.user_errors(), report.progress_bar(len(steps)) as tick:
        opened = trios.open_trio(trio, dtype)
        if measure_speed:
            given = make_prompts(opened, trio, wanted[-1], prompts, tokens)
            with served(opened, dtype) as url:
                for count in counts:
                    records += speed(opened, url, given, tokens, repeats, count)
                    tick(f"{count} known")
        else:
            records = _tables(opened, trio, wanted, prompts, tokens, temperature, counts, tick)
    name, of = options.trio_label(trio), trios.dtypes(opened)
    shared = {"trio": name, "dtype": of, "temperature": temperature}
    report.write_results(output, "remote", shared, records, name)
    label = trios.dtype_label(opened)
    if measure_speed:
        title = f"A base behind our own server, trio {name}, {label}, greedy"
        report.print_records(title, "", records, SPEED, itemgetter("requests"))
    else:
        title = f"A base of which the likeliest tokens are known, trio {name}, {label}"
        report.print_records(title, CAPTION, records, COLUMNS, itemgetter("kind"))


def _tables(
    trio: Trio,
    name: str,
    kinds: Sequence[str],
    prompts: int,
    tokens: int,
    temperature: float,
    counts: Sequence[int],
    tick: Callable[[str], object],
) -> list[Record]:
    records = []
    for kind in kinds:
        given = make_prompts(trio, name, kind, prompts, tokens)
        records += compare(trio, kind, given, tokens, temperature, counts)
        tick(kind)
    return records


if __name__ == "__main__":
    typer.run(main)
