"""Draws the slots' next tokens: each slot's sampling parameters, in place, and one op a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune_kernels import ops
from proxytune_kernels.decoder import transfer
from proxytune_kernels.decoder.constraints import Needs, SlotConstraints
from proxytune_kernels.decoder.grammar import GrammarState
from proxytune_kernels.decoder.request import Request
from proxytune_kernels.decoder.speculation import Speculation
from proxytune_kernels.ops.backends import BY_NAME, resolve
from proxytune_kernels.params import MAX_LOGPROBS, ROW_FIELDS, Edits, RowParams
from proxytune_kernels.reference import SampleOutput


class StepResult(NamedTuple):
    """What a step emitted, B rows of up to q tokens; on the device."""

    token_ids: Tensor
    """int64 [B, q]: the tokens, -1 behind the last."""
    logprobs: Tensor
    """fp32 [B, q]."""
    raw_logprobs: Tensor
    """fp32 [B, q]."""
    status: Tensor
    """int32 [B]."""
    num_drafted: Tensor | None = None
    """int64 [B]: drafts that were verified; None in a plain step."""
    num_accepted: Tensor | None = None
    """int32 [B]: those that were kept."""
    num_kept: Tensor | None = None
    """int32 [B, q]: size of each kept set; None, as what follows, where no request asks for it."""
    top_token_ids: Tensor | None = None
    """int64 [B, q, n]: the likeliest tokens."""
    top_logprobs: Tensor | None = None
    """fp32 [B, q, n]: their raw logprobs."""
    steering: Tensor | None = None
    """fp32 [B, q, 7]: columns of :class:`~proxytune_kernels.reference.Attribution`."""
    coverage: Tensor | None = None
    """fp32 [B, q]: the mass that a remote base told of; None where the base is here."""

    def first(self, rows: int) -> StepResult:
        """The first rows, as views."""
        columns: list[Any] = [None if column is None else column[:rows] for column in self]
        return StepResult(*columns)


class SlotSampler:
    """Sampling parameters, position and last token of each slot.

    Args:
        max_batch_size: number of slots.
        vocab_size: agreed width.
        backend: of the operators; None is the fastest usable one, for each operator its own.
        device: where the logits are.
        speculation: how drafts are verified; None where there are none.
        pairs: the roles of each further pair.

    Raises:
        RuntimeError: a backend asked for by name that lacks one of the operators.
    """

    def __init__(
        self,
        max_batch_size: int,
        vocab_size: int,
        backend: str | None,
        device: torch.device,
        speculation: Speculation | None = None,
        pairs: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.device = device
        self._pairs = pairs
        # Columns of all slots, so that a slot is set, or moved, by one launch for each width. Each
        # begins at a multiple of 16 bytes.
        room = -(-max_batch_size // 4) * 4
        self._wide = torch.zeros((3, room), dtype=torch.int64, device=device)
        self._narrow = torch.zeros((6, room), dtype=torch.int32, device=device)
        seed, position, last = self._wide[:, :max_batch_size]
        self.token_ids = last[:, None]
        narrow: list[Any] = [
            column[:max_batch_size].view(ROW_FIELDS[name].dtype)
            for name, column in zip(RowParams._fields, self._narrow, strict=False)
        ]
        self.params = RowParams._make([*narrow, seed, position])
        for column, value in zip(self.params, RowParams.make(1), strict=True):
            column.fill_(value[0])
        self.vocab_size = vocab_size
        self.backends = {"sample": resolve(backend, self.token_ids, "sample", vocab_size)}
        self.constraints = SlotConstraints(max_batch_size, vocab_size, device)
        self._wanted = backend
        self.no_edits: str | None = None
        """Why no row can have penalties or biases; None where it can."""
        try:
            resolve(backend, self.token_ids, "sample", vocab_size, edited=True)
        except RuntimeError as error:
            self.no_edits = str(error)
        if speculation is not None:
            # Of the logits' shape: the fastest depends on how many rows there are.
            block = self.token_ids[:, None].expand(-1, speculation.max_drafts + 1, -1)
            rejection = speculation.mode == "rejection"
            self.backends["verify"] = resolve(backend, block, "verify", vocab_size, rejection)
        self._first: dict[int, RowParams] = {}
        # What grammars allow at each place of a round, for each slot; where captured steps find it.
        self._places = 1 if speculation is None else speculation.max_drafts + 1
        self._by_grammar: Tensor | None = None
        self._states: list[GrammarState | None] = []

    def numbers(self, requests: Sequence[Request]) -> list[Tensor]:
        """What :meth:`start` wants of its device, on the host.

        Returns:
            int64 [2, n] and int32 [6, n], the parameters of the requests, and what
            :meth:`SlotConstraints.numbers` makes of them.
        """
        rows = RowParams.from_sampling_params([request.params for request in requests])
        return [
            torch.stack([rows.seed, rows.position]),
            torch.stack([column.view(torch.int32) for column in rows[:6]]),
            *self.constraints.numbers(requests),
        ]

    def start(self, slots: Tensor, wide: Tensor, narrow: Tensor, *constraints: Tensor) -> None:
        """Set the parameters of slots to their new requests', at position 0: :meth:`numbers`."""
        self._wide[:2].index_copy_(1, slots, wide)
        self._narrow.index_copy_(1, slots, narrow)
        self.constraints.start(slots, constraints)

    def move(self, source: int, target: int) -> None:
        """Move what a slot holds to another."""
        for columns in (self._wide, self._narrow):
            columns[:, target].copy_(columns[:, source])
        self.constraints.move(source, target)

    def state(self) -> list[Tensor]:
        """What a step changes."""
        return [self.params.position, self.token_ids, *self.constraints.state()]

    def first(self, slots: int) -> RowParams:
        """The parameters of the first slots, as views."""
        if slots not in self._first:
            self._first[slots] = self.params.rows(slice(0, slots))
        return self._first[slots]

    def draw(self, slots: int | Tensor, logits: Mapping[str, Tensor], needs: Needs) -> StepResult:
        """Draw the next token of some slots; :meth:`advance` moves them on.

        Args:
            slots: the first B, or which B.
            logits: per role [B, V_role], of the roles that run.
            needs: of their requests.
        """
        params = self.first(slots) if isinstance(slots, int) else self.params.rows(slots)
        if needs.alphas or needs.scheduled:
            base = logits["base"][:, None]
            alpha = self._alpha(slots, params.position[:, None], base, needs)
            params = params._replace(alpha=alpha[:, 0])
        drawn = ops.sample(
            logits["base"],
            logits.get("expert"),
            logits.get("anti"),
            params,
            **self._constraints(slots, params.position, None, needs),
            bias=self._pairs_bias(slots, params.position, logits, needs),
            vocab_size=self.vocab_size,
            top_logprobs=needs.likeliest,
            attribution=needs.steering,
            backend=self._backend("sample", needs),
        )
        return StepResult(
            drawn.token_ids[:, None],
            drawn.logprobs[:, None],
            drawn.raw_logprobs[:, None],
            drawn.status,
            **_asked(drawn, (len(drawn.status), 1)),
        )

    def draft(
        self, slots: int, logits: Tensor, drafts: Tensor, needs: Needs, noise_stream: str
    ) -> Tensor:
        """Draw a draft token [B, 1] for the first slots, behind those that they have.

        Args:
            logits: [B, V], the drafter's.
            drafts: int64 [B, n], those so far.
            needs: of their requests.
            noise_stream: ``"sample"`` shares the target's noise, and its constraints; ``"draft"``
                does neither.
        """
        params = self.first(slots)
        params = params._replace(position=params.position + drafts.shape[1])
        if noise_stream != "sample":
            needs = Needs()
        drawn = ops.sample(
            logits,
            params=params,
            **self._constraints(slots, params.position, drafts, needs),
            vocab_size=self.vocab_size,
            noise_stream=noise_stream,
            backend=self._backend("sample", needs),
        )
        # A drafter without a token to draw must not end the round: any draft can be refused.
        return drawn.token_ids.clamp(min=0)[:, None]

    def verify(
        self,
        slots: int,
        logits: Mapping[str, Tensor],
        draft_token_ids: Tensor,
        mode: str,
        draft_logits: Tensor | None,
        needs: Needs,
    ) -> StepResult:
        """Verify the drafts of the first slots; :meth:`advance` moves them on.

        Args:
            logits: per role [B, k + 1, V_role].
            draft_token_ids: int64 [B, k], -1 behind a row's last.
            mode: of :func:`proxytune_kernels.verify`.
            draft_logits: [B, k, V], for rejection.
            needs: of their requests.
        """
        params = self.first(slots)
        roles, ahead = logits, torch.arange(logits["base"].shape[1], device=self.device)
        positions = params.position[:, None] + ahead
        if (needs.alphas or needs.scheduled) and "expert" in logits:
            # An alpha of its own at each position, which verify does not have: the same x.
            alpha = self._alpha(slots, positions, logits["base"], needs).flatten()
            base, expert, anti = (logits[role].flatten(0, 1) for role in ("base", "expert", "anti"))
            x = ops.combine(base, expert, anti, alpha, vocab_size=self.vocab_size)
            logits = {"base": x.view(*positions.shape, -1)}
        constraints = self._constraints(slots, positions, draft_token_ids, needs)
        constraints["bias"] = self._pairs_bias(slots, positions, roles, needs)
        verified = ops.verify(
            logits["base"],
            logits.get("expert"),
            logits.get("anti"),
            draft_token_ids,
            params,
            mode=mode,
            draft_logits=draft_logits,
            **constraints,
            vocab_size=self.vocab_size,
            backend=self._backend("verify", needs),
        )
        asked = {}
        if needs.likeliest or needs.steering:
            asked = self._look_again(slots, roles, params, verified.token_ids, constraints, needs)
        return StepResult(
            verified.token_ids,
            verified.logprobs,
            verified.raw_logprobs,
            verified.status,
            (draft_token_ids >= 0).sum(1),
            verified.num_accepted,
            **asked,
        )

    def _look_again(
        self,
        slots: int,
        logits: Mapping[str, Tensor],
        params: RowParams,
        token_ids: Tensor,
        constraints: Mapping[str, Any],
        needs: Needs,
    ) -> dict[str, Tensor]:
        """What requests ask of positions [B, q] that a round emitted; of the others nothing."""
        shape = token_ids.shape
        each = RowParams(*(column.repeat_interleave(shape[1]) for column in params))
        ahead = torch.arange(shape[1], device=self.device).repeat(shape[0])
        position = each.position + ahead
        found: dict[str, Any] = {}
        for name in ("allowed_mask", "bias"):
            if (given := constraints.get(name)) is not None:
                found[name] = given.flatten(0, 1)
        if (edits := constraints.get("edits")) is not None:
            penalties = edits.penalties.repeat_interleave(shape[1], 0)
            found["edits"] = Edits(edits.entries.flatten(0, 1), penalties)
        if needs.alphas or needs.scheduled:
            alpha = self._alpha(slots, position.view(shape), logits["base"], needs)
            each = each._replace(alpha=alpha.flatten())
        # Rows whose parameters are out of range are not read.
        each = each._replace(position=position.masked_fill(token_ids.flatten() < 0, -1))
        rows = {role: x.flatten(0, 1) for role, x in logits.items()}
        drawn = ops.sample(
            rows["base"],
            rows.get("expert"),
            rows.get("anti"),
            each,
            **found,
            vocab_size=self.vocab_size,
            top_logprobs=needs.likeliest,
            attribution=token_ids.flatten() if needs.steering else False,
            backend=self._backend("sample", needs),
        )
        return _asked(drawn, shape)

    def prompt_logprobs(
        self, alpha: Sequence[float], logits: Mapping[str, Tensor], token_ids: Sequence[int],
        wanted: int, pair_alphas: Mapping[int, Sequence[float]],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Raw logprobs of prompt tokens at n positions, and of the likeliest tokens there.

        Args:
            alpha: of each position.
            logits: per role [n, V_role], before each of the tokens.
            token_ids: the tokens that stand there.
            wanted: how many of the likeliest tokens.
            pair_alphas: of the further pairs that steer any of them.

        Returns:
            fp32 [n]; int64 and fp32 [n, at least ``wanted``, or the vocabulary].
        """
        count = len(token_ids)
        given = torch.tensor(token_ids).to(self.device, non_blocking=True)
        base, expert, anti = logits["base"], logits.get("expert"), logits.get("anti")
        strength = torch.tensor(alpha, dtype=torch.float32)
        params = RowParams.make(count, device=self.device, alpha=strength, temperature=0.0)
        alphas = {i: torch.tensor(a).to(params.alpha) for i, a in pair_alphas.items()}
        bias = self._sum_of_pairs(logits, alphas)
        if wanted > MAX_LOGPROBS:
            x = ops.combine(base, expert, anti, params.alpha, bias=bias, vocab_size=self.vocab_size)
            x = x.log_softmax(-1)
            top = x.topk(min(wanted, self.vocab_size), -1)
            inside = given.clamp(max=self.vocab_size - 1)
            logprobs = x.gather(1, inside[:, None])[:, 0]
            logprobs = logprobs.masked_fill(given >= self.vocab_size, torch.nan)
            return logprobs, top.indices, top.values
        likeliest = ops.sample(
            base, expert, anti, params, bias=bias, vocab_size=self.vocab_size,
            top_logprobs=MAX_LOGPROBS, backend=self.backends["sample"],
        )  # fmt: skip
        assert likeliest.top is not None
        # Of a row all but two logits have been read: a token's is held to the likeliest one's.
        pair = torch.stack([given, likeliest.token_ids], 1).clamp(0, self.vocab_size - 1)
        columns: Any = [
            None if x is None else x.gather(1, pair) for x in (base, expert, anti, bias)
        ]
        x = ops.combine(columns[0], columns[1], columns[2], params.alpha, bias=columns[3])
        logprobs = likeliest.raw_logprobs + (x[:, 0] - x[:, 1])
        logprobs = logprobs.masked_fill(given >= self.vocab_size, torch.nan)
        return logprobs, *likeliest.top

    def advance(
        self, slots: int, result: StepResult, active: Tensor, needs: Needs
    ) -> Tensor | None:
        """Take the first slots' last tokens, and move on those that are active (1, else 0).

        Returns:
            int64 [B]: how many tokens each emitted; None for one each, of a plain step. A row for
            which none could be drawn counts likewise: its request is about to end.
        """
        last, counts, moved = result.token_ids, None, active
        if last.shape[1] > 1:
            counts = (last >= 0).sum(1)
            last = last.gather(1, (counts - 1).clamp(min=0)[:, None])
            moved = counts * active
        self.token_ids[:slots].copy_(last).clamp_(min=0)
        self.first(slots).position.add_(moved)
        self.constraints.take(slots, result.token_ids, moved, needs)
        return counts

    def take_first(self, slots: Tensor, result: StepResult, needs: Needs) -> None:
        """Take the first tokens of requests whose prompts have just been run, in slots [B]."""
        self.token_ids.index_copy_(0, slots, result.token_ids.clamp(min=0))
        self.params.position.index_fill_(0, slots, 1)
        self.constraints.take(slots, result.token_ids, torch.ones_like(slots), needs)

    def constrain(self, states: Mapping[int, GrammarState], slots: int) -> None:
        """Leave the next draw of the first slots what their grammars allow; the host waits."""
        if self._by_grammar is None:
            shape = self._places, len(self.token_ids), -(-self.vocab_size // 32)
            self._by_grammar = torch.full(shape, -1, dtype=torch.int32, device=self.device)
        self._states = [states.get(slot) for slot in range(slots)]
        self._fill(0)

    def follow(self, drafts: Tensor, offset: int) -> None:
        """Go on by the drafts int64 [B] that lie before the place ``offset``; the host waits."""
        for state, token_id in zip(self._states, drafts.tolist(), strict=True):
            if state is not None:
                state.follow(token_id)
        self._fill(offset)

    def rewind(self) -> None:
        """Go back to where the round began."""
        for state in self._states:
            if state is not None:
                state.rewind()

    def _fill(self, offset: int) -> None:
        assert self._by_grammar is not None
        words = self._by_grammar.shape[-1]

        def masks() -> list[Tensor]:
            made = torch.full((len(self._states), words), -1, dtype=torch.int32)
            for row, state in zip(made, self._states, strict=True):
                if state is not None:
                    state.fill(row)
            return [made]

        [sent] = transfer.to_device(masks, self.device)
        self._by_grammar[offset, : len(sent)].copy_(sent)

    def _alpha(self, slots: int | Tensor, positions: Tensor, base: Tensor, needs: Needs) -> Tensor:
        place = slice(0, slots) if isinstance(slots, int) else slots
        return self.constraints.alpha(slots, positions, self.params.alpha[place], base, needs)

    def _pairs_bias(
        self, slots: int | Tensor, positions: Tensor, logits: Mapping[str, Tensor], needs: Needs
    ) -> Tensor | None:
        """What further pairs add to x at positions [B], or [B, T], of logits of that shape."""
        if not needs.pairs:
            return None
        rows = logits if positions.dim() > 1 else {r: x[:, None] for r, x in logits.items()}
        at = positions.view(len(positions), -1)
        alpha = self.constraints.pair_alpha
        alphas = {i: alpha(slots, i, at, rows["base"], needs).flatten() for i in needs.pairs}
        bias = self._sum_of_pairs({r: x.flatten(0, 1) for r, x in rows.items()}, alphas)
        return None if bias is None else bias.view(*positions.shape, -1)

    def _sum_of_pairs(
        self, logits: Mapping[str, Tensor], alphas: Mapping[int, Tensor]
    ) -> Tensor | None:
        """Sum of alpha * (expert - anti) over further pairs, fp32 [n, vocab_size]; one pass each.

        Args:
            logits: per role [n, V_role].
            alphas: fp32 [n] of each of the pairs; none is None. A row of 0 adds exactly 0.
        """
        total = None
        for i, alpha in alphas.items():
            if total is None:
                total = torch.zeros((1, self.vocab_size), device=self.device).expand(len(alpha), -1)
            expert, anti = (logits[role] for role in self._pairs[i])
            total = ops.combine(total, expert, anti, alpha, vocab_size=self.vocab_size)
        return total

    def _backend(self, operator: str, needs: Needs) -> str | None:
        """As chosen once, but for edits and attribution, which not all of them have."""
        if needs.edits:
            return self._wanted
        name = self.backends[operator]
        lacks = needs.steering and "attribution" not in BY_NAME[name].operators
        return None if lacks and operator == "sample" else name

    def _constraints(
        self, slots: int | Tensor, positions: Tensor, drafts: Tensor | None, needs: Needs
    ) -> dict[str, Any]:
        """Edits and masks of the tokens at positions [B], or [B, T] with T - 1 drafts, if any.

        At positions [B] all of the drafts have been taken.
        """
        found: dict[str, Any] = {}
        each = positions.dim() > 1
        if needs.edits:
            found["edits"] = self.constraints.edits(slots, drafts, each)
        if needs.masked:
            ahead = positions if each else positions[:, None]
            masks = self.constraints.allowed(slots, ahead, drafts, each, needs)
            found["allowed_mask"] = masks if each else masks[:, 0]
        if needs.grammar:
            own = self._by_grammars(slots, positions.shape[1] if each else None, drafts)
            found["allowed_mask"] = own & found.get("allowed_mask", own)
        return found

    def _by_grammars(self, slots: int | Tensor, width: int | None, drafts: Tensor | None) -> Tensor:
        """Packed masks [B, width, words], or [B, words] behind the drafts: what they allow."""
        assert self._by_grammar is not None
        if width is not None:
            return self._by_grammar[:width, :slots].transpose(0, 1).contiguous()
        of_place = self._by_grammar[0 if drafts is None else drafts.shape[1]]
        return of_place[:slots] if isinstance(slots, int) else of_place[slots]


def _asked(drawn: SampleOutput, shape: Sequence[int]) -> dict[str, Tensor]:
    """What some requests ask for, as columns of a :class:`StepResult`; ``shape`` is [B, q]."""
    asked = {}
    if drawn.top is not None:
        asked["num_kept"] = drawn.num_kept.view(*shape)
        asked["top_token_ids"] = drawn.top.token_ids.view(*shape, -1)
        asked["top_logprobs"] = drawn.top.logprobs.view(*shape, -1)
    if drawn.attribution is not None:
        asked["steering"] = drawn.attribution.columns.view(*shape, -1)
    return asked
