"""Calls to an HTTP endpoint: bounded in time and size, tried again with backoff, then left alone.

What it answers is hostile until it has been read.
"""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from proxytune_kernels.trio.vocabulary import VocabularyError

_log = logging.getLogger(__name__)

_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_WAIT = 10.0
"""Seconds between two tries, unless the endpoint asks for more."""
_FAILURES, _REST = 8, 30
"""So many failed tries one after the other open the circuit for so many seconds."""
_SHOWN = 200

T = TypeVar("T")


class RemoteError(RuntimeError):
    """An endpoint that does not answer, or not as it must."""


class RefusedError(RemoteError):
    """It answers, and does not do what it is asked for: to ask again is no use.

    Args:
        status: of HTTP; 200 where the answer lacks what was asked for.
    """

    def __init__(self, message: str, status: int = 200) -> None:
        super().__init__(message)
        self.status = status


class TransientError(RemoteError):
    """It may do better at another time.

    Args:
        after: seconds that it asks to wait.
    """

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class Endpoint:
    """One server's HTTP API under a URL. It may be called from several threads.

    Args:
        url: what comes before ``/completions``.
        key: sent as a bearer token; it is in no message and no log.
        timeout: seconds that one try may take, from its first byte to its last.
        attempts: tries of a call at most.
        budget: seconds after which a call is not tried again.
    """

    def __init__(
        self, url: str, key: str | None, timeout: float, attempts: int, budget: float
    ) -> None:
        # Only where there is a remote base: the extra `remote`.
        import httpx2
        from circuitbreaker import CircuitBreaker
        from tenacity import Retrying, stop_after_attempt, stop_before_delay

        self._http, self._url, self._key, self._timeout = httpx2, url, key, timeout
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._client = httpx2.Client(base_url=url, headers=headers, timeout=timeout)
        weakref.finalize(self, self._client.close)
        self._circuit = CircuitBreaker(_FAILURES, _REST, TransientError)
        self._retrying = Retrying(
            retry=lambda state: (
                state.outcome is not None and isinstance(state.outcome.exception(), TransientError)
            ),
            wait=_wait,
            stop=stop_after_attempt(attempts) | stop_before_delay(budget),
            before_sleep=self._note,
            reraise=True,
        )
        self.tries = 0
        """Requests that were sent."""

    def call(
        self,
        path: str,
        body: Any = None,
        read: Callable[[Any], T] = lambda answer: answer,
        most: int = 1 << 20,
    ) -> T:
        """POST a body, or GET without one, and read the JSON that comes back.

        Args:
            path: below the URL.
            body: JSON.
            read: makes of the answer what is wanted; TypeError, KeyError and the like of it say
                that the answer is of another form.
            most: bytes of the answer.

        Raises:
            RemoteError: says what is wrong, without the key.
        """
        return self._retrying(self._guarded, path, body, read, most)

    def _guarded(self, path: str, body: Any, read: Callable[[Any], T], most: int) -> T:
        if self._circuit.opened:
            seconds = self._circuit.open_remaining
            raise RemoteError(
                f"{self._url} has failed {self._circuit.failure_count} times one after "
                f"the other ({self._circuit.last_failure}); it is left alone for {seconds:.0f} s"
            )
        return self._circuit.call(self._try, path, body, read, most)

    def _try(self, path: str, body: Any, read: Callable[[Any], T], most: int) -> T:
        self.tries += 1
        try:
            status, headers, data = self._send(path, body, most)
        except self._http.HTTPError as error:
            said = self._shown(str(error) or type(error).__name__)
            raise TransientError(f"{self._url} can't be reached: {said}") from None
        where = f"{self._url}{path}"
        if status != 200:
            said = self._shown(data.decode(errors="replace"))
            message = f"{where} answered {status}: {said}"
            if status in _TRY_AGAIN:
                raise TransientError(message, _seconds(headers.get("retry-after", "")))
            raise RefusedError(message, status)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            raise TransientError(f"{where} gave an answer that is no JSON, or cut") from None
        try:
            return read(answer)
        except RemoteError as error:
            error.args = (f"{where}: {self._shown(str(error))}",)
            raise
        except VocabularyError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
            raise RefusedError(f"{where} gave an answer of another form") from None

    def _send(self, path: str, body: Any, most: int) -> tuple[int, Any, bytearray]:
        end = time.monotonic() + self._timeout
        data = bytearray()
        method, sent = ("GET", {}) if body is None else ("POST", {"json": body})
        with self._client.stream(method, path, **sent) as response:
            for part in response.iter_bytes():
                data += part
                if len(data) > most:
                    raise RefusedError(f"{path} answered with more than {most} bytes")
                if time.monotonic() > end:  # each part came in time
                    raise TransientError(f"{path} took more than {self._timeout:g} s to answer")
        return response.status_code, response.headers, data

    def _shown(self, text: str) -> str:
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

    def _note(self, state: Any) -> None:
        # What it said may repeat a prompt.
        what, _, _ = str(state.outcome.exception()).partition(": ")
        seconds = state.next_action.sleep
        _log.warning("try %d: %s; again in %.1f s", state.attempt_number, what, seconds)


def _wait(state: Any) -> float:
    """Seconds before the next try: twice as many each time, and not the same for all clients."""
    from tenacity import wait_random_exponential

    backoff = wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT)(state)
    return max(backoff, state.outcome.exception().after)


def _seconds(text: str) -> float:
    """A Retry-After in seconds; dates are not read."""
    return min(float(text), 3600.0) if text.isascii() and text.isdigit() else 0.0
