"""Generations that an event loop waits for, and the worker that alone calls the decoder for them.

The event loop puts commands to the worker, which obeys them between two steps and tells what came
of a step in one message. So a request that is cancelled is out of its slot before the next step but
one. The worker runs in a thread of this process, or in a process of its own: then the event loop
takes no time from the steps (:mod:`proxytune_kernels.server.process`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from proxytune_kernels.decoder import Decoder, Grammar, StreamEvent
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.server.metrics import Metrics
from proxytune_kernels.trio import Trio

_log = logging.getLogger(__name__)

Prompt = Mapping[str, Sequence[int]]
"""Role -> token ids."""

Tell = Callable[..., None]
"""Takes the name of a method of :class:`Engine`, and its arguments; from any thread."""

_COMPILING = 4  # grammars at the same time


class BusyError(Exception):
    """The queue is full.

    Args:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full: try again later")
        self.retry_after = retry_after


class StoppingError(Exception):
    """The server takes no more requests, or has not the time to finish this one."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class LostError(Exception):
    """The decoder failed while the request ran."""

    def __init__(self) -> None:
        super().__init__("the decoder failed while it ran this request: its log says why")


class GoneError(Exception):
    """The client has gone away."""


class Generation:
    """The outputs of one call of the API: read by one task of the event loop, then closed.

    Args:
        engine: runs it.
        key: its name between the two.
        count: outputs that are to come.
        whole: wake the reader for ends alone.
    """

    def __init__(self, engine: Engine, key: int, count: int, whole: bool) -> None:
        self.key = key
        self.count = count
        self.whole = whole
        self.left = count  # outputs that have not ended
        self._engine = engine
        self._ready = asyncio.Event()
        self._events: list[tuple[int, StreamEvent]] = []
        self._error: Exception | None = None
        self._started = False
        self._last: dict[int, float] = {}  # output -> when its last token came

    async def accepted(self) -> None:
        """Wait until the decoder has taken the requests.

        Raises:
            ValueError, TypeError: a request that can never run.
        """
        while not self._started and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, StreamEvent]]]:
        """What has come since it was last asked: (which output, event), in order.

        Raises:
            StoppingError, LostError: the requests were ended from outside.
        """
        while self._error is None:
            if self._events:
                events, self._events = self._events, []
                if any(event.finish_reason == "cancelled" for _, event in events):
                    raise LostError
                yield events
            elif self.left:
                await self._wait()
            else:
                return
        raise self._error

    def close(self) -> None:
        """Free the slots of what has not ended; nothing where all has."""
        if self.left:
            self._engine.cancel(self)

    def leave(self) -> None:
        """The client has gone away: its reader gets a :class:`GoneError`."""
        self.close()
        self._error = GoneError()
        self._ready.set()

    async def _wait(self) -> None:
        await self._ready.wait()
        self._ready.clear()

    # Called by the engine on the event loop.

    def start(self) -> None:
        """The decoder has taken it."""
        self._started = True
        self._ready.set()

    def fail(self, error: Exception) -> int:
        """End all outputs that have not ended; how many there were."""
        ended, self.left = self.left, 0
        self._error = error
        self._ready.set()
        return ended

    def add(self, index: int, event: StreamEvent) -> None:
        """Take an event."""
        self._events.append((index, event))
        self.left -= event.output is not None
        if event.output is not None or not self.whole:
            self._ready.set()

    def since_last(self, index: int, now: float) -> float | None:
        """Seconds since the last token of an output; None where this is the first."""
        before, self._last[index] = self._last.get(index), now
        return None if before is None else now - before


class Worker:
    """Steps a decoder, which nobody else may call, and obeys commands between two steps.

    Args:
        decoder: nobody else may use it.
        receive: the next command, (name of a method here, arguments); None where there is none. It
            waits for one where it is given True.
        tell: is told what happens.
    """

    def __init__(
        self, decoder: Decoder, receive: Callable[[bool], tuple[Any, ...] | None], tell: Tell
    ) -> None:
        self._decoder = decoder
        self._receive = receive
        self._tell = tell
        self._ids: dict[int, list[int]] = {}  # generation -> requests that have not ended
        self._places: dict[int, tuple[int, int]] = {}  # request -> generation, which of its outputs
        self._compilers = ThreadPoolExecutor(_COMPILING, "proxytune-grammars")
        self._ended = False

    def run(self) -> None:
        """Work until :meth:`end`."""
        while not self._ended:
            while (command := self._receive(not self._decoder.unfinished)) is not None:
                getattr(self, command[0])(*command[1:])
                if self._ended:
                    return
            try:
                events = self._decoder.step()
            except Exception as error:
                # The decoder is as new; the next step says which requests are lost.
                where = "".join(traceback.format_tb(error.__traceback__))
                _log.error("a step failed: %s\n%s", type(error).__name__, where)
                continue
            if events:
                self._tell("delivered", [self._placed(event) for event in events])

    def submit(self, key: int, requests: Sequence[tuple[Prompt, SamplingParams]]) -> None:
        """Run the requests of a generation."""
        ids = self._ids[key] = []
        error = None
        try:
            for prompt, params in requests:
                first = self._decoder.submit(prompt, params)
                ids += range(first, first + params.n)
        except Exception as wrong:
            error = wrong
        self._places |= {request_id: (key, i) for i, request_id in enumerate(ids)}
        if not ids:
            del self._ids[key]
        if error is not None:
            self.cancel(key)
            self._tell("failed", key, error)
        else:
            self._tell("started", key)

    def cancel(self, key: int) -> None:
        """End what has not ended of a generation."""
        for request_id in self._ids.get(key, ()):
            self._decoder.cancel(request_id)

    def compile(self, key: int, grammar: Grammar) -> None:
        """Compile a grammar, beside the steps."""
        self._compilers.submit(self._compile, key, grammar)

    def end(self) -> None:
        """Stop."""
        self._ended = True
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def _compile(self, key: int, grammar: Grammar) -> None:
        error = None
        try:
            self._decoder.compile_grammar(grammar)
        except Exception as wrong:
            error = wrong
        self._tell("compiled", key, error)

    def _placed(self, event: StreamEvent) -> tuple[int, int, StreamEvent]:
        key, index = self._places[event.request_id]
        if event.output is not None:
            del self._places[event.request_id]
            ids = self._ids[key]
            ids.remove(event.request_id)
            if not ids:
                del self._ids[key]
        return key, index, event


class Served(Protocol):
    """A decoder, where it is: it runs :class:`Worker` with it."""

    trio: Trio
    max_batch_size: int
    max_seq_len: int

    def statistics(self) -> Mapping[str, int]:
        """As :meth:`Decoder.statistics`."""

    def start(self, tell: Tell) -> None:
        """Let the worker run; ``tell`` is called from another thread."""

    def put(self, *command: Any) -> None:
        """Give the worker a command."""

    def stop(self) -> None:
        """End the worker, after the step that it is in."""


class DecoderThread:
    """A decoder in a thread of this process: see :class:`Served`."""

    def __init__(self, decoder: Decoder) -> None:
        self.trio = decoder.trio
        self.max_batch_size = decoder.max_batch_size
        self.max_seq_len = decoder.max_seq_len
        self.statistics = decoder.statistics
        self._decoder = decoder
        self._commands: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()

    def start(self, tell: Tell) -> None:
        """Start the thread."""
        worker = Worker(self._decoder, self._receive, tell)

        def run() -> None:
            try:
                worker.run()
            finally:
                tell("lost")

        self._thread = threading.Thread(target=run, name="proxytune-decoder", daemon=True)
        self._thread.start()

    def put(self, *command: Any) -> None:
        """Give the thread a command."""
        self._commands.put(command)

    def stop(self) -> None:
        """End the thread, after the step that it is in."""
        self._commands.put(("end",))
        self._thread.join()

    def _receive(self, wait: bool) -> tuple[Any, ...] | None:
        try:
            return self._commands.get(block=wait)
        except queue.Empty:
            return None


class Engine:
    """Runs generations by a worker; its methods are for the event loop in which it was started.

    Args:
        served: the decoder, which nobody else may use.
        max_queue: outputs that may wait for a slot.
        metrics: is told what happens.
    """

    def __init__(self, served: Served, max_queue: int, metrics: Metrics) -> None:
        self._served = served
        self._metrics = metrics
        self._slots = served.max_batch_size
        self._capacity = self._slots + max_queue
        self._keys = itertools.count()
        self._running: dict[int, Generation] = {}
        self._compiling: dict[int, asyncio.Future[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reserved = 0
        self._seconds = 1.0  # that an output takes, lately
        self._stopping = False
        self._lost = False

    def start(self) -> None:
        """Start the worker."""
        self._loop = asyncio.get_running_loop()
        self._served.start(self._tell)

    @property
    def healthy(self) -> bool:
        """Whether requests are taken."""
        return not self._stopping

    def reserve(self, count: int) -> None:
        """Take room for outputs, before their prompts cost anything.

        Raises:
            BusyError, StoppingError: there is none.
        """
        if self._stopping:
            raise StoppingError
        if count > self._capacity:
            raise ValueError(
                f"a request must have at most {self._capacity} outputs (prompts times n), "
                f"got {count}"
            )
        if self._reserved + count > self._capacity:
            waiting = self._reserved - self._slots
            rounds = 1 + max(waiting, 0) / self._slots
            raise BusyError(max(1, min(60, round(rounds * self._seconds))))
        self._change(count)

    def release(self, count: int) -> None:
        """Give back room that was reserved and has not been used."""
        self._change(-count)

    def submit(self, requests: Sequence[tuple[Prompt, SamplingParams]], whole: bool) -> Generation:
        """Run requests for which there is room reserved; see :class:`Generation`.

        A request's outputs are as many as its ``n``, one behind another.

        Raises:
            LostError: the decoder is gone.
        """
        if self._lost:
            raise LostError
        count = sum(params.n for _, params in requests)
        generation = Generation(self, next(self._keys), count, whole)
        self._running[generation.key] = generation
        self._served.put("submit", generation.key, requests)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End what has not ended of a generation."""
        self._served.put("cancel", generation.key)

    async def compile(self, grammar: Grammar) -> None:
        """Have a grammar compiled, beside the steps, and kept.

        Raises:
            GrammarError: it can't be compiled; says where and why.
        """
        assert self._loop is not None
        key, future = next(self._keys), self._loop.create_future()
        self._compiling[key] = future
        self._served.put("compile", key, grammar)
        try:
            await future
        finally:
            self._compiling.pop(key, None)

    def drain(self, seconds: float) -> None:
        """Take no more requests, and end those that have not ended after so many seconds."""
        self._stopping = True
        assert self._loop is not None
        self._loop.call_later(seconds, self._fail_all, StoppingError())

    def stop(self) -> None:
        """End the worker, after the step that it is in."""
        self._stopping = True
        self._served.stop()

    def _change(self, count: int) -> None:
        self._reserved += count
        slots = self._slots
        self._metrics.occupied(min(self._reserved, slots), max(self._reserved - slots, 0))

    def _fail_all(self, error: Exception) -> None:
        for generation in list(self._running.values()):
            self.cancel(generation)
            self.failed(generation.key, error)

    def _tell(self, name: str, *arguments: Any) -> None:
        """Call a method below on the event loop."""
        assert self._loop is not None
        with suppress(RuntimeError):  # it is closed: nobody waits any more
            self._loop.call_soon_threadsafe(getattr(self, name), *arguments)

    # What the worker tells.

    def started(self, key: int) -> None:
        """The decoder has taken a generation."""
        if (generation := self._running.get(key)) is not None:
            generation.start()

    def failed(self, key: int, error: Exception) -> None:
        """A generation is not to be had."""
        if (generation := self._running.pop(key, None)) is not None:
            self._change(-generation.fail(error))

    def delivered(self, events: Sequence[tuple[int, int, StreamEvent]]) -> None:
        """A step has made these: (generation, which of its outputs, event)."""
        now, ended = time.monotonic(), 0
        for key, index, event in events:
            generation = self._running.get(key)
            if generation is None:
                continue  # it has failed
            if event.token_ids:
                self._metrics.tokens(len(event.token_ids), generation.since_last(index, now))
            generation.add(index, event)
            if event.output is not None:
                ended += 1
                self._metrics.ended(event.output)
                took = event.output.metrics.total - event.output.metrics.queued
                self._seconds += 0.1 * (took - self._seconds)
                if not generation.left:
                    del self._running[key]
        if ended:
            self._change(-ended)

    def compiled(self, key: int, error: Exception | None) -> None:
        """A grammar is compiled, or can't be."""
        future = self._compiling.get(key)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def lost(self) -> None:
        """The worker is gone, and with it all requests."""
        self._stopping = self._lost = True
        for key in list(self._compiling):
            self.compiled(key, LostError())
        for key in list(self._running):
            self.failed(key, LostError())
