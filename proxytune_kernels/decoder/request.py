"""A request from its prompt to its output, with the rules that end it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile, zip_longest
from typing import Any, NamedTuple

from torch import Tensor

from proxytune_kernels.decoder.constraints import Constraints
from proxytune_kernels.decoder.grammar import GrammarState
from proxytune_kernels.decoder.speculation import Acceptance, SpeculationStats
from proxytune_kernels.decoder.text import Detokenizer, StopStrings
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio.token_texts import special_tokens

FINISH_REASONS = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True)
class RequestMetrics:
    """Times of a request in seconds, by the monotonic clock, from when it was submitted."""

    queued: float
    """Until it got a slot."""
    first_token: float
    """Until its first token; 0 if it had none."""
    total: float
    """Until it finished."""


class Steering(NamedTuple):
    """What steering did to an output token; probabilities at temperature 1, without filters.

    Those of the pair are NaN where the request is not steered.
    """

    base: float
    """The token's probability under the base."""
    expert: float
    anti: float
    proxy: float
    """Under the combined logits."""
    base_rank: int
    """Its place among the base's tokens, 1 the likeliest."""
    changed: bool
    """Whether the likeliest token is another than the base's."""
    kl: float
    """The Kullback-Leibler divergence of the proxy from the base, in nats."""


@dataclass(frozen=True)
class RequestOutput:
    """What became of a request.

    Args:
        index: its place among the prompts of its call.
        prompt: as it was given.
        prompt_token_ids: role -> the prompt's tokens.
        token_ids: output tokens, the one that ended it included.
        text: output text, without the token or string that ended it (unless asked for).
        logprobs: per output token, log of the probability it was drawn with.
        raw_logprobs: per output token, its log-softmax at temperature 1, no filter.
        finish_reason: ``"stop"`` (a stop token or string), ``"length"`` (max_tokens),
            ``"cancelled"``, or ``"error"``: its logits left no token to draw.
        stop_reason: the token id or string that ended it, else None.
        seed: of its noise; with the same parameters it gives the same tokens again.
        status: what the sampler reported, or-ed over the tokens: 0, or the bits of
            :class:`proxytune_kernels.reference.SampleOutput`.
        metrics: its times.
        speculation: drafts and what became of them; None where the decoder doesn't speculate.
        top_logprobs: per output token, token -> log-probability: the one drawn, then as many of the
            likeliest as ``logprobs`` asks for; None where it does not.
        prompt_logprobs: the same per token of the prompt; None for the first, which follows
            nothing, and None in all where they are not asked for.
        steering: per output token, where it is asked for; else None.
        coverage: per output token, the probability of the tokens that a remote base told of; None
            where the base is here.
        error: what went wrong, with finish_reason ``"error"``; else None.
        sample: which of the n outputs of its prompt this is.
    """

    index: int
    prompt: Any
    prompt_token_ids: dict[str, list[int]]
    token_ids: list[int]
    text: str
    logprobs: list[float]
    raw_logprobs: list[float]
    finish_reason: str
    stop_reason: int | str | None
    seed: int
    status: int
    metrics: RequestMetrics
    speculation: SpeculationStats | None = None
    top_logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    steering: list[Steering] | None = None
    coverage: list[float] | None = None
    error: str | None = None
    sample: int = 0


@dataclass(frozen=True)
class StreamEvent:
    """Progress of one request.

    Args:
        request_id: for :meth:`Decoder.cancel`.
        index: the request's place among the prompts of its call.
        text: new text; may be empty while a character or a stop string is incomplete.
        token_ids: new tokens, several where drafts were accepted; none in the event of a
            cancellation or an error.
        logprobs: per new token.
        output: the whole output, in the request's last event; None before.
        sample: which of the n outputs of its prompt this is.
        top_logprobs: per new token, as in :class:`RequestOutput`.
        prompt_logprobs: in the request's first event, where they are asked for.
        steering, coverage: per new token, as in :class:`RequestOutput`.
    """

    request_id: int
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    output: RequestOutput | None = None
    sample: int = 0
    top_logprobs: tuple[dict[int, float], ...] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    steering: tuple[Steering, ...] | None = None
    coverage: tuple[float, ...] | None = None

    @property
    def finish_reason(self) -> str | None:
        """Why the request ended; None while it goes on."""
        return None if self.output is None else self.output.finish_reason


