"""The decoder: takes prompts, keeps the slots busy, and gives tokens back as they come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from proxytune_kernels.decoder import arguments
from proxytune_kernels.decoder.request import Request, RequestOutput, StopRules, StreamEvent
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.decoder.sampler import SlotSampler
from proxytune_kernels.decoder.scheduler import Scheduler
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio


class DecodeError(RuntimeError):
    """A request cannot go on."""


class Decoder:
    """Decodes many requests at once, each with its own parameters, steered by a trio.

    A step is one forward of each role for all running requests, then one
    :func:`proxytune_kernels.sample`. Finished requests' slots are refilled at once. Not for use
    from several threads at a time.

    Args:
        trio: the models; they are not changed.
        max_batch_size: requests that run at the same time.
        max_seq_len: tokens of prompt and output together, for each role; None is the shortest
            context of the roles, at most 4096. A slot's keys and values are reserved for it.
        roles: all of the trio's, or ``("base",)`` for the base alone, unsteered.
        compile: run decoding steps through torch.compile; needs a C++ compiler, and some seconds
            per role at the first request, or before it in :meth:`warm_up`.
        backend: of the sampling op; None is the fastest usable one.

    Raises:
        ValueError: names the argument, what it got and what it wanted.
        RuntimeError: a backend asked for by name that can't run here.

    Example:
        >>> decoder = Decoder(load_trio("shipped"))
        >>> [output] = decoder.generate("2 + 2 =", SamplingParams(max_tokens=8, temperature=0))
        >>> len(output.token_ids) <= 8
        True
    """

    def __init__(
        self,
        trio: Trio,
        max_batch_size: int = 16,
        max_seq_len: int | None = None,
        *,
        roles: Sequence[str] | None = None,
        compile: bool = False,
        backend: str | None = None,
    ) -> None:
        self.trio = trio
        self.roles = arguments.roles(trio, roles)
        self.max_batch_size = arguments.size("max_batch_size", max_batch_size)
        models = {role: trio.models[role] for role in self.roles}
        self.max_seq_len = arguments.max_seq_len(models, max_seq_len)
        self._compile = compile
        self._cold = compile
        self._runner = Runner(models, self.max_batch_size, self.max_seq_len, compile=compile)
        self._sampler = SlotSampler(
            self.max_batch_size, trio.vocab_size, backend, self._runner.device
        )
        self._scheduler = Scheduler(self.max_batch_size)
        self._requests: dict[int, Request] = {}
        self._queues: dict[int, deque[StreamEvent | DecodeError]] = {}
        self._next_request_id = 0

    def generate(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Decode prompts to their ends; outputs in the order of the prompts.

        Arguments and errors as in :meth:`stream`.
        """
        events = self.stream(prompts, params)
        outputs = [event.output for event in events if event.output is not None]
        return sorted(outputs, key=lambda output: output.index)

    def stream(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamEvent]:
        """Decode prompts, giving each token as it comes, from any of the requests.

        Nothing runs before the first event is asked for. Closing the iterator before its end drops
        what is left. Two iterators of one decoder may be read in turn; they share its slots.

        Args:
            prompts: one string, or a list of prompts; a prompt is a string, a list of token ids,
                chat messages, or a mapping from role to one of these.
            params: one for all, or one per prompt; None is ``SamplingParams()``. A request without
                a seed draws one.

        Returns:
            Events; a request's last one has its :class:`RequestOutput`.

        Raises:
            ValueError, TypeError: a prompt or parameter that can never run; raised by the call.
            DecodeError: a row's logits left no token to draw.
        """
        listed = arguments.prompts(prompts)
        each = arguments.params_per_prompt(params, len(listed))
        pairs = enumerate(zip(listed, each, strict=True))
        return self._drain([self._make_request(i, p, s) for i, (p, s) in pairs])

    def cancel(self, request_id: int) -> None:
        """End a request; its last event follows in its stream. A finished one stays as it is."""
        request = self._requests.get(request_id)
        if request is not None:
            self._queues[request_id].append(request.cancel())
            self._remove(request)

    def warm_up(self) -> None:
        """With ``compile=True``: compile now, so that no request waits for it; else nothing."""
        if self._cold:
            self._runner.warm_up()
            self._cold = False

    def info(self) -> dict[str, Any]:
        """How the decoder is set up, as plain values for printing or JSON."""
        return {
            "roles": list(self.roles),
            "max_batch_size": self.max_batch_size,
            "max_seq_len": self.max_seq_len,
            "compile": self._compile,
            "backend": self._sampler.backend,
            "cache_bytes": self._runner.cache_bytes(),
        }

    def _make_request(self, index: int, prompt: Any, params: SamplingParams) -> Request:
        try:
            token_ids = self.trio.tokenize(prompt)
            prompt_token_ids = {role: token_ids[role] for role in self.roles}
            arguments.fits(prompt_token_ids, params.max_tokens, self.max_seq_len)
            rules = StopRules.of(params, self.trio.eos_token_ids, self.trio.vocab_size)
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompts[{index}]: {error}") from error
        self._next_request_id += 1
        return Request(
            request_id=self._next_request_id,
            index=index,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            params=params.with_seed(),
            rules=rules,
            tokenizer=self.trio.tokenizer,
        )

    def _drain(self, requests: list[Request]) -> Iterator[StreamEvent]:
        self.warm_up()
        queue: deque[StreamEvent | DecodeError] = deque()
        for request in requests:
            self._requests[request.request_id] = request
            self._queues[request.request_id] = queue
            self._scheduler.add(request)
        left = len(requests)
        try:
            while left:
                while queue:
                    event = queue.popleft()
                    if isinstance(event, DecodeError):
                        raise event
                    left -= event.output is not None
                    yield event
                if left:
                    self._step()
        finally:
            for request in requests:
                self._remove(request)

    def _step(self) -> None:
        """Start requests in free slots, or draw one more token for each that runs."""
        try:
            started = self._scheduler.admit()
            if started:
                # Their first tokens are handed out before the next step is taken.
                self._start(started)
                return
            for source, target in self._scheduler.compact():
                self._runner.move(source, target)
                self._sampler.move(source, target)
            running = self._scheduler.running
            if running:
                logits = self._runner.decode(self._sampler.token_ids[: len(running)])
                self._take(running, self._sampler.draw(running, logits))
        except BaseException:
            # Interrupted between two roles' forwards, the slots no longer hold the same tokens.
            for request_id in list(self._requests):
                self.cancel(request_id)
            raise

    def _start(self, requests: list[Request]) -> None:
        """Fill the slots of new requests, those of equal lengths together, and draw their first."""

        def lengths(request: Request) -> list[int]:
            return [len(token_ids) for token_ids in request.prompt_token_ids.values()]

        now = time.monotonic()
        for _, group in groupby(sorted(requests, key=lengths), lengths):
            alike = list(group)
            for request in alike:
                request.started = now
                self._sampler.start(request)
            slots = [request.slot for request in alike if request.slot is not None]
            prompts = {role: [r.prompt_token_ids[role] for r in alike] for role in self.roles}
            logits = self._runner.prefill(slots, prompts)
            self._take(alike, self._sampler.draw(alike, logits))

    def _take(self, requests: list[Request], drawn: list[tuple[int, float, float, int]]) -> None:
        """Hand each request its token; those that end leave their slots."""
        for request, (token_id, logprob, raw_logprob, status) in zip(requests, drawn, strict=True):
            request.status |= status
            queue = self._queues[request.request_id]
            if token_id < 0:
                error = DecodeError(
                    f"prompts[{request.index}]: no token can be drawn at position "
                    f"{len(request.token_ids)}: its combined logits are all NaN or masked"
                )
                queue.append(error)
                self._remove(request)
                continue
            queue.append(request.append(token_id, logprob, raw_logprob))
            if request.finish_reason is not None:
                self._remove(request)

    def _remove(self, request: Request) -> None:
        """Forget a request, wherever it is; nothing if it is gone already."""
        if self._requests.pop(request.request_id, None) is None:
            return
        del self._queues[request.request_id]
        slot = self._scheduler.remove(request)
        if slot is not None:
            self._runner.release(slot)
