"""The server under load: clients in a process of their own, against the decoder alone.

``python -m benchmarks.load`` starts ``proxytune serve --trio shipped`` on a free port of the
loopback, sends it 1,000 streaming requests from 32 clients, and decodes prompts of the same kind
without a server: in turns, since a machine is not as fast at all times.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Annotated, Any
from urllib.request import urlopen

import typer

_PROMPT = (
    "Question: Tom has {} apples and buys {} more. How many apples does Tom have now?\nAnswer:"
)
_START_SECONDS = 120


@dataclass
class Seen:
    """What the clients saw."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    """Id of an answer -> which request it is of."""
    statuses: dict[int, int] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)
    """Bytes of the server's processes, as the requests went on."""

    def add(self, other: Seen) -> None:
        """What came later."""
        assert not self.answers.keys() & other.answers.keys(), "answered twice"
        self.seconds += other.seconds
        self.tokens += other.tokens
        for name in ("first", "between", "memory"):
            getattr(self, name).extend(getattr(other, name))
        self.answers |= other.answers
        self.statuses = {
            status: self.statuses.get(status, 0) + other.statuses.get(status, 0)
            for status in self.statuses.keys() | other.statuses.keys()
        }

    def lines(self) -> Iterator[str]:
        """The figures, for people."""
        count = len(self.answers)
        yield f"{count} answers, {self.tokens} tokens in {self.seconds:.1f} s"
        yield f"throughput: {self.tokens / self.seconds:.0f} tokens/s"
        yield f"statuses: {self.statuses}"
        yield f"time to first token: median {1e3 * median(self.first):.1f} ms"
        ninety_fifth = quantiles(self.between, n=20)[-1]
        middle = median(self.between)
        yield (
            f"between tokens: median {1e3 * middle:.2f} ms, p95 {1e3 * ninety_fifth:.2f} ms "
            f"({ninety_fifth / middle:.2f} of the median)"
        )
        if self.memory:
            parts = [f"{size / 2**20:.0f}" for size in self.memory]
            yield f"memory of the server, MiB: {', '.join(parts)}"


def prompt_of(number: int) -> str:
    """The prompt of a request."""
    return _PROMPT.format(number % 90 + 2, number % 7 + 2)


async def load(port: int, clients: int, requests: range, max_tokens: int) -> Seen:
    """Send requests, each client one after the other; 429 is tried again when it says."""
    seen = Seen()
    left = iter(requests)
    started = time.perf_counter()

    async def client() -> None:
        for number in left:
            while (wait := await _request(port, number, max_tokens, seen)) is not None:
                await asyncio.sleep(wait)

    await asyncio.gather(*(client() for _ in range(clients)))
    seen.seconds = time.perf_counter() - started
    seen.memory += _memory(port)
    return seen


async def _request(port: int, number: int, max_tokens: int, seen: Seen) -> float | None:
    """Stream one request; seconds to wait where the queue is full."""
    body = json.dumps({
        "model": "shipped", "prompt": prompt_of(number), "max_tokens": max_tokens, "seed": number,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    })  # fmt: skip
    before = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    status = int(head.split()[1])
    seen.statuses[status] = seen.statuses.get(status, 0) + 1
    if status == 429:
        writer.close()
        found = re.search(r"retry-after: (\d+)", head, re.I)
        assert found is not None
        return float(found[1])
    assert status == 200, head
    last, done, tokens = None, 0, 0
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            done += 1
        elif line.startswith(b"data: "):
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if chunk["choices"]:
                if last is None:
                    seen.first.append(now - before)
                else:
                    seen.between.append(now - last)
                last = now
            else:
                tokens = chunk["usage"]["completion_tokens"]
                assert chunk["id"] not in seen.answers, "answered twice"
                seen.answers[chunk["id"]] = number
    assert (done, tokens) == (1, max_tokens), f"request {number} is lost: {done}, {tokens}"
    seen.tokens += tokens
    writer.close()
    return None