@dataclass(frozen=True)
class StopRules:
    """Which tokens end a request.

    Args:
        token_ids: tokens that end the request.
        special: token -> the stop string that it is. Special tokens have no text to be found in.
    """

    token_ids: frozenset[int]
    special: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, params: SamplingParams, eos_token_ids: Sequence[int], vocab_size: int, tokenizer: Any
    ) -> StopRules:
        """The rules of a request."""
        eos = () if params.ignore_eos else eos_token_ids
        special = {
            i: s
            for i, s in (special_tokens(tokenizer) if params.stop else {}).items()
            if s in params.stop and i < vocab_size
        }
        token_ids = frozenset((*params.stop_token_ids, *special, *eos))
        outside = [i for i in params.stop_token_ids if i >= vocab_size]
        if outside:
            raise ValueError(
                f"stop_token_ids must be below the vocabulary's size {vocab_size}, got {outside[0]}"
            )
        return cls(token_ids, special)


@dataclass(eq=False)
class Siblings:
    """The outputs of one prompt, which runs once while one of them has a slot."""

    waiting: int
    """How many are not in slots yet."""
    prompt_logits: dict[str, Tensor] = field(default_factory=dict)
    """Of the prompt's last token, per role [1, V], once it has run and while any waits."""
    prompt_scores: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """What :attr:`Request.prompt_scores` were, as long."""


class KeptPrompt(NamedTuple):
    """What a free slot still holds."""

    roles: tuple[str, ...]
    token_ids: Sequence[int]


