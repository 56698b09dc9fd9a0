"""Draws the slots' next tokens: each slot's sampling parameters, in place, and one op a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune_kernels import ops
from proxytune_kernels.decoder.request import Request
from proxytune_kernels.decoder.speculation import Speculation
from proxytune_kernels.ops.backends import BY_NAME, resolve
from proxytune_kernels.params import MAX_LOGPROBS, ROW_FIELDS, RowParams
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
    """fp32 [B, q, 7]: the fields of :class:`~proxytune_kernels.reference.Attribution`."""

    def first(self, rows: int) -> StepResult:
        """The first rows, as views."""
        columns: list[Any] = [None if column is None else column[:rows] for column in self]
        return StepResult(*columns)


class Needs(NamedTuple):
    """What some of a step's requests ask of its draw, known to the host: it decides what is run."""

    masked: bool
    """Whether any of them may not stop yet."""
    likeliest: bool = False
    """Whether any of them reports the likeliest tokens."""
    steering: bool = False
    """Whether any of them reports what steering did."""

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Needs:
        """Of the step that comes next."""
        requests = list(requests)
        return cls(
            masked=any(
                request.rules.allowed_mask is not None
                and request.params.min_tokens > request.launched
                for request in requests
            ),
            likeliest=any(request.params.logprobs > 0 for request in requests),
            steering=any(request.params.steering for request in requests),
        )


