"""The decoding loop: prompts into slots chunk by chunk, steps of all that run, results taken.

On a GPU the host runs ahead: it launches a step before it has read the one before, and learns one
step late which requests have ended. Their last step is thrown away.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.decoder.attention import MAX_NEW
from proxytune_kernels.decoder.constraints import Needs
from proxytune_kernels.decoder.request import KeptPrompt, Request, StreamEvent
from proxytune_kernels.decoder.sampler import StepResult
from proxytune_kernels.decoder.speculation import DraftController
from proxytune_kernels.decoder.step import Stepper

_SCORED = 128
"""Tokens at once of a prompt whose logprobs are asked for: all their logits are held."""


@dataclass
class Statistics:
    """What a decoder has done since it was made; counts."""

    plain_steps: int = 0
    speculative_rounds: int = 0
    prefill_forwards: int = 0
    reused_tokens: int = 0
    """Of the base's prompts, those that a slot still held: they were not run again."""
    base_forwards: int = 0
    """Of steps and rounds; those of prompts are not among them."""
    slot_steps: int = 0
    """Slots there are, summed over steps and rounds."""
    useful_slot_steps: int = 0
    """Those in which a request got at least one token that counted."""
    emitted: int = 0
    """Tokens from steps and rounds."""
    drafted: int = 0
    accepted: int = 0


class Scheduler:
    """Which request has which slot: first come, first served, over a fixed number of slots.

    Slots of requests that take steps are always the first ones, so a step has no gaps.

    A free slot may keep the prompt of the request that left it, until another needs the slot: a
    request that goes on from such a prompt gets its slot.
    """

    def __init__(self, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self.waiting: deque[Request] = deque()
        self.kept: dict[int, KeptPrompt] = {}
        """What free slots keep; what was left first comes first."""
        self._slots: list[Request | None] = []

    @property
    def running(self) -> list[Request]:
        """The requests with a slot, by slot; complete after :meth:`compact`."""
        return [request for request in self._slots if request is not None]

    @property
    def unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting) or any(self._slots)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Give free slots to waiting requests; returns those."""
        admitted = []
        self._slots += [None] * (self.max_batch_size - len(self._slots))
        free = [slot for slot, request in enumerate(self._slots) if request is None]
        while self.waiting and free:
            request = self.waiting.popleft()
            slot, request.reused = self._choose(request, free)
            request.slot = slot
            self._slots[slot] = request
            self.kept.pop(slot, None)
            free.remove(slot)
            admitted.append(request)
        return admitted

    def _choose(self, request: Request, free: Sequence[int]) -> tuple[int, int]:
        """A free slot, and how many tokens of the request's prompts it holds already."""
        if not request.keeps_prompt:
            return free[0], 0
        kept = {slot: held for slot, held in self.kept.items() if slot in free}
        shared = {slot: request.shared(held) for slot, held in kept.items()}
        best = max(shared, key=shared.__getitem__, default=free[0])
        empty = [slot for slot in free if slot not in kept]
        # One that goes on runs by itself: less than half of its prompt is not worth that. And a
        # text that only begins like another does not take its place while there are others.
        goes_on = shared and 2 * shared[best] >= len(request.prompt_token_ids["base"])
        if goes_on and (not empty or 2 * shared[best] >= len(kept[best].token_ids)):
            return best, shared[best]
        return next(iter(empty or kept)), 0

    def remove(self, request: Request) -> int | None:
        """Take a request out; returns the slot it had, None if it was waiting."""
        slot, request.slot = request.slot, None
        if slot is None:
            self.waiting.remove(request)
        else:
            self._slots[slot] = None
        return slot

    def reset(self) -> None:
        """Take all requests out."""
        for request in self.running:
            request.slot = None
        self._slots.clear()
        self.waiting.clear()
        self.kept.clear()

    def compact(self) -> list[tuple[int, int]]:
        """Move the last requests into free slots below them; returns the moves, (from, to).

        One that ends with its first token takes no step: it stays beside what others have kept.
        """
        moves = []
        last = [r for r in self.running if not (r.keeps_prompt and r.params.max_tokens == 1)]
        free = [slot for slot, request in enumerate(self._slots) if request is None]
        for target in free:
            if not last or (source := last[-1].slot) is None or source < target:
                break
            request = last.pop()
            moves.append((source, target))
            request.slot = target
            self._slots[target], self._slots[source] = request, None
            self.kept.pop(target, None)
        return moves