@dataclass(eq=False, repr=False)  # a prompt has no place in a message
class Request:
    """A request in the decoder; made by :class:`~proxytune_kernels.decoder.decoder.Decoder`.

    Args:
        request_id: unique in its decoder.
        index, prompt, prompt_token_ids: as in :class:`RequestOutput`.
        params: with a seed.
        rules: what ends it.
        tokenizer: decodes its output.
        constraints: what it asks of its draws.
        sample: as in :class:`RequestOutput`.
        siblings: the outputs of its prompt; None where it is the only one.
        speculation: counts its drafts; None where nothing is drafted.
        acceptance: of its drafts, as seen lately; None likewise.
        grammar: how far its text is in its grammar; None without one.
    """

    request_id: int
    index: int
    prompt: Any
    prompt_token_ids: Mapping[str, list[int]]
    params: SamplingParams
    rules: StopRules
    tokenizer: Any
    constraints: Constraints = field(default_factory=Constraints)
    sample: int = 0
    siblings: Siblings | None = None
    speculation: SpeculationStats | None = None
    acceptance: Acceptance | None = None
    grammar: GrammarState | None = None
    slot: int | None = None
    reused: int = 0
    """Tokens of its prompts that its slot held before it came."""
    prefilled: dict[str, int] = field(default_factory=dict)
    prompt_logits: dict[str, Tensor] = field(default_factory=dict)
    launched: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_scores: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float] | None] | None = None
    steering: list[Steering] = field(default_factory=list)
    coverage: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    status: int = 0
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(
            self.tokenizer, self.prompt_token_ids["base"], self.params.skip_special_tokens
        )
        self._stop = StopStrings(self.params.stop, self.params.include_stop_str_in_output)

    @cached_property
    def pairs(self) -> tuple[int, ...]:
        """Which further pairs steer it."""
        if len(self.prompt_token_ids) == 1:
            return ()  # the base runs alone
        return tuple(i for i, alpha in enumerate(self.params.pair_alphas) if alpha)

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles it runs in: the base alone where it is not steered."""
        steered = any(self.params.alphas) or any(self.params.pair_alphas)
        return tuple(self.prompt_token_ids) if steered else ("base",)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest of its roles' prompts."""
        return max(len(self.prompt_token_ids[role]) for role in self.roles)

    @property
    def scores_prompt(self) -> bool:
        """Whether it asks for its prompt's logprobs."""
        return self.params.prompt_logprobs >= 0

    @property
    def scored(self) -> int:
        """Of its prompt's last tokens, after how many a logprob is asked for; 1 if after none."""
        most = len(self.prompt_token_ids["base"])
        if not self.scores_prompt:
            return 1
        last = self.params.prompt_logprobs_last
        return min(most, last + 1) if last else most

    @property
    def keeps_prompt(self) -> bool:
        """Whether its prompt stays in its slot when it ends, and may be there before it comes.

        It does where logprobs are asked for behind the rest of a text: the next request is likely
        to go on from it. All roles have one prompt then.
        """
        return self.scores_prompt and self.params.prompt_logprobs_last > 0 and not self.siblings

    def shared(self, kept: KeptPrompt) -> int:
        """How many tokens of its prompts need not run where a slot holds those of another."""
        if kept.roles != self.roles:
            return 0
        prompt = self.prompt_token_ids["base"]
        pairs = zip(prompt[: -self.scored], kept.token_ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    @property
    def ready(self) -> bool:
        """Whether its prompts are in its slot, and its first token is drawn."""
        return self.launched > 0

    @property
    def left(self) -> int:
        """Tokens of the base's prompt that are not in its slot yet."""
        return len(self.prompt_token_ids["base"]) - self.prefilled.get("base", 0)

    def next_part(self, most: int) -> dict[str, list[int]]:
        """The next ``most`` tokens of each role's prompt that are not in the slot yet."""
        parts = {}
        for role in self.roles:
            start = self.prefilled.get(role, 0)
            parts[role] = self.prompt_token_ids[role][start : start + most]
        return {role: part for role, part in parts.items() if part}

    def extend(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        raw_logprobs: Sequence[float],
        num_kept: Sequence[int] = (),
        top_token_ids: Sequence[Sequence[int]] = (),
        top_logprobs: Sequence[Sequence[float]] = (),
        steering: Sequence[Sequence[float]] = (),
        coverage: Sequence[float] = (),
    ) -> StreamEvent:
        """Take drawn tokens, up to one that ends the request and sets :attr:`finish_reason`.

        Args:
            token_ids, logprobs, raw_logprobs: the tokens, and what goes with each.
            num_kept, top_token_ids, top_logprobs, steering, coverage: columns of the step's result,
                where it has them.
        """
        first = self.first_token is None
        if first:
            self.first_token = time.monotonic()
            self._take_prompt_logprobs()
        text, taken = "", 0
        for token_id in token_ids:
            taken += 1
            self.token_ids.append(token_id)
            text += self._text_of(token_id)
            if self.grammar is not None:
                self.grammar.take(token_id)
                if self.grammar.ended and self.finish_reason is None:
                    text += self._ended("stop", None)
            if self.finish_reason is not None:
                break
        self.logprobs += logprobs[:taken]
        self.raw_logprobs += raw_logprobs[:taken]
        self.coverage += coverage[:taken]
        self.text += text
        top = None
        if self.params.logprobs >= 0:
            columns = (logprobs, raw_logprobs, num_kept, top_token_ids, top_logprobs)
            entries: Iterable[Any] = zip_longest(token_ids[:taken], *(c[:taken] for c in columns))
            top = [self._likeliest(*entry) for entry in entries]
            self.top_logprobs += top
        steered = None
        if self.params.steering:
            steered = [
                Steering(base, expert, anti, proxy, int(rank), bool(changed), kl)
                for base, expert, anti, proxy, rank, changed, kl in steering[:taken]
            ]
            self.steering += steered
        known = tuple(coverage[:taken]) if coverage else None
        return self._event(text, token_ids[:taken], logprobs[:taken], top, steered, first, known)

    def _likeliest(
        self,
        token_id: int,
        logprob: float,
        raw_logprob: float,
        num_kept: int | None,
        top_token_ids: Sequence[int] | None,
        top_logprobs: Sequence[float] | None,
    ) -> dict[int, float]:
        """The log-probabilities that ``logprobs`` asks for at one position."""
        drawn = self.params.logprobs_mode == "drawn"
        found = {token_id: logprob if drawn else raw_logprob}
        count = min(self.params.logprobs, num_kept or 0) if drawn else self.params.logprobs
        for other, raw in zip((top_token_ids or ())[:count], top_logprobs or (), strict=False):
            if other >= 0 and other not in found:  # of a greedy draw there is no other
                ahead = raw - raw_logprob
                found[other] = logprob + ahead / self.params.temperature if drawn else raw
        return found

    def _take_prompt_logprobs(self) -> None:
        count = self.params.prompt_logprobs
        if count < 0 or self.prompt_logprobs is not None:
            return
        prompt = self.prompt_token_ids["base"]
        scored = sum(len(logprobs) for logprobs, _, _ in self.prompt_scores)
        self.prompt_logprobs = [None] * (len(prompt) - scored)
        following = iter(prompt[len(prompt) - scored :])
        for columns in self.prompt_scores:
            for logprob, ids, tops in zip(*(c.tolist() for c in columns), strict=True):
                found = {next(following): logprob}
                for other, top in zip(ids[:count], tops, strict=False):
                    if other >= 0:
                        found.setdefault(other, top)
                self.prompt_logprobs.append(found)
        self.prompt_scores.clear()

    def cancel(self) -> StreamEvent:
        """End the request where it is."""
        return self._cut("cancelled")

    def fail(self, error: str) -> StreamEvent:
        """End the request, which can't go on."""
        self.error = error
        return self._cut("error")

    def _cut(self, reason: str) -> StreamEvent:
        text = self._ended(reason, None)
        self.text += text
        return self._event(text, (), ())

    def _text_of(self, token_id: int) -> str:
        """The text that the last token lets out; it may be the end."""
        if token_id not in self.rules.token_ids:
            return self._read(token_id)
        reason = self.rules.special.get(token_id, token_id)
        text = self._ended("stop", reason)
        if self.stop_reason != reason or not self.params.include_stop_str_in_output:
            return text
        if isinstance(reason, str):
            return text + reason
        return text + self._detokenizer.push(token_id) + self._detokenizer.flush()

    def _read(self, token_id: int) -> str:
        piece = self._stopped(self._detokenizer.push(token_id))
        if self.finish_reason is None:
            if self._may_stop and self._stop.completes(self._detokenizer.waiting()):
                piece += self._stopped(self._detokenizer.flush())
            elif len(self.token_ids) >= self.params.max_tokens:
                piece += self._ended("length", None)
        return piece

    @property
    def _may_stop(self) -> bool:
        """Whether a stop string counts: it must lie in the text behind min_tokens tokens."""
        return len(self.token_ids) > self.params.min_tokens

    def _stopped(self, piece: str) -> str:
        """What of a piece can go out; ends the request where a stop string is complete."""
        if not self._may_stop:
            return piece
        piece, stop = self._stop.push(piece)
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        return piece

    def _ended(self, reason: str, stop_reason: int | str | None) -> str:
        """End the request, by the stop string that the held text has if it has one; that text."""
        piece = self._stopped(self._detokenizer.flush())
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason = reason, stop_reason
            piece += self._stop.flush()
        return piece

    def _event(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        top_logprobs: Sequence[dict[int, float]] | None = None,
        steering: Sequence[Steering] | None = None,
        first: bool = False,
        coverage: tuple[float, ...] | None = None,
    ) -> StreamEvent:
        return StreamEvent(
            self.request_id,
            self.index,
            text,
            tuple(token_ids),
            tuple(logprobs),
            None if self.finish_reason is None else self._output(self.finish_reason),
            self.sample,
            None if top_logprobs is None else tuple(top_logprobs),
            self.prompt_logprobs if first else None,
            None if steering is None else tuple(steering),
            coverage,
        )

    def _output(self, finish_reason: str) -> RequestOutput:
        assert self.params.seed is not None
        now = time.monotonic()
        queued, first = self.started or now, self.first_token or self.submitted
        return RequestOutput(
            index=self.index,
            prompt=self.prompt,
            prompt_token_ids=dict(self.prompt_token_ids),
            token_ids=self.token_ids,
            text=self.text,
            logprobs=self.logprobs,
            raw_logprobs=self.raw_logprobs,
            finish_reason=finish_reason,
            stop_reason=self.stop_reason,
            seed=self.params.seed,
            status=self.status,
            metrics=RequestMetrics(
                queued - self.submitted, first - self.submitted, now - self.submitted
            ),
            speculation=self.speculation,
            top_logprobs=self.top_logprobs if self.params.logprobs >= 0 else None,
            prompt_logprobs=self.prompt_logprobs,
            steering=self.steering if self.params.steering else None,
            coverage=self.coverage or None,
            error=self.error,
            sample=self.sample,
        )