class SlotSampler:
    """Sampling parameters, position and last token of each slot.

    Args:
        max_batch_size: number of slots.
        vocab_size: agreed width.
        backend: of the operators; None is the fastest usable one, for each operator its own.
        device: where the logits are.
        speculation: how drafts are verified; None where there are none.

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
    ) -> None:
        self.device = device
        # Columns of all slots, so that a slot is set, or moved, by one launch for each width. Each
        # begins at a multiple of 16 bytes.
        room = -(-max_batch_size // 4) * 4
        self._wide = torch.zeros((4, room), dtype=torch.int64, device=device)
        self._narrow = torch.zeros((6, room), dtype=torch.int32, device=device)
        seed, position, self._min_tokens, last = self._wide[:, :max_batch_size]
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
        if speculation is not None:
            # Of the logits' shape: the fastest depends on how many rows there are.
            block = self.token_ids[:, None].expand(-1, speculation.max_drafts + 1, -1)
            rejection = speculation.mode == "rejection"
            self.backends["verify"] = resolve(backend, block, "verify", vocab_size, rejection)
        self._first: dict[int, RowParams] = {}
        # All tokens but those that end the request; all, for requests without min_tokens.
        words = -(-vocab_size // 32)
        self._no_stop = torch.full((max_batch_size, words), -1, dtype=torch.int32, device=device)

    @staticmethod
    def numbers(requests: Sequence[Request]) -> list[Tensor]:
        """What :meth:`start` wants of its device, on the host.

        Returns:
            int64 [3, n] and int32 [6, n], the parameters of the requests; int64 [m] and int32
            [m, words], the slots and masks of those that may not stop at once.
        """
        rows = RowParams.from_sampling_params([request.params for request in requests])
        masked = {r.slot: m for r in requests if (m := r.rules.allowed_mask) is not None}
        least = [r.params.min_tokens if r.slot in masked else 0 for r in requests]
        return [
            torch.stack([rows.seed, rows.position, torch.tensor(least)]),
            torch.stack([column.view(torch.int32) for column in rows[:6]]),
            torch.tensor(list(masked), dtype=torch.int64),
            torch.stack([*masked.values()]) if masked else torch.empty(0, dtype=torch.int32),
        ]

    def start(
        self, slots: Tensor, wide: Tensor, narrow: Tensor, masked: Tensor, masks: Tensor
    ) -> None:
        """Set the parameters of slots to their new requests', at position 0: :meth:`numbers`."""
        self._wide[:3].index_copy_(1, slots, wide)
        self._narrow.index_copy_(1, slots, narrow)
        if masked.numel():
            self._no_stop.index_copy_(0, masked, masks)

    def move(self, source: int, target: int) -> None:
        """Move what a slot holds to another."""
        for columns in (self._wide, self._narrow, self._no_stop.t()):
            columns[:, target].copy_(columns[:, source])

    def state(self) -> list[Tensor]:
        """What a step changes."""
        return [self.params.position, self.token_ids]

    def first(self, slots: int) -> RowParams:
        """The parameters of the first slots, as views."""
        if slots not in self._first:
            self._first[slots] = self.params.rows(slice(0, slots))
        return self._first[slots]

    def draw(self, slots: int | Tensor, logits: Mapping[str, Tensor], needs: Needs) -> StepResult:
        """Draw the next token of some slots; :meth:`advance` moves them on.

        Args:
            slots: the first B, or which B.
            logits: per role [B, V_role], of all roles or of the base alone.
            needs: of their requests.
        """
        params = self.first(slots) if isinstance(slots, int) else self.params.rows(slots)
        drawn = ops.sample(
            logits["base"],
            logits.get("expert"),
            logits.get("anti"),
            params,
            allowed_mask=self._allowed(slots, params.position) if needs.masked else None,
            vocab_size=self.vocab_size,
            top_logprobs=MAX_LOGPROBS if needs.likeliest else 0,
            attribution=needs.steering,
            backend=self._backend(needs),
        )
        return StepResult(
            drawn.token_ids[:, None],
            drawn.logprobs[:, None],
            drawn.raw_logprobs[:, None],
            drawn.status,
            **_asked(drawn, (len(drawn.status), 1)),
        )

    def draft(
        self, slots: int, logits: Tensor, offset: int, needs: Needs, noise_stream: str
    ) -> Tensor:
        """Draw a draft token [B, 1] for the first slots, ``offset`` places behind their position.

        Args:
            logits: [B, V], the drafter's.
            needs: of their requests.
            noise_stream: ``"sample"`` shares the target's noise, and leaves out what may not end
                the text yet, as the target will; ``"draft"`` does neither.
        """
        params = self.first(slots)
        params = params._replace(position=params.position + offset)
        masked = needs.masked and noise_stream == "sample"
        drawn = ops.sample(
            logits,
            params=params,
            allowed_mask=self._allowed(slots, params.position) if masked else None,
            vocab_size=self.vocab_size,
            noise_stream=noise_stream,
            backend=self.backends["sample"],
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
        allowed_mask = None
        if needs.masked:
            ahead = torch.arange(logits["base"].shape[1], device=self.device)
            allowed_mask = self._allowed(slots, params.position[:, None] + ahead)
        verified = ops.verify(
            logits["base"],
            logits.get("expert"),
            logits.get("anti"),
            draft_token_ids,
            params,
            mode=mode,
            draft_logits=draft_logits,
            allowed_mask=allowed_mask,
            vocab_size=self.vocab_size,
            backend=self.backends["verify"],
        )
        asked = {}
        if needs.likeliest or needs.steering:
            asked = self._look_again(logits, params, verified.token_ids, allowed_mask, needs)
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
        logits: Mapping[str, Tensor],
        params: RowParams,
        token_ids: Tensor,
        allowed_mask: Tensor | None,
        needs: Needs,
    ) -> dict[str, Tensor]:
        """What requests ask of positions [B, q] that a round emitted; of the others nothing."""
        shape = token_ids.shape
        each = RowParams(*(column.repeat_interleave(shape[1]) for column in params))
        ahead = torch.arange(shape[1], device=self.device).repeat(shape[0])
        # Rows whose parameters are out of range are not read.
        position = torch.where(token_ids.flatten() >= 0, each.position + ahead, -1)
        rows = {role: x.flatten(0, 1) for role, x in logits.items()}
        drawn = ops.sample(
            rows["base"],
            rows.get("expert"),
            rows.get("anti"),
            each._replace(position=position),
            allowed_mask=None if allowed_mask is None else allowed_mask.flatten(0, 1),
            vocab_size=self.vocab_size,
            top_logprobs=MAX_LOGPROBS if needs.likeliest else 0,
            attribution=token_ids.flatten() if needs.steering else False,
            backend=self._backend(needs),
        )
        return _asked(drawn, shape)

    def _backend(self, needs: Needs) -> str | None:
        """Of ``sample``: the default one where the chosen one has no attribution."""
        name = self.backends["sample"]
        return name if not needs.steering or "attribution" in BY_NAME[name].operators else None

    def prompt_logprobs(
        self, alpha: float, logits: Mapping[str, Tensor], token_ids: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Raw logprobs of prompt tokens at n positions, and of the likeliest tokens there.

        Args:
            alpha: of the request.
            logits: per role [n, V_role], before each of the tokens.
            token_ids: the tokens that stand there.

        Returns:
            fp32 [n]; int64 and fp32 [n, MAX_LOGPROBS].
        """
        count = len(token_ids)
        given = torch.tensor(token_ids).to(self.device, non_blocking=True)
        base, expert, anti = logits["base"], logits.get("expert"), logits.get("anti")
        params = RowParams.make(count, device=self.device, alpha=alpha, temperature=0.0)
        likeliest = ops.sample(
            base, expert, anti, params, vocab_size=self.vocab_size, top_logprobs=MAX_LOGPROBS,
            backend=self.backends["sample"],
        )  # fmt: skip
        assert likeliest.top is not None
        # Of a row all but two logits have been read: a token's is held to the likeliest one's.
        pair = torch.stack([given, likeliest.token_ids], 1).clamp(0, self.vocab_size - 1)
        columns: Any = [None if x is None else x.gather(1, pair) for x in (base, expert, anti)]
        x = ops.combine(columns[0], columns[1], columns[2], params.alpha)
        logprobs = likeliest.raw_logprobs + (x[:, 0] - x[:, 1])
        logprobs = logprobs.masked_fill(given >= self.vocab_size, torch.nan)
        return logprobs, *likeliest.top

    def advance(self, slots: int, result: StepResult, active: Tensor) -> Tensor | None:
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
        return counts

    def take_first(self, slots: Tensor, result: StepResult) -> None:
        """Take the first tokens of requests whose prompts have just been run, in slots [B]."""
        self.token_ids.index_copy_(0, slots, result.token_ids.clamp(min=0))
        self.params.position.index_fill_(0, slots, 1)

    def _allowed(self, slots: int | Tensor, positions: Tensor) -> Tensor:
        """Packed masks [B, words] or [B, k + 1, words]: no stop token before min_tokens are out.

        Args:
            slots: the first B, or which B.
            positions: int64 [B] or [B, k + 1].
        """
        place = slice(0, slots) if isinstance(slots, int) else slots
        shape = (len(positions), *(1,) * (positions.dim() - 1))
        early = positions < self._min_tokens[place].view(shape)
        return torch.where(early[..., None], self._no_stop[place].view(*shape, -1), -1)


def _asked(drawn: SampleOutput, shape: Sequence[int]) -> dict[str, Tensor]:
    """What some requests ask for, as columns of a :class:`StepResult`; ``shape`` is [B, q]."""
    asked = {}
    if drawn.top is not None:
        asked["num_kept"] = drawn.num_kept.view(*shape)
        asked["top_token_ids"] = drawn.top.token_ids.view(*shape, -1)
        asked["top_logprobs"] = drawn.top.logprobs.view(*shape, -1)
    if drawn.attribution is not None:
        fields = torch.stack([field.float() for field in drawn.attribution], -1)
        asked["steering"] = fields.view(*shape, -1)
    return asked