@dataclass
class _Pending:
    """A launched step on its way to the host."""

    requests: Sequence[tuple[int, Request]]
    """(row, request) of the rows that count."""
    result: InitVar[StepResult]
    drafts: int
    """Of each row; -1 for the first tokens after prompts."""
    launched: float | torch.cuda.Event
    """When, by :func:`_moment`."""
    cold: bool = False
    """Whether its time tells nothing of the next: see :attr:`Stepper.cold`."""

    def __post_init__(self, result: StepResult) -> None:
        # The next step writes over a graph's tensors: they are copied before it is launched.
        self._host = [
            None if t is None else t.to("cpu", non_blocking=True, copy=True) for t in result
        ]
        self._done = _moment(result.token_ids.device)

    def lists(self) -> list[list[Any]]:
        """Wait for the step; its columns, row by row."""
        if not isinstance(self._done, float):
            self._done.synchronize()
        return [[] if t is None else t.tolist() for t in self._host]

    def seconds(self) -> float:
        """What the step took, once it has been waited for."""
        if isinstance(self._done, float):
            assert isinstance(self.launched, float)
            return self._done - self.launched
        # Between two moments of its stream: prompts before it, and a busy host, don't count.
        milliseconds: float = self.launched.elapsed_time(self._done)  # type: ignore[union-attr]
        return milliseconds / 1000


def _first_of(request: Request, waiting: Sequence[Request]) -> Request:
    return next(r for r in waiting if r.siblings is request.siblings)


def _keep_logits(request: Request, logits: dict[str, Tensor]) -> None:
    """An output starts: its prompt's logits [V] and scores are kept for those that do not yet."""
    siblings = request.siblings
    if siblings is None:
        return
    siblings.waiting -= 1
    if not siblings.waiting:
        siblings.prompt_logits, siblings.prompt_scores = {}, []
    elif not siblings.prompt_logits:
        siblings.prompt_logits = {role: x[None].clone() for role, x in logits.items()}
        siblings.prompt_scores = list(request.prompt_scores)


