"""Runs the server in this process, from its socket to its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from proxytune_kernels.server.settings import Settings

_CONNECTIONS = 1024
_BACKLOG = 256
_HEAD_BYTES = 1 << 16


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; OSError says what is wrong with it.

    Nobody can connect before :func:`run`.
    """
    [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    bound = socket.socket(family, kind, protocol)
    # A server that has just ended leaves its port free.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def server_of(app: FastAPI, settings: Settings) -> Server:
    """A server that can be run, in any thread."""
    config = uvicorn.Config(
        app,
        http=_bounded(settings.request_seconds),
        log_config=None,
        access_log=False,
        limit_concurrency=_CONNECTIONS,
        backlog=_BACKLOG,
        server_header=False,
        lifespan="on",
        ws="none",
        # What still runs then has been told so by the engine.
        timeout_graceful_shutdown=int(settings.shutdown_seconds) + 5,
    )
    return Server(config, app, settings.shutdown_seconds)


def _bounded(seconds: float) -> type[HttpToolsProtocol]:
    """HTTP over connections that are closed where a request takes longer to come in."""

    class Bounded(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _head: int | None = 0  # its bytes so far; None behind it

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._head is not None:
                self._head += len(data)
                if self._head > _HEAD_BYTES:
                    self.transport.close()

        def on_message_begin(self) -> None:
            self._head = 0
            self._start()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head = None
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._stop()
            super().on_message_complete()

        def _start(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(seconds, self._late)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            cycle = self.cycle
            if cycle is None or cycle.response_complete or cycle.more_body:
                self.transport.close()
            else:  # it is the one behind a request that runs
                self._start()

    return Bounded


class Server(uvicorn.Server):
    """Stops at the first SIGTERM or SIGINT when all requests have ended, at the second at once.

    Args:
        config: of uvicorn.
        app: with its engine.
        seconds: that running requests have to finish.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, seconds: float) -> None:
        super().__init__(config)
        self._engine = app.state.api.engine
        self._seconds = seconds

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Obey signals, and do not send them again at the end, as uvicorn does."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True

    async def shutdown(self, sockets: Any = None) -> None:
        """Finish what runs, up to the deadline."""
        self._engine.drain(self._seconds)
        await super().shutdown(sockets)
