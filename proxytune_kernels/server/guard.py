"""What every request passes before it is read: the host it names, its key, its size."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxytune_kernels.server.settings import Settings

OPEN_PATHS = ("/", "/health", "/openapi.json")
"""Paths that need no key: they tell nothing of requests, and nothing runs."""


class Guard:
    """Refuses requests before anything is done for them.

    Args:
        app: what it guards.
        settings: say what is let in.
        refuse: makes the answer of a refusal, from a status and a sentence.
        count: is told of every answer: path and status.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        refuse: Callable[[int, str], ASGIApp],
        count: Callable[[str, int], None],
    ) -> None:
        self._app = app
        self._settings = settings
        self._refuse = refuse
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._count(getattr(route, "path", "other"), message["status"])
            await send(message)

        refusal = self._refusal(scope["path"], scope["method"], Headers(scope=scope))
        if refusal is not None:
            await self._refuse(*refusal)(scope, receive, counted)
            return
        await self._app(scope, self._bounded(receive), counted)

    def _refusal(self, path: str, method: str, headers: Headers) -> tuple[int, str] | None:
        settings = self._settings
        if settings.hosts and _name(headers.get("host", "")) not in settings.hosts:
            # A page elsewhere may have let its own name point here.
            return 400, "the Host header must name this server: it listens on loopback alone"
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > settings.max_body_bytes:
            return 413, self._too_large
        if settings.api_key is None or path in OPEN_PATHS or method == "OPTIONS":
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), settings.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            return 401, "the API key is missing or wrong: send it as Authorization: Bearer KEY"
        return None

    @property
    def _too_large(self) -> str:
        return f"the body must have at most {self._settings.max_body_bytes} bytes"

    def _bounded(self, receive: Receive) -> Receive:
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._settings.max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return bounded


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def loopback_names(address: Any) -> tuple[str, ...]:
    """Names that a server on a loopback address goes by; none where others can reach it."""
    loopback = address.startswith("127.") or address in ("localhost", "::1")
    return (address, "localhost", "127.0.0.1", "::1") if loopback else ()