def _moment(device: torch.device) -> float | torch.cuda.Event:
    """Now; on a GPU when what is launched by now will be done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    # Of this device, which need not be the current one.
    event.record(torch.cuda.current_stream(device))
    return event


class DecodingLoop:
    """Moves requests from the queue through the slots to their ends.

    Args:
        controller: chooses how many drafts a round has; None never drafts.
        prefill_chunk: prompt tokens of each role between two steps, at most.
        run_ahead: steps launched before the results of the first are read.
    """

    def __init__(
        self,
        stepper: Stepper,
        max_batch_size: int,
        controller: DraftController | None,
        prefill_chunk: int,
        run_ahead: int,
    ) -> None:
        self.statistics = Statistics()
        self._stepper = stepper
        self._runner = stepper.runner
        self._scheduler = Scheduler(max_batch_size)
        self._controller = controller
        self._prefill_chunk = prefill_chunk
        self._run_ahead = run_ahead
        self._pending: deque[_Pending] = deque()
        self._started = False

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        self._scheduler.add(request)

    @property
    def unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return self._scheduler.unfinished

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is; its prompt may stay in its slot."""
        slot = self._scheduler.remove(request)
        if slot is None:
            return
        keeps = request.ready and request.keeps_prompt and not self._runner.recurrent
        # A captured step runs free slots, too, and writes behind what they keep.
        most = self._runner.max_seq_len - 1
        prompt = tuple(request.prompt_token_ids["base"][:most]) if keeps else ()
        self._runner.release(slot, len(prompt))
        if keeps:
            self._scheduler.kept[slot] = KeptPrompt(request.roles, prompt)

    def forget_prompts(self) -> None:
        """Empty all free slots."""
        while self._scheduler.kept:
            self._runner.release(self._scheduler.kept.popitem()[0])

    def reset(self) -> None:
        """Forget all requests and empty all slots, whatever state a fault left them in."""
        self._scheduler.reset()
        self._pending.clear()
        self._started = False
        self._runner.reset()

    def step(self) -> Iterator[tuple[Request, StreamEvent]]:
        """Run a chunk of a prompt, if one waits, and a step; give what came of them.

        A request that ended or failed has left its slot when its last event is given.
        """
        if any(request.grammar is not None for request in self._scheduler.running):
            # What a grammar allows next depends on what was drawn.
            while self._pending:
                yield from self._take(self._pending.popleft())
        for request in self._scheduler.admit():
            request.started = time.monotonic()
            self._empty(request.slot, request.reused)
            if request.reused:
                request.prefilled = dict.fromkeys(request.roles, request.reused)
                self.statistics.reused_tokens += request.reused
        for source, target in self._scheduler.compact():
            self._empty(target)
            self._stepper.move(source, target)
        # After a chunk comes a step: running requests wait for one chunk at most.
        self._started = not self._started and self._prefill()
        # Prompts, too, are on their way while the next step is launched.
        left = self._run_ahead if self._started or self._launch() else 0
        while len(self._pending) > left:
            yield from self._take(self._pending.popleft())

    def _empty(self, slot: int | None, keep: int = 0) -> None:
        """Empty a slot but for some tokens, if it holds a prompt that was kept."""
        assert slot is not None
        if self._runner.lengths("base")[slot]:
            self._runner.release(slot, keep)

    def _prefill(self) -> bool:
        """Run one chunk of prompts, of the longest waiting; whether any request has started."""
        waiting = [r for r in self._scheduler.running if not r.ready]
        if not waiting:
            return False
        waiting.sort(key=lambda request: request.request_id)
        if self._start_siblings(waiting):
            return True
        # The first of several outputs runs their prompt, and the others wait for it.
        waiting = [r for r in waiting if r.siblings is None or r is _first_of(r, waiting)]
        head = waiting[0]
        last = head.scored
        if head.reused and head.left == last <= min(MAX_NEW, self._prefill_chunk):
            return self._go_on(head, waiting)
        if head.prefilled or head.longest_prompt > self._prefill_chunk or last > _SCORED:
            return self._prefill_part(head)
        together = [
            r for r in waiting if r.roles == head.roles and not r.prefilled and r.scored == last
        ]
        batch: list[Request] = []
        width = 0
        for request in together:
            width = max(width, request.longest_prompt)
            # A batch runs as wide as its longest prompt.
            if batch and (len(batch) + 1) * width > self._prefill_chunk:
                break
            # Of each row the logits at the ends of all.
            if last > 1 and (len(batch) + 1) ** 2 * last > 8 * _SCORED:
                break
            batch.append(request)
        slots = [request.slot for request in batch if request.slot is not None]
        prompts = {role: [r.prompt_token_ids[role] for r in batch] for role in head.roles}
        self.statistics.prefill_forwards += 1
        logits = self._runner.prefill(slots, prompts, last)
        if last > 1:
            logits = self._score(batch, logits)
        self._start(batch, logits)
        return True

    def _go_on(self, head: Request, waiting: Sequence[Request]) -> bool:
        """Run what is scored of prompts whose rest is in their slots: of neighbours at once."""
        last, first = head.scored, head.slot
        assert first is not None
        alike = {
            r.slot: r
            for r in waiting
            if r.reused and r.roles == head.roles and r.left == r.scored == last
        }
        batch = [head]
        # All their logits are held.
        most = min(8 * _SCORED, self._prefill_chunk)
        while first + len(batch) in alike and (len(batch) + 1) * last <= most:
            batch.append(alike[first + len(batch)])
        parts = {role: [r.prompt_token_ids[role][-last:] for r in batch] for role in head.roles}
        self.statistics.prefill_forwards += 1
        logits = self._runner.extend(range(first, first + len(batch)), parts, every=True)
        self._start(batch, self._score(batch, logits))
        return True

    def _score(self, batch: Sequence[Request], logits: dict[str, Tensor]) -> dict[str, Tensor]:
        """Score the last tokens of prompts, from logits [B, q, V] after them; [B, V] at the end."""
        count = logits["base"].shape[1]
        starts = [len(request.prompt_token_ids["base"]) - count for request in batch]
        self._stepper.score_prompts(batch, logits, starts)
        return {role: x[:, -1] for role, x in logits.items()}

    def _start_siblings(self, waiting: Sequence[Request]) -> bool:
        """Start requests whose prompt is in the slot of another output of it; whether any is."""
        for request in self._scheduler.running:
            others = [r for r in waiting if r.siblings is request.siblings is not None]
            if not request.ready or not others:
                continue
            assert request.siblings is not None and request.slot is not None
            lengths = {role: len(request.prompt_token_ids[role]) for role in request.roles}
            for other in others:
                assert other.slot is not None
                self._runner.copy(request.slot, other.slot, lengths)
                other.prompt_scores = list(request.siblings.prompt_scores)
            logits = request.siblings.prompt_logits
            self._start(others, {role: x.expand(len(others), -1) for role, x in logits.items()})
            return True
        return False

    def _prefill_part(self, request: Request) -> bool:
        assert request.slot is not None
        most = self._prefill_chunk
        done = request.prefilled.get("base", 0)
        before = len(request.prompt_token_ids["base"]) - request.scored - done
        scores = request.scores_prompt and before <= 0
        if request.scores_prompt:
            most = min(most, _SCORED if scores else before)
        parts = request.next_part(most)
        slot, alone = request.slot, {role: [part] for role, part in parts.items()}
        logits = self._runner.extend(range(slot, slot + 1), alone, every=scores)
        if scores:
            self._stepper.score_prompts([request], logits, [done])
            logits = {role: x[:, -1] for role, x in logits.items()}
        request.prompt_logits |= logits
        for role, part in parts.items():
            request.prefilled[role] = request.prefilled.get(role, 0) + len(part)
        self.statistics.prefill_forwards += 1
        if request.next_part(1):
            return False
        self._start([request], request.prompt_logits)
        return True

    def _start(self, requests: list[Request], logits: dict[str, Tensor]) -> None:
        launched = _moment(self._runner.device)
        result = self._stepper.prefill(requests, logits)
        for i, request in enumerate(requests):
            request.launched, request.prompt_logits = 1, {}
            _keep_logits(request, {role: x[i] for role, x in logits.items()})
        self._pending.append(_Pending(list(enumerate(requests)), result, -1, launched))

    def _launch(self) -> bool:
        """Launch a step of all requests that may need one; whether there was any."""
        running = [r for r in self._scheduler.running if r.ready]
        if all(request.launched >= request.params.max_tokens for request in running):
            return False
        rows = [(r.slot, r) for r in running if r.slot is not None]
        slots = 1 + max(slot for slot, _ in rows)
        steered = any(len(request.roles) > 1 for request in running)
        roles = self._stepper.roles_of(running) if steered else ("base",)
        launched = _moment(self._runner.device)
        drafts = self._stepper.at_hand(slots, self._choose(running))
        needs = Needs.of(running)
        if needs.grammar:
            self._stepper.constrain(running)
        result = self._stepper.run(slots, roles, drafts, needs)
        for slot, request in rows:
            request.launched += 1
            # The most it can be; what was refused is subtracted when the host learns of it.
            self._runner.advance_host(slot, request.roles, drafts + 1)
        self._pending.append(_Pending(rows, result, drafts, launched, self._stepper.cold))
        return True

    def _choose(self, running: Sequence[Request]) -> int:
        if self._controller is None:
            return 0
        useful = []
        for request in running:
            assert request.acceptance is not None
            left = request.params.max_tokens - request.launched - 1
            can = self._stepper.can_draft(request)
            useful.append((request.acceptance, max(0, left) if can else 0))
        return self._controller.choose(useful)

    def _take(self, pending: _Pending) -> Iterator[tuple[Request, StreamEvent]]:
        """Hand the rows of a step to their requests; those that end leave their slots."""
        token_ids, logprobs, raw_logprobs, status, drafted, accepted, *asked = pending.lists()
        is_step = pending.drafts >= 0
        if is_step:
            self._count(pending)
        for row, request in pending.requests:
            if request.slot is None:
                continue  # it ended while this step was on its way
            emitted = [token_id for token_id in token_ids[row] if token_id >= 0]
            request.status |= status[row]
            if is_step:
                self._runner.advance_host(
                    request.slot, request.roles, len(emitted) - pending.drafts - 1
                )
                request.launched += len(emitted) - 1
                self.statistics.useful_slot_steps += 1
                self.statistics.emitted += len(emitted)
            if drafted:
                self._observe(request, drafted[row], accepted[row], len(emitted))
            if emitted:
                more = [column[row] if column else () for column in asked]
                event = request.extend(emitted, logprobs[row], raw_logprobs[row], *more)
                if request.finish_reason is not None:
                    self.remove(request)
                yield request, event
            if len(emitted) == (accepted[row] if accepted else 0) and not request.finish_reason:
                # After the drafts that were kept, a row emits one token more.
                self.remove(request)
                yield (
                    request,
                    request.fail(
                        f"prompts[{request.index}]: no token can be drawn at position "
                        f"{len(request.token_ids)}: its combined logits are all NaN or masked"
                    ),
                )

    def _count(self, pending: _Pending) -> None:
        statistics = self.statistics
        statistics.base_forwards += 1
        statistics.slot_steps += self._scheduler.max_batch_size
        if pending.drafts:
            statistics.speculative_rounds += 1
        else:
            statistics.plain_steps += 1
        if self._controller is not None and not pending.cold:
            rows, drafts = len(pending.requests), pending.drafts
            self._controller.observe_time(rows, drafts, pending.seconds())

    def _observe(self, request: Request, drafted: int, accepted: int, emitted: int) -> None:
        assert self._controller is not None and request.acceptance is not None
        assert request.speculation is not None
        self._controller.observe(request.acceptance, drafted, accepted)
        request.speculation.drafted += drafted
        request.speculation.accepted += accepted
        request.speculation.emitted_per_round.append(emitted)
        self.statistics.drafted += drafted
        self.statistics.accepted += accepted
