"""One thread that owns the decoder, and the generations that an event loop waits for.

The event loop puts commands into a queue; the thread obeys them between two steps and hands the
steps' events back. So a request that is cancelled is out of its slot before the next step but one.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from proxytune_kernels.decoder import Decoder, StreamEvent
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.server.metrics import Metrics

_log = logging.getLogger(__name__)

Prompt = Mapping[str, Sequence[int]]
"""Role -> token ids."""


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
        count: outputs that are to come.
        whole: wake the reader for ends alone.
    """

    def __init__(self, engine: Engine, count: int, whole: bool) -> None:
        self.count = count
        self.whole = whole
        self.ids: dict[int, int] = {}  # request id -> which output; the engine's thread's own
        self._engine = engine
        self._ready = asyncio.Event()
        self._events: list[tuple[int, StreamEvent]] = []
        self._error: Exception | None = None
        self._left = count  # outputs that have not ended
        self._started = False

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
            elif self._left:
                await self._wait()
            else:
                return
        raise self._error

    def close(self) -> None:
        """Free the slots of what has not ended; nothing where all has."""
        if self._left:
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
        ended, self._left = self._left, 0
        self._error = error
        self._ready.set()
        return ended

    def add(self, index: int, event: StreamEvent) -> int:
        """Take an event; 1 if it is an output's last."""
        self._events.append((index, event))
        if event.output is not None:
            if not self._left:
                return 0  # it has failed
            self._left -= 1
        if event.output is not None or not self.whole:
            self._ready.set()
        return int(event.output is not None)


class Engine:
    """Runs generations in a thread that alone calls the decoder.

    Its methods are for the event loop in which it was started.

    Args:
        decoder: nobody else may use it.
        max_queue: outputs that may wait for a slot.
        metrics: is told what happens.
    """

    def __init__(self, decoder: Decoder, max_queue: int, metrics: Metrics) -> None:
        self._decoder = decoder
        self._metrics = metrics
        self._capacity = decoder.max_batch_size + max_queue
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="proxytune-decoder", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reserved = 0
        self._seconds = 1.0  # that an output takes, lately
        self._stopping = False
        self._ended = False
        self._live: dict[int, tuple[Generation, float | None]] = {}  # id -> time of its last token

    def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._stopping

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
            waiting = self._reserved - self._decoder.max_batch_size
            rounds = 1 + max(waiting, 0) / self._decoder.max_batch_size
            raise BusyError(max(1, min(60, round(rounds * self._seconds))))
        self._change(count)

    def release(self, count: int) -> None:
        """Give back room that was reserved and has not been used."""
        self._change(-count)

    def submit(self, requests: Sequence[tuple[Prompt, SamplingParams]], whole: bool) -> Generation:
        """Run requests for which there is room reserved; see :class:`Generation`.

        A request's outputs are as many as its ``n``, one behind another.
        """
        count = sum(params.n for _, params in requests)
        generation = Generation(self, count, whole)
        self._commands.put(lambda: self._submit(generation, requests))
        return generation

    def cancel(self, generation: Generation) -> None:
        """End what has not ended of a generation."""
        self._commands.put(lambda: self._cancel(generation))

    def drain(self, seconds: float) -> None:
        """Take no more requests, and end those that have not ended after so many seconds."""
        self._stopping = True
        assert self._loop is not None
        self._loop.call_later(seconds, self._commands.put, self._fail_all)

    def stop(self) -> None:
        """End the thread, after the step that it is in."""
        self._stopping = True
        self._commands.put(self._end)
        self._thread.join()

    def _change(self, count: int) -> None:
        self._reserved += count
        slots = self._decoder.max_batch_size
        self._metrics.occupied(min(self._reserved, slots), max(self._reserved - slots, 0))

    # The thread's own from here on.

    def _run(self) -> None:
        while not self._ended:
            self._obey()
            try:
                events = self._decoder.step() if self._decoder.unfinished else []
            except Exception as error:
                # The decoder is as new; the next step says which requests are lost.
                where = "".join(traceback.format_tb(error.__traceback__))
                _log.error("a step failed: %s\n%s", type(error).__name__, where)
                continue
            if events:
                self._hand_over(events)

    def _obey(self) -> None:
        """Do what is in the queue; wait for something where nothing runs."""
        try:
            while True:
                self._commands.get(block=not self._decoder.unfinished and not self._ended)()
        except queue.Empty:
            pass

    def _submit(
        self, generation: Generation, requests: Sequence[tuple[Prompt, SamplingParams]]
    ) -> None:
        try:
            for prompt, params in requests:
                first = self._decoder.submit(prompt, params)
                for request_id in range(first, first + params.n):
                    generation.ids[request_id] = len(generation.ids)
                    self._live[request_id] = generation, None
        except Exception as error:
            self._cancel(generation)
            self._call(self._failed, [generation], error)
            return
        self._call(generation.start)

    def _cancel(self, generation: Generation) -> None:
        for request_id in generation.ids:
            if request_id in self._live:
                self._decoder.cancel(request_id)

    def _fail_all(self) -> None:
        generations = list(dict.fromkeys(g for g, _ in self._live.values()))
        for generation in generations:
            self._cancel(generation)
        self._call(self._failed, generations, StoppingError())

    def _end(self) -> None:
        self._ended = True

    def _hand_over(self, events: Sequence[StreamEvent]) -> None:
        now = time.monotonic()
        taken = []
        for event in events:
            generation, before = self._live[event.request_id]
            if event.token_ids:
                count = len(event.token_ids)
                self._metrics.tokens(count, None if before is None else now - before)
                self._live[event.request_id] = generation, now
            if event.output is not None:
                del self._live[event.request_id]
            taken.append((generation, generation.ids[event.request_id], event))
        self._call(self._deliver, taken)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    # On the event loop again.

    def _deliver(self, events: Sequence[tuple[Generation, int, StreamEvent]]) -> None:
        ended = 0
        for generation, index, event in events:
            ended += generation.add(index, event)
            if event.output is not None:
                self._metrics.ended(event.output)
                took = event.output.metrics.total - event.output.metrics.queued
                self._seconds += 0.1 * (took - self._seconds)
        if ended:
            self._change(-ended)

    def _failed(self, generations: Sequence[Generation], error: Exception) -> None:
        self._change(-sum(generation.fail(error) for generation in generations))
