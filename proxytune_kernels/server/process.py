"""A decoder in a process of its own: its steps and the event loop do not wait for each other.

The process ends with this one, however that ends: nobody is left at the other end of its pipe.
"""

from __future__ import annotations

import gc
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from proxytune_kernels.decoder import Decoder
from proxytune_kernels.server.engine import Tell, Worker
from proxytune_kernels.trio import Trio

_COUNTED = 0.1  # seconds between two times that the decoder's statistics are told


class DecoderProcess:
    """Opens a decoder in a new process: see :class:`~proxytune_kernels.server.engine.Served`.

    Args:
        make: opens it there; a function that can be pickled.

    As a context manager it ends the process.
    """

    trio: Trio
    max_batch_size: int
    max_seq_len: int

    def __init__(self, make: Callable[[], Decoder]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_run, args=(other, make), name="proxytune-decoder")
        self._process.start()
        other.close()
        self._commands: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, daemon=True)
        self._sender.start()
        self._reader: threading.Thread | None = None
        self._counts: Mapping[str, int] = {}
        self._stops = False

    def wait(self) -> int | None:
        """Wait until the decoder is there; None, or the exit status of the process if it ended."""
        try:
            opened = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            return self._process.exitcode
        self.trio, self.max_batch_size, self.max_seq_len, self._counts = opened
        return None

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def statistics(self) -> Mapping[str, int]:
        """Those of the decoder, a moment ago."""
        return self._counts

    def start(self, tell: Tell) -> None:
        """Let the worker run."""
        self._reader = threading.Thread(target=self._read, args=(tell,), daemon=True)
        self._reader.start()

    def put(self, *command: Any) -> None:
        """Give the worker a command, at the latest when its step has ended; waits for nothing."""
        self._commands.put(command)

    def stop(self) -> None:
        """End the process, after the step that it is in."""
        self._stops = True
        self.put("end")
        self._sender.join()
        if self._reader is not None:
            self._reader.join()
        self._process.join()

    def __enter__(self) -> DecoderProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._reader is None:  # it may still be opening its models
            self._process.terminate()
        self.stop()
        self._connection.close()

    def _send(self) -> None:
        # The worker receives between steps, and a pipe holds little: an event loop must not wait.
        command: tuple[Any, ...] = ()
        while command != ("end",):
            command = self._commands.get()
            # Where the process is gone, its end is told already, or will be.
            with suppress(OSError):
                self._connection.send(command)

    def _read(self, tell: Tell) -> None:
        with suppress(EOFError, OSError):
            while True:
                counts, message = self._connection.recv()
                if counts is not None:
                    self._counts = counts
                tell(*message)
        if not self._stops:
            tell("lost")
            # There is nothing left to serve.
            signal.raise_signal(signal.SIGTERM)


def freeze() -> None:
    """Leave what is there by now out of collections: one that looked at it all takes 0.2 s."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class _Model:
    """As much of a model as :meth:`Trio.tokenize` reads."""

    shape: tuple[int, ...]

    def get_input_embeddings(self) -> _Model:
        return self

    @property
    def weight(self) -> _Model:
        return self


def _widths(models: Mapping[str, Any]) -> dict[str, _Model]:
    return {
        role: _Model(tuple(model.get_input_embeddings().weight.shape))
        for role, model in models.items()
    }


def _run(connection: Connection, make: Callable[[], Decoder]) -> None:
    """What the process does."""
    # An interrupt from a terminal goes to both processes, and only the other one obeys.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    decoder = make()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trio = decoder.trio
    trio = replace(trio, models=_widths(trio.models), further=_widths(trio.further))
    lock, told = threading.Lock(), 0.0

    def tell(*message: Any) -> None:
        nonlocal told
        now = time.monotonic()
        with lock:
            late = now - told > _COUNTED or not decoder.unfinished
            told = now if late else told
            connection.send((decoder.statistics() if late else None, message))

    def receive(wait: bool) -> Any:
        return connection.recv() if wait or connection.poll() else None

    freeze()
    with suppress(EOFError, OSError):  # the other process is gone
        connection.send((trio, decoder.max_batch_size, decoder.max_seq_len, decoder.statistics()))
        Worker(decoder, receive, tell).run()