def _memory(port: int) -> list[int]:
    text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    # Of the process that answers, and of the decoder's.
    found = re.findall(r"^\w*process_resident_memory_bytes (\S+)", text, re.M)
    return [sum(int(float(size)) for size in found)] if found else []


def start(*options: str) -> subprocess.Popen[str]:
    """Start ``proxytune serve`` on a free port."""
    command = [sys.executable, "-m", "proxytune_kernels", "serve", "--port", "0", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def port_of(process: subprocess.Popen[str]) -> int:
    """The port of a server that was started, once it answers."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if (found := re.match(r"http://\S+:(\d+) serves", line)) is not None:
            # A server whose log is not read would wait for its reader.
            threading.Thread(target=_drain, args=(process.stderr,), daemon=True).start()
            _wait(int(found[1]))
            return int(found[1])
    process.stderr.close()
    raise RuntimeError("".join(said))


def _drain(log: IO[str]) -> None:
    with log:
        for _ in log:
            pass


@contextmanager
def serving(*options: str) -> Iterator[int]:
    """The port of a server that runs meanwhile."""
    process = start(*options)
    try:
        yield port_of(process)
    finally:
        process.terminate()
        process.wait(60)


def _wait(port: int) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _open_alone() -> Any:
    """A decoder of 16 rows in this process, warm."""
    from proxytune_kernels import Decoder, load_trio

    decoder = Decoder(load_trio("shipped"))
    _alone(decoder, range(16), 32)
    return decoder


def _alone(decoder: Any, requests: range, max_tokens: int) -> float:
    """Tokens a second of the decoder alone."""
    from proxytune_kernels import SamplingParams

    params = [SamplingParams(max_tokens=max_tokens, seed=i, ignore_eos=True) for i in requests]
    started = time.perf_counter()
    decoder.generate([prompt_of(i) for i in requests], params)
    return len(requests) * max_tokens / (time.perf_counter() - started)


def main(
    clients: Annotated[int, typer.Option(min=1, max=256)] = 32,
    requests: Annotated[int, typer.Option(min=2, max=100_000)] = 1000,
    max_tokens: Annotated[int, typer.Option(min=2, max=512)] = 64,
    turns: Annotated[int, typer.Option(min=1, help="In which the requests are sent.")] = 5,
    port: Annotated[int, typer.Option(help="Of a server that runs; 0 starts one.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="JSON lines.", show_default="a file of benchmarks/results")
    ] = None,
) -> None:
    """Load a server with streaming requests, and compare with the decoder alone."""
    from benchmarks.harness import report
    from benchmarks.harness.measure import ratios, summary

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    decoder = _open_alone()
    seen, alone, served = Seen(), [], []
    with serving("--trio", "shipped") if not port else nullcontext(port) as number:
        asyncio.run(load(number, clients, range(2 * clients), 8))  # warm
        for turn in range(turns):
            part = range(requests * turn // turns, requests * (turn + 1) // turns)
            own = asyncio.run(load(number, clients, part, max_tokens))
            alone.append(_alone(decoder, part, max_tokens))
            served.append(own.tokens / own.seconds)
            seen.add(own)
    for line in seen.lines():
        print(line)
    print(f"the decoder alone: {median(alone):.0f} tokens/s")
    each = ", ".join(f"{a / b:.2f}" for a, b in zip(served, alone, strict=True))
    share = ratios(served, alone)
    print(f"the server's share of that: {share['median']:.2f} (of {each})")
    shared = {"clients": clients, "requests": requests, "max_tokens": max_tokens, "turns": turns}
    record = {
        "tokens_per_s": {"server": summary(served), "alone": summary(alone)},
        "server_over_alone": share,
        "first_token_ms": summary(seen.first, 1e3),
        "between_tokens_ms": summary(seen.between, 1e3),
        "between_tokens_p95_over_median": quantiles(seen.between, n=20)[-1] / median(seen.between),
        "memory_bytes": seen.memory,
    }
    report.write_results(output, "load", shared, [record])


if __name__ == "__main__":
    typer.run(main)
