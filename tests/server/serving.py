"""Runs servers in this process, and asks them; what imports it is skipped without the extra."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra serve: fastapi is not there")
pytest.importorskip("uvicorn", reason="the server needs the extra serve: uvicorn is not there")

import proxytune_kernels as ptk
from proxytune_kernels.server.app import create_app
from proxytune_kernels.server.run import Server, listen, server_of
from proxytune_kernels.server.settings import Settings

PROMPT = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have now?\nAnswer:"


@dataclass
class Serving:
    """A server that runs in a thread of this process."""

    port: int
    decoder: ptk.Decoder
    server: Server
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[HTTPResponse, bytes]:
        """A request by the standard library's client; a body is sent as JSON."""
        with self.open(path, body, method, **headers) as response:
            return response, response.read()

    def open(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> HTTPResponse:
        """The same, not read; closing the answer closes the connection."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json"} if data is not None else {}
        sent |= {"connection": "close"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if data is None else "POST"), path, data, sent)
        # The connection's socket is the answer's alone: the server closes behind it.
        return connection.getresponse()

    def error(self, body: Any, status: int = 400, path: str = "/v1/completions") -> dict[str, Any]:
        """The error of a request that must be refused."""
        response, data = self.ask(path, body)
        assert response.status == status, data
        return json.loads(data)["error"]

    def metric(self, name: str) -> float:
        """A metric's value."""
        text = self.ask("/metrics")[1].decode()
        [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[1])

    def wait_idle(self, seconds: float = 20) -> None:
        """Wait until no slot is in use."""
        wait_for(lambda: self.metric("proxytune_slots_in_use") == 0, seconds)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


@contextmanager
def serving(decoder: ptk.Decoder, **settings: Any) -> Iterator[Serving]:
    limits = Settings(model="shipped", **settings)
    bound = listen("127.0.0.1", 0)
    server = server_of(create_app(decoder, limits), limits)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Serving(bound.getsockname()[1], decoder, server, thread)
    finally:
        server.should_exit = True
        thread.join(60)
