"""The decoder: takes prompts, keeps the slots busy, and gives tokens back as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from threading import Condition, Lock, get_ident
from typing import Any

import torch

from proxytune_kernels.decoder import arguments, memory
from proxytune_kernels.decoder.check import check_members
from proxytune_kernels.decoder.constraints import Constraints
from proxytune_kernels.decoder.grammar import Grammar, GrammarCompiler
from proxytune_kernels.decoder.graphs import CudaCapture, StepGraphs
from proxytune_kernels.decoder.loop import DecodingLoop
from proxytune_kernels.decoder.request import (
    Request,
    RequestOutput,
    Siblings,
    StopRules,
    StreamEvent,
)
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.decoder.sampler import SlotSampler
from proxytune_kernels.decoder.speculation import DraftController, Speculation, SpeculationStats
from proxytune_kernels.decoder.step import Stepper
from proxytune_kernels.ops import warm_up
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from proxytune_kernels.trio.packed import products
from proxytune_kernels.trio.remote import RemoteModel
from proxytune_kernels.trio.roles import PAIR, kind_of


class Decoder:
    """Decodes many requests at once, each with its own parameters, steered by a trio.

    A step is one forward of each role for all running requests, then one
    :func:`proxytune_kernels.sample`; with ``speculation`` a round of drafts, then one
    :func:`proxytune_kernels.verify`. Finished requests' slots are refilled at once, long prompts
    run chunk by chunk between the steps of the others, and while no running request is steered
    (alpha 0) the small models rest. It may be used from several threads: calls take turns, and each
    gets the tokens that it would get alone. After a fault (an interrupt, no memory) the requests
    that ran are gone, and the decoder is as new.

    Args:
        trio: the models; their values are not changed. Where forwards are compiled, weights of
            products of one input become views of one tensor, which ``save_pretrained`` takes.
        max_batch_size: requests that run at the same time. None takes what fits into the memory
            that is free, up to 256 on CUDA and 16 elsewhere.
        max_seq_len: tokens of prompt and output together, for each role; None is the shortest
            context of the roles, at most 4096. A slot's keys and values are reserved for it as the
            decoder is made, and may take nine tenths of what is free.
        roles: all of the trio's, or ``("base",)`` for the base alone, unsteered.
        compile: run forwards of few tokens through torch.compile, inside captured steps where there
            are any. True does, or raises; on a CPU it needs a C++ compiler, and some seconds per
            role at the first request, or before it in :meth:`warm_up`. False does not. None does on
            CUDA devices, where our attention runs and no weights are moved about; what can't be
            compiled runs as it is. :meth:`info` says which, and why.
        backend: of the operators; None is the fastest usable one, for each operator its own.
        speculation: draft with the expert or from the text; None decodes token by token.
        pair: how expert and anti run. ``"shared"``: one batch over the anti's weights, with the
            expert's LoRA adapter on its rows. ``"batched"``: both models' weights stacked, which
            copies them. ``"separate"``: a forward each. None is shared where the expert is the
            anti with an adapter (``load_trio(merge_adapter=False)``), else batched for models of
            up to 16 M parameters on a CPU, where it is faster, else separate.
        pack_weights: on a CPU, hold the weights of linear layers once more in the layout that its
            matrix products read fastest.
        prefill_chunk: prompt tokens of each role between two steps, at most.
        graphs: run steps as CUDA graphs; None does on a CUDA device, unless ``compile`` is set and
            attention is not ours.
        streams: CUDA streams on which the roles' forwards run side by side: 3, 2 (the base, and the
            pair) or 1.
        grammar_backend: what follows grammars: ``"llguidance"`` or ``"xgrammar"``.
        check: run a few tokens of each model first, and refuse one whose logits are not those of
            its own forward.

    Raises:
        ValueError: names the argument, what it got and what it wanted; keys and values that don't
            fit, with the bytes and the ``max_batch_size`` that fits.
        RuntimeError: a backend asked for by name that can't run here.

    Example:
        >>> from proxytune_kernels import load_trio
        >>> decoder = Decoder(load_trio("shipped"))
        >>> [output] = decoder.generate("2 + 2 =", SamplingParams(max_tokens=8, temperature=0))
        >>> len(output.token_ids) <= 8
        True
    """

    def __init__(
        self,
        trio: Trio,
        max_batch_size: int | None = 16,
        max_seq_len: int | None = None,
        *,
        roles: Sequence[str] | None = None,
        compile: bool | None = None,
        backend: str | None = None,
        speculation: Speculation | None = None,
        pair: str | None = None,
        pack_weights: bool = False,
        prefill_chunk: int = 512,
        graphs: bool | None = None,
        streams: int = 3,
        grammar_backend: str = "llguidance",
        check: bool = True,
    ) -> None:
        self.trio = trio
        self.roles = arguments.roles(trio, roles)
        if max_batch_size is not None:
            arguments.size("max_batch_size", max_batch_size)
        models = trio.members if len(self.roles) > 1 else {"base": trio.base}
        self.max_seq_len = arguments.max_seq_len(models, max_seq_len)
        remote = isinstance(models["base"], RemoteModel)
        speculation = arguments.speculation(speculation, models)
        self.speculation = speculation
        arguments.size("prefill_chunk", prefill_chunk)
        # Compiled at the first request if asked for; else by warm_up, or as it comes.
        self._cold, self._unasked = bool(compile), compile is None
        ahead = 0 if remote else run_ahead(models["base"].device)
        drafts = 0 if speculation is None else speculation.max_drafts
        # Steps that the host launches before it learns of an end write behind it.
        slack = drafts + ahead * (drafts + 1)
        layers = {role: memory.layers_of(model) for role, model in models.items()}
        known = {role: found for role, found in layers.items() if found is not None}
        copied = [] if pair != "batched" else [models[role] for role in models if role in PAIR]
        if pack_weights:
            copied += models.values()
        self.max_batch_size = memory.slots(
            models, known, max_batch_size, self.max_seq_len, slack, copied
        )
        self._runner = Runner(
            models,
            self.max_batch_size,
            self.max_seq_len,
            pair=pair,
            compile=compile,
            streams=arguments.streams(streams),
            pack_weights=pack_weights,
            slack=slack,
            exact=not ahead or speculation is None,
            drafts=speculation is not None and speculation.drafter == "expert",
            layers=known if len(known) == len(models) else None,
        )
        if check:
            check_members(models, self._runner)
        self._sampler = SlotSampler(
            self.max_batch_size,
            trio.vocab_size,
            backend,
            self._runner.device,
            speculation,
            trio.pairs,
        )
        self._graphs, self._no_graphs = self._make_graphs(graphs)
        self._controller = None
        if speculation is not None:
            self._controller = DraftController(speculation, captured=self._graphs is not None)
        self._stepper = Stepper(self._runner, self._sampler, speculation, self._graphs)
        self._loop = DecodingLoop(
            self._stepper,
            self.max_batch_size,
            self._controller,
            # A part of a prompt would cost a call, or go token by token behind a state.
            self.max_seq_len if remote or self._runner.recurrent else prefill_chunk,
            ahead,
        )
        self._grammars = GrammarCompiler(
            trio.tokenizer, trio.vocab_size, trio.eos_token_ids, grammar_backend
        )
        self._requests: dict[int, Request] = {}
        self._queues: dict[int, deque[StreamEvent]] = {}
        self._submitted: deque[StreamEvent] = deque()
        self._ids = count(1)
        self._id_lock = Lock()
        self._turns = Turns()
        self._broken = False

    def generate(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Decode prompts to their ends; outputs in the order of the prompts, n of each.

        Arguments and errors as in :meth:`stream`, except that a request whose logits leave no token
        to draw has its output too, with the finish_reason ``"error"``.
        """
        events = EventStream(self, self._make_requests(prompts, params), raises=False)
        outputs = [event.output for event in events if event.output is not None]
        return sorted(outputs, key=lambda output: (output.index, output.sample))

    def stream(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> EventStream:
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
            DecodeError: a request's logits left no token to draw; raised by the iterator, which
                goes on with the others when it is asked again.
        """
        return EventStream(self, self._make_requests(prompts, params), raises=True)

    def submit(self, prompt: Any, params: SamplingParams | None = None) -> int:
        """Queue a prompt, for engines with a loop of their own; its events come from :meth:`step`.

        Returns:
            The request's id, for :meth:`cancel`; its events have it too. Where ``params.n`` is
            above 1 the id of the first output; those of the others follow.

        Raises:
            ValueError, TypeError: a prompt or parameter that can never run.
        """
        requests = self._make_requests([prompt], params)
        with self._turn():
            self._add(requests, self._submitted)
        return requests[0].request_id

    def step(self) -> list[StreamEvent]:
        """Run one step of all requests; the events of those that were submitted.

        Where another thread runs a step, this waits for it. A request that fails ends with the
        finish_reason ``"error"``. After a fault the next step gives the events of what was lost,
        with ``"cancelled"``.
        """
        if not self._submitted and self.unfinished:
            self._advance(self._submitted)
        events = []
        while self._submitted:
            events.append(self._submitted.popleft())
        return events

    def compile_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar in the caller's thread, and keep it: its requests need not wait then.

        Raises:
            GrammarError: it can't be compiled; says where and why.
        """
        self._grammars.state(grammar)

    @property
    def unfinished(self) -> bool:
        """Whether a submitted request has events to come."""
        own = any(queue is self._submitted for queue in list(self._queues.values()))
        return bool(self._submitted) or own

    def cancel(self, request_id: int) -> None:
        """End a request; its last event follows in its stream. A finished one stays as it is."""
        with self._turn():
            request = self._requests.get(request_id)
            if request is not None:
                self._queues[request_id].append(request.cancel())
                self._remove(request)

    def warm_up(self, progress: bool = False) -> None:
        """Compile and capture now what most requests need, so that none waits for it.

        On a GPU the sampling kernels, by :func:`proxytune_kernels.warm_up`, with a bar if
        ``progress``. With ``compile=True`` the models' forwards, as the first request would do.
        Where steps are captured (see ``graphs``) this captures them for each power of two of slots
        and each number of drafts, with a progress bar on a terminal; without it each is captured
        when it comes. Meanwhile a thread of this process that waits for the device gets an error.
        """
        with self._turn():
            if self._stepper.graphs is None and not self._requests:
                self._cold |= self._unasked and self._runner.eager is None
                self._unasked = False
            self._compile_models()
            self._compile_sampling(progress)
            sizes = [0] if self._controller is None else self._controller.sizes
            self._stepper.warm_up(sizes)

    def _compile_sampling(self, progress: bool) -> None:
        dtypes, widths = [], []
        for role in self.roles:
            head = self.trio.models[role].get_output_embeddings().weight
            widths.append(head.shape[0])
            dtype = self.trio.models[role].dtype
            dtypes.append(torch.float32 if dtype == torch.float64 else dtype)
        looks_up = self.speculation is not None and self.speculation.drafter == "prompt_lookup"
        for operator, backend in self._sampler.backends.items():
            warm_up(
                self._runner.device,
                dtypes,
                self.trio.vocab_size,
                widths=widths,
                operators=(operator,),
                drafter=(torch.float32, self.trio.vocab_size) if looks_up else None,
                backend=backend,
                progress=progress,
            )

    def _compile_models(self) -> None:
        if self._cold:
            self._loop.forget_prompts()
            self._runner.warm_up()
            self._cold = False

    def info(self) -> dict[str, Any]:
        """How the decoder is set up, as plain values for printing or JSON."""
        return {
            "roles": list(self.roles),
            "max_batch_size": self.max_batch_size,
            "max_seq_len": self.max_seq_len,
            "compile": self._runner.compiled(),
            "backend": self._sampler.backends["sample"],
            "verify_backend": self._sampler.backends.get("verify"),
            "pair": self._runner.pair,
            "speculation": None if self.speculation is None else asdict(self.speculation),
            "graphs": self._graphs_info(),
            "attention": self._runner.attention(),
            "cache_bytes": self._runner.cache_bytes(),
            "packed_bytes": self._runner.packed_bytes,
            "products": {r: products(self.trio.members[r]) for r in self._runner.active},
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
        elif not self._runner.static:
            reason = "steps run through torch.compile"
        else:
            reason = self._runner.cannot_capture()
        if reason is None:
            capture = CudaCapture(self._runner.device)
            self._runner.capture()
            return StepGraphs(capture, self.max_batch_size), None
        if wanted:
            raise ValueError(f"graphs can't be True here: {reason}")
        return None, reason

    def _graphs_info(self) -> str:
        return f"none: {self._no_graphs}" if self._graphs is None else self._graphs.info()

    def _make_requests(
        self, prompts: Any, params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        listed = arguments.prompts(prompts)
        each = arguments.params_per_prompt(params, len(listed))
        pairs = enumerate(zip(listed, each, strict=True))
        return [request for i, (p, s) in pairs for request in self._make_request(i, p, s)]

    def _make_request(self, index: int, prompt: Any, params: SamplingParams) -> list[Request]:
        """The requests for a prompt, one for each of its n outputs."""
        try:
            token_ids = self.trio.tokenize(prompt, params.add_special_tokens)
            arguments.check_pair_alphas(self.trio, params)
            prompt_token_ids = {role: token_ids[kind_of(role)] for role in self._roles_of(params)}
            arguments.fits(prompt_token_ids, params.max_tokens, self.max_seq_len)
            arguments.served(self.trio.base, params)
            if params.prompt_logprobs >= 0:
                steered = params.alpha or any(params.pair_alphas)
                arguments.scored_prompt(prompt_token_ids, self.roles if steered else ())
            rules = StopRules.of(
                params, self.trio.eos_token_ids, self.trio.vocab_size, self.trio.tokenizer
            )
            constraints = Constraints.of(
                params, prompt_token_ids["base"], rules.token_ids, self.trio.vocab_size,
                self.trio.tokenizer,
            )  # fmt: skip
            if constraints.room and self._sampler.no_edits:
                raise ValueError(f"penalties and logit_bias can't be: {self._sampler.no_edits}")
            grammars = [
                None if params.grammar is None else self._grammars.state(params.grammar)
                for _ in range(params.n)
            ]
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompts[{index}]: {error}") from error
        controller = self._controller
        with self._id_lock:
            ids = [next(self._ids) for _ in range(params.n)]
        # What recurrent layers carry has no copy of the prompt's end once a request runs.
        shares = params.n > 1 and not self._runner.recurrent
        siblings = Siblings(params.n) if shares else None
        return [
            Request(
                request_id=request_id,
                index=index,
                prompt=prompt,
                prompt_token_ids=prompt_token_ids,
                params=seeded,
                rules=rules,
                constraints=constraints,
                tokenizer=self.trio.tokenizer,
                speculation=None if controller is None else SpeculationStats(),
                acceptance=None if controller is None else controller.new_request(),
                sample=sample,
                siblings=siblings,
                grammar=grammars[sample],
            )
            for sample, (request_id, seeded) in enumerate(zip(ids, params.seeded(), strict=True))
        ]

    def _roles_of(self, params: SamplingParams) -> list[str]:
        """The roles that a request runs in, if it is steered: of further pairs those that steer."""
        asked = zip(self.trio.pairs, params.pair_alphas, strict=False)
        wanted = {*self.roles, *(role for pair, alpha in asked if alpha for role in pair)}
        return [role for role in self._runner.active if role in wanted]

    def _add(self, requests: Sequence[Request], queue: deque[StreamEvent]) -> None:
        """Put requests into the loop; their events go into ``queue``."""
        self._compile_models()
        for request in requests:
            self._requests[request.request_id] = request
            self._queues[request.request_id] = queue
            self._loop.add(request)

    def _advance(self, queue: deque[StreamEvent]) -> None:
        """Run the loop once, unless another thread's step fills the queue meanwhile."""
        if not self._turns.take(lambda: bool(queue)):
            return
        with self._turn(taken=True):
            for request, event in self._loop.step():
                self._queues[request.request_id].append(event)
                if event.output is not None:
                    self._forget(request)

    @contextmanager
    def _turn(self, taken: bool = False) -> Iterator[None]:
        """Have the loop for oneself; whatever is raised meanwhile, it is whole afterwards."""
        if not taken:
            self._turns.take()
        try:
            self._mend()
            yield
        except BaseException:
            # Interrupted between two roles' forwards, the slots no longer hold the same tokens.
            self._broken = True
            self._mend()
            raise
        finally:
            self._turns.give()

    def _mend(self) -> None:
        """After a fault: end all requests, and empty the slots."""
        if not self._broken:
            return
        for request_id, request in list(self._requests.items()):
            if request.finish_reason is None and request_id in self._queues:
                self._queues[request_id].append(request.cancel())
        self._requests.clear()
        self._queues.clear()
        self._loop.reset()
        self._broken = False  # an interrupt of this very code leaves it to the next turn

    def _remove(self, request: Request) -> None:
        """Take a request out, wherever it is; nothing if it is gone already."""
        if request.request_id in self._requests:
            self._forget(request)
            self._loop.remove(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        del self._queues[request.request_id]


class EventStream:
    """The events of one call's requests, as an iterator: see :meth:`Decoder.stream`.

    Args:
        decoder: runs them, from the first event that is asked for.
        requests: in the order of the prompts.
        raises: raise a :class:`DecodeError` where a request fails.
    """

    def __init__(self, decoder: Decoder, requests: Sequence[Request], raises: bool) -> None:
        self._decoder = decoder
        self._requests = requests
        self._raises = raises
        self._queue: deque[StreamEvent] = deque()
        self._left: int | None = None  # requests that have not ended; None before they run

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> StreamEvent:
        try:
            event = self._next()
        except BaseException:
            self.close()
            raise
        if event is None:
            raise StopIteration
        if event.finish_reason == "error" and self._raises:
            raise DecodeError(event)
        return event

    def _next(self) -> StreamEvent | None:
        if self._left is None:
            self._left = len(self._requests)
            with self._decoder._turn():
                self._decoder._add(self._requests, self._queue)
        while self._left and not self._queue:
            if any(r.request_id in self._decoder._requests for r in self._requests):
                self._decoder._advance(self._queue)
            elif not self._queue:  # looked at again: a request's event comes before it is gone
                self._left = 0  # lost to faults of another thread's step
        if not self._left:
            return None
        event = self._queue.popleft()
        self._left -= event.output is not None
        return event

    def close(self) -> None:
        """Drop the requests that have not ended."""
        if self._left:
            self._left = 0
            with self._decoder._turn():
                for request in self._requests:
                    self._decoder._remove(request)

    def __del__(self) -> None:
        if getattr(self, "_left", None) and self._decoder._turns.free:
            self.close()


class DecodeError(RuntimeError):
    """A request cannot go on.

    Args:
        event: its last event, with its output.
    """

    def __init__(self, event: StreamEvent) -> None:
        assert event.output is not None
        super().__init__(event.output.error)
        self.event = event


class Turns:
    """Lets one thread at a time run the loop; others wait for their turn, or for their events."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._owner: int | None = None

    @property
    def free(self) -> bool:
        """Whether nobody has it."""
        return self._owner is None

    def take(self, enough: Callable[[], bool] = lambda: False) -> bool:
        """Wait for one's turn and take it; False once ``enough`` says that it isn't needed.

        A thread that seems to have it already was interrupted while it gave it back.
        """
        me = get_ident()
        with self._changed:
            while not enough():
                if self._owner in (None, me):
                    self._owner = me
                    return True
                self._changed.wait()
        return False

    def give(self) -> None:
        """Give it back, and wake who waits."""
        with self._changed:
            self._owner = None
            self._changed.notify_all()


def run_ahead(device: torch.device) -> int:
    """Steps that the host launches before it reads the first; a CPU runs none beside it."""
    return int(device.type == "cuda")
