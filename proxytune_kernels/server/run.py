"""Runs the server in this process, from its socket to its end."""

from __future__ import annotations

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

from proxytune_kernels.server.settings import Settings

_CONNECTIONS = 1024
_BACKLOG = 256


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
