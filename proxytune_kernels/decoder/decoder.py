"""The decoder: takes prompts, keeps the slots busy, and gives tokens back as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from proxytune_kernels.decoder import arguments
from proxytune_kernels.decoder.graphs import CudaCapture, StepGraphs
from proxytune_kernels.decoder.loop import DecodeError, DecodingLoop
from proxytune_kernels.decoder.request import Request, RequestOutput, StopRules, StreamEvent
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.decoder.sampler import SlotSampler
from proxytune_kernels.decoder.speculation import DraftController, Speculation, SpeculationStats
from proxytune_kernels.decoder.step import Stepper
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio


class Decoder:
    """Decodes many requests at once, each with its own parameters, steered by a trio.

    A step is one forward of each role for all running requests, then one
    :func:`proxytune_kernels.sample`; with ``speculation`` a round of drafts, then one
    :func:`proxytune_kernels.verify`. Finished requests' slots are refilled at once, long prompts
    run chunk by chunk between the steps of the others, and while no running request is steered
    (alpha 0) the small models rest. Not for use from several threads at a time.

    Args:
        trio: the models; they are not changed.
        max_batch_size: requests that run at the same time.
        max_seq_len: tokens of prompt and output together, for each role; None is the shortest
            context of the roles, at most 4096. A slot's keys and values are reserved for it.
        roles: all of the trio's, or ``("base",)`` for the base alone, unsteered.
        compile: run decoding steps through torch.compile; needs a C++ compiler, and some seconds
            per role at the first request, or before it in :meth:`warm_up`.
        backend: of the sampling op; None is the fastest usable one.
        speculation: draft with the expert or from the text; None decodes token by token.
        pair: how expert and anti run. ``"shared"``: one batch over the anti's weights, with the
            expert's LoRA adapter on its rows. ``"batched"``: both models' weights stacked, which
            copies them. ``"separate"``: a forward each. None is shared where the expert is the
            anti with an adapter (``load_trio(merge_adapter=False)``), else batched for models of
            up to 16 M parameters on a CPU, where it is faster, else separate.
        pack_weights: on a CPU, hold the weights of linear layers once more in the layout that its
            matrix products read fastest.
        prefill_chunk: prompt tokens of each role between two steps, at most.
        graphs: run steps as CUDA graphs; None does on a CUDA device, unless ``compile`` is set.

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
        speculation: Speculation | None = None,
        pair: str | None = None,
        pack_weights: bool = False,
        prefill_chunk: int = 512,
        graphs: bool | None = None,
    ) -> None:
        self.trio = trio
        self.roles = arguments.roles(trio, roles)
        self.max_batch_size = arguments.size("max_batch_size", max_batch_size)
        models = {role: trio.models[role] for role in self.roles}
        self.max_seq_len = arguments.max_seq_len(models, max_seq_len)
        self.speculation = arguments.speculation(speculation, self.roles)
        arguments.size("prefill_chunk", prefill_chunk)
        self._compile = compile
        self._cold = compile
        ahead = run_ahead(models["base"].device)
        drafts = 0 if speculation is None else speculation.max_drafts
        self._runner = Runner(
            models,
            self.max_batch_size,
            self.max_seq_len,
            pair=pair,
            compile=compile,
            pack_weights=pack_weights,
            # Steps that the host launches before it learns of an end write behind it.
            slack=drafts + ahead * (drafts + 1),
            exact=not ahead or speculation is None,
            drafts=speculation is not None and speculation.drafter == "expert",
        )
        self._sampler = SlotSampler(
            self.max_batch_size, trio.vocab_size, backend, self._runner.device
        )
        self._graphs, self._no_graphs = self._make_graphs(graphs)
        self._controller = None if speculation is None else DraftController(speculation)
        stepper = Stepper(self._runner, self._sampler, speculation, self._graphs)
        self._loop = DecodingLoop(
            stepper, self.max_batch_size, self._controller, prefill_chunk, ahead
        )
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
            "pair": self._runner.pair,
            "speculation": None if self.speculation is None else asdict(self.speculation),
            "graphs": self._graphs_info(),
            "attention": {
                role: "flash-attn" if reason is None else f"sdpa: {reason}"
                for role, reason in self._runner.flash_missing.items()
            },
            "cache_bytes": self._runner.cache_bytes(),
            "packed_bytes": self._runner.packed_bytes,
        }

    def statistics(self) -> dict[str, int]:
        """What was done since the decoder was made: counts of steps, rounds, slots and drafts.

        The keys are the fields of :class:`proxytune_kernels.decoder.loop.Statistics`.
        """
        return asdict(self._loop.statistics)

    def _make_graphs(self, wanted: bool | None) -> tuple[StepGraphs | None, str | None]:
        """The graphs, or why there are none."""
        reason = None
        if wanted is False:
            reason = "not asked for"
        elif self._compile:
            reason = "steps run through torch.compile"
        else:
            reason = self._runner.cannot_capture()
        if reason is None:
            capture = CudaCapture(self._runner.device)
            return StepGraphs(capture, self.max_batch_size, self._runner.capacity), None
        if wanted:
            raise ValueError(f"graphs can't be True here: {reason}")
        return None, reason

    def _graphs_info(self) -> str:
        if self._graphs is not None and self._graphs.failed is None:
            return f"{self._graphs.count} captured"
        return f"none: {self._no_graphs if self._graphs is None else self._graphs.failed}"

    def _make_request(self, index: int, prompt: Any, params: SamplingParams) -> Request:
        try:
            token_ids = self.trio.tokenize(prompt)
            prompt_token_ids = {role: token_ids[role] for role in self.roles}
            arguments.fits(prompt_token_ids, params.max_tokens, self.max_seq_len)
            rules = StopRules.of(
                params, self.trio.eos_token_ids, self.trio.vocab_size, self.trio.tokenizer
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompts[{index}]: {error}") from error
        self._next_request_id += 1
        controller = self._controller
        return Request(
            request_id=self._next_request_id,
            index=index,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            params=params.with_seed(),
            rules=rules,
            tokenizer=self.trio.tokenizer,
            speculation=None if controller is None else SpeculationStats(),
            acceptance=None if controller is None else controller.new_request(),
        )

    def _drain(self, requests: list[Request]) -> Iterator[StreamEvent]:
        self.warm_up()
        queue: deque[StreamEvent | DecodeError] = deque()
        for request in requests:
            self._requests[request.request_id] = request
            self._queues[request.request_id] = queue
            self._loop.add(request)
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
        """Run the loop once, and queue what comes of it."""
        try:
            for request, event in self._loop.step():
                queue = self._queues[request.request_id]
                queue.append(event)
                if isinstance(event, DecodeError) or event.output is not None:
                    self._forget(request)
        except BaseException:
            # Interrupted between two roles' forwards, the slots no longer hold the same tokens.
            for request_id in list(self._requests):
                self.cancel(request_id)
            raise

    def _remove(self, request: Request) -> None:
        """Take a request out, wherever it is; nothing if it is gone already."""
        if request.request_id in self._requests:
            self._forget(request)
            self._loop.remove(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        del self._queues[request.request_id]


def run_ahead(device: torch.device) -> int:
    """Steps that the host launches before it reads the first; a CPU runs none beside it."""
    return int(device.type == "cuda")
