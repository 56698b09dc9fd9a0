"""One step of all running slots: forwards, then a draw; or a round of drafts and their check.

Everything a step decides lies in tensors on the device: which slots move on, how long they are,
which drafts may count. So a step can be captured once and replayed (see
:mod:`~proxytune_kernels.decoder.graphs`), and nothing in it waits for the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from proxytune_kernels.decoder import transfer
from proxytune_kernels.decoder.constraints import Needs
from proxytune_kernels.decoder.graphs import StepGraphs, compiled_graphs
from proxytune_kernels.decoder.remote import complete
from proxytune_kernels.decoder.request import Request
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.decoder.sampler import SlotSampler, StepResult
from proxytune_kernels.decoder.speculation import History, Speculation
from proxytune_kernels.params import MAX_LOGPROBS
from proxytune_kernels.trio.remote import RemoteModel
from proxytune_kernels.trio.roles import ROLES


class Stepper:
    """Runs steps over the first slots: from ``graphs`` where there are any, else each anew."""

    def __init__(
        self,
        runner: Runner,
        sampler: SlotSampler,
        speculation: Speculation | None,
        graphs: StepGraphs | None,
    ) -> None:
        self.runner = runner
        self.sampler = sampler
        self.speculation = speculation
        self.graphs = graphs
        self.roles = tuple(runner.active)
        base = runner.models["base",].model
        self._tail = base.tail if isinstance(base, RemoteModel) else None
        self.cold = False
        """Whether the last step was the first of its kind, or was captured or compiled as it ran.

        Kernels are compiled and libraries plan at their first calls: what such a step took, the
        next ones will not take.
        """
        self._seen: set[Hashable] = set()
        slots, capacity = sampler.token_ids.shape[0], runner.capacity
        # Up to how many output tokens a slot may draft: 0 for one that can't have drafts.
        self._draft_until = torch.zeros(slots, dtype=torch.int64, device=runner.device)
        looks_up = speculation is not None and speculation.drafter == "prompt_lookup"
        vocab_size = sampler.vocab_size
        self._history = History(slots, capacity, vocab_size, runner.device) if looks_up else None

    def can_draft(self, request: Request) -> bool:
        """Whether a request takes part in rounds: the expert must be running in it."""
        if self.speculation is None:
            return False
        return self.speculation.drafter != "expert" or "expert" in request.roles

    def roles_of(self, requests: Sequence[Request]) -> tuple[str, ...]:
        """The roles that any of these requests, of which one is steered, runs in."""
        if len(self.roles) <= len(ROLES):
            return self.roles
        wanted = {role for request in requests for role in request.roles}
        return tuple(role for role in self.roles if role in wanted)

    @torch.inference_mode()
    def prefill(self, requests: Sequence[Request], logits: dict[str, Tensor]) -> StepResult:
        """Draw the first tokens of requests whose prompts are in their slots.

        They run in the same roles. Their numbers go to the device in one copy.
        """
        looks_up = self._history is not None
        self.sampler.constraints.reserve(requests)

        def numbers() -> list[Tensor]:
            until = [r.params.max_tokens if self.can_draft(r) else 0 for r in requests]
            prompts = [r.prompt_token_ids["base"] for r in requests] if looks_up else []
            return [
                torch.tensor([request.slot for request in requests]),
                torch.tensor(until),
                *self.sampler.numbers(requests),
                *History.numbers(prompts),
            ]

        slots, until, *sent = transfer.to_device(numbers, self.runner.device)
        self.sampler.start(slots, *sent[:-2])
        needs = Needs.of(requests)
        if needs.grammar:
            self.constrain(requests)
        logits, coverage = self._known(logits)
        result = self.sampler.draw(slots, logits, needs)._replace(coverage=coverage)
        self.sampler.take_first(slots, result, needs)
        self.runner.start(slots, requests[0].roles)
        self._draft_until.index_copy_(0, slots, until)
        if self._history is not None:
            prompts, lengths = sent[-2:]
            self._history.start(slots, prompts, lengths, result.token_ids[:, 0].clamp(min=0))
        return result

    @torch.inference_mode()
    def score_prompts(
        self, requests: Sequence[Request], logits: dict[str, Tensor], starts: Sequence[int]
    ) -> None:
        """Score parts of prompts, from logits [B, q, V] of q tokens of each from its start on."""
        logits, _ = self._known(logits)
        count = logits["base"].shape[1]
        wanted = max(request.params.prompt_logprobs for request in requests)
        # Of more than a few tokens a row there are copies of its logits: one prompt at a time.
        size = 1 if wanted > MAX_LOGPROBS else len(requests)
        for first in range(0, len(requests), size):
            part = requests[first : first + size]
            texts = [
                request.prompt_token_ids["base"][start + 1 : start + 1 + count]
                for request, start in zip(part, starts[first:], strict=False)
            ]
            rows = [request for request in part for _ in range(count)]
            # The last row of a prompt that ends here has no token behind it. All run in the same
            # roles, so all are steered by the same pairs.
            scores = self.sampler.prompt_logprobs(
                [request.params.alphas[0] for request in rows],
                {role: x[first : first + size].flatten(0, 1) for role, x in logits.items()},
                [token_id for text in texts for token_id in (*text, 0)[:count]],
                wanted,
                {i: [r.params.pair_alphas[i] for r in rows] for i in part[0].pairs},
            )
            for i, (request, text) in enumerate(zip(part, texts, strict=True)):
                own = slice(i * count, i * count + len(text))
                logprobs, ids, tops = (column[own] for column in scores)
                request.prompt_scores.append((logprobs, ids, tops))

    def at_hand(self, slots: int, drafts: int) -> int:
        """How many of these drafts the text has, where the host can ask without waiting."""
        if not drafts or self._history is None or self.graphs is not None:
            return drafts
        if self.runner.device.type != "cpu":
            return drafts
        return int((self._history.lookup(slots, drafts) >= 0).sum(1).max())

    @torch.inference_mode()
    def run(self, slots: int, roles: tuple[str, ...], drafts: int, needs: Needs) -> StepResult:
        """One step of the first slots.

        Args:
            slots: how many.
            roles: those of the running requests: the base alone where none is steered.
            drafts: of each row; 0 is a plain step.
            needs: of the running requests.

        Returns:
            B = ``slots`` rows; those whose slot is not running hold nothing of meaning.
        """
        kind = (roles, drafts, self.sampler.constraints.sized(needs))
        before = self._preparations()
        step = partial(self._step, *kind)
        # A grammar follows the drafts one by one, on the host.
        if self.graphs is None or (drafts and needs.grammar):
            result = step(slots)
        else:
            result = self.graphs.run(slots, kind, step, self.state())
            self._leave_graphs()
        self.cold = (slots, kind) not in self._seen or self._preparations() != before
        self._seen.add((slots, kind))
        return result

    def _preparations(self) -> tuple[int, int]:
        """How many captures were tried, and how many graphs torch.compile has made here."""
        return 0 if self.graphs is None else self.graphs.tried, compiled_graphs()

    @torch.inference_mode()
    def warm_up(self, draft_sizes: Sequence[int]) -> None:
        """Capture the steps that most requests need, with a progress bar on a terminal.

        Those of requests that are not steered, or by further pairs, or may not stop yet, are
        captured when they come.
        """
        if self.graphs is None:
            return
        from tqdm import tqdm  # with transformers

        needs = Needs.of([])
        roles = tuple(role for role in self.roles if role in ROLES)
        wanted = [(rows, drafts) for rows in self.graphs.sizes for drafts in draft_sizes]
        for rows, drafts in tqdm(wanted, "Capturing steps", unit="graph", disable=None):
            kind = (roles, drafts, needs)
            self.graphs.prepare(rows, kind, partial(self._step, *kind), self.state())
        self._leave_graphs()

    @torch.inference_mode()
    def constrain(self, requests: Sequence[Request]) -> None:
        """Leave these requests, in their slots, what their grammars allow in the next draw."""
        states = {r.slot: r.grammar for r in requests if r.slot is not None and r.grammar}
        self.sampler.constrain(states, 1 + max(r.slot or 0 for r in requests))

    def _leave_graphs(self) -> None:
        """Once nothing can be captured, steps are those of a decoder that captures nothing."""
        if self.graphs is not None and self.graphs.failed is not None:
            self.graphs = None
            self.runner.capture(False)

    def move(self, source: int, target: int) -> None:
        """Move what a slot holds to an empty slot."""
        self.runner.move(source, target)
        self.sampler.move(source, target)
        self._draft_until[target].copy_(self._draft_until[source])
        if self._history is not None:
            self._history.move(source, target)

    def state(self) -> list[Tensor]:
        """What a step changes beside keys and values."""
        history = [] if self._history is None else self._history.state()
        return [*self.runner.state(), *self.sampler.state(), *history]

    def _step(self, roles: tuple[str, ...], drafts: int, needs: Needs, rows: int) -> StepResult:
        if drafts:
            return self._round(rows, roles, drafts, needs)
        return self._plain(rows, roles, needs)

    def _plain(self, rows: int, roles: tuple[str, ...], needs: Needs) -> StepResult:
        logits = self.runner.forward(roles, self.sampler.token_ids[:rows])
        last, coverage = self._known({role: x[:, 0] for role, x in logits.items()}, rows)
        result = self.sampler.draw(rows, last, needs)._replace(coverage=coverage)
        self._advance(rows, result, needs)
        return result

    def _round(self, rows: int, roles: tuple[str, ...], drafts: int, needs: Needs) -> StepResult:
        """Draft, score the drafts, verify them: 1 to drafts + 1 tokens a row."""
        assert self.speculation is not None
        start = self.sampler.token_ids[:rows]
        rejection = self.speculation.mode == "rejection"
        if self._history is not None:
            token_ids = self._history.lookup(rows, drafts)
            for offset in range(drafts if needs.grammar else 0):
                self.sampler.follow(token_ids[:, offset], offset + 1)
            inputs = torch.cat([start, token_ids.clamp(min=0)], 1)
            logits = self.runner.forward(roles, inputs)
            draft_logits = self._certain(token_ids) if rejection else None
        else:
            token_ids, expert = self._draft(rows, drafts, needs)
            inputs = torch.cat([start, token_ids], 1)
            others = tuple(role for role in roles if role != "expert")
            logits = self.runner.forward(others, inputs)
            logits["expert"] = expert
            draft_logits = expert[:, :-1] if rejection else None
        if needs.grammar:
            self.sampler.rewind()
        # No token past max_tokens, whatever is accepted.
        useful = (self._draft_until[:rows] - self.sampler.params.position[:rows] - 1)[:, None]
        ahead = torch.arange(drafts, device=token_ids.device)
        token_ids = torch.where(ahead < useful, token_ids, -1)
        logits, coverage = self._known(logits, rows)
        result = self.sampler.verify(
            rows, logits, token_ids, self.speculation.mode, draft_logits, needs
        )._replace(coverage=coverage)
        self._advance(rows, result, needs)
        return result

    def _draft(self, rows: int, drafts: int, needs: Needs) -> tuple[Tensor, Tensor]:
        """The expert's drafts [B, k], and its logits [B, k + 1, V] at them and behind the last."""
        assert self.speculation is not None
        noise_stream = "draft" if self.speculation.mode == "rejection" else "sample"
        tokens, logits = [self.sampler.token_ids[:rows]], []
        for offset in range(drafts + 1):
            x = self.runner.forward(("expert",), tokens[-1], offset)["expert"]
            logits.append(x)
            if offset < drafts:
                drafted = torch.cat(tokens, 1)[:, 1:]
                tokens.append(self.sampler.draft(rows, x[:, 0], drafted, needs, noise_stream))
                if needs.grammar:
                    self.sampler.follow(tokens[-1][:, 0], offset + 1)
        return torch.cat(tokens[1:], 1), torch.cat(logits, 1)

    def _certain(self, token_ids: Tensor) -> Tensor:
        """Logits [B, k, V] of a drafter that could have drawn nothing else."""
        shape = (*token_ids.shape, self.sampler.vocab_size)
        logits = torch.full(shape, -torch.inf, device=token_ids.device)
        return logits.scatter_(2, token_ids.clamp(min=0)[..., None], 0.0)

    def _known(
        self, logits: dict[str, Tensor], rows: int | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The same with all of the base's logits, and which mass of them is known, [B, q].

        None of that where the base is here. ``rows``: of the first slots, of which some may not
        run in all roles.
        """
        if self._tail is None:
            return logits, None
        width = self.sampler.vocab_size
        base, anti = (logits[r][..., :width] if r in logits else None for r in ("base", "anti"))
        assert base is not None
        steered = None
        if rows is not None and anti is not None:
            active = self.runner.active["anti"][:rows] > 0
            steered = active.to(base.device).view(-1, *[1] * (base.dim() - 2))
        base, coverage = complete(base, anti, self._tail, steered)
        return {**logits, "base": base}, coverage.view(len(coverage), -1)

    def _advance(self, rows: int, result: StepResult, needs: Needs) -> None:
        active = self.runner.active["base"][:rows]
        counts = self.sampler.advance(rows, result, active, needs)
        self.runner.advance(rows, counts)
        if self._history is not None:
            moved = active if counts is None else counts * active
            self._history.append(result.token_ids.clamp(min=0), moved)
