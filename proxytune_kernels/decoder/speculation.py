"""Speculative decoding: what is asked for, what came of it, and how many drafts pay.

The expert, which has to run anyway, drafts; base and anti then score a block of drafts in one
forward each. The emitted tokens are the target's: docs/contracts.md, Speculative verification.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low

import torch
from torch import Tensor

from proxytune_kernels.ops import VERIFY_MODES

DRAFTERS = ("expert", "prompt_lookup")
_MAX_DRAFTS = 32

# What a request is taken to accept before anything is known, worth this many drafts of its own.
_PRIOR_ACCEPTANCE, _PRIOR_WEIGHT = 0.8, 4.0
_MEMORY = 64.0
"""Drafts that the estimate of acceptance looks back on, about: texts change their kind."""
_FIRST_DRAFTS = 4
_MARGIN = 1.02
"""How much better than plain decoding a round must promise to be."""
_SHORTEST_REST, _LONGEST_REST = 16, 128
"""Plain steps between two rounds that ask whether drafts pay by now: each time twice as many."""
_PROBE_DRAFTS = 2
_TIMES = 5
_MAX_NGRAM, _MIN_NGRAM = 3, 2
"""Tokens that must be equal for a draft from the text: three where there are such, at least two."""


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How a decoder drafts and verifies.

    Args:
        drafter: ``"expert"`` drafts token by token; ``"prompt_lookup"`` takes what followed the
            same tokens earlier in the text, which costs no forward.
        mode: ``"coupled"``: a seeded request's tokens are plain decoding's, whatever is drafted.
            ``"rejection"``: accepts the most; the law of the tokens is the same, the tokens are
            not, and they depend on how many are drafted.
        max_drafts: drafts of a round at most, in [1, 32].
        adaptive: draft as many as measured times and acceptance say pays, none where plain
            decoding is faster; else always ``max_drafts``.

    Raises:
        ValueError: names the argument, what it got and what it wanted.

    Source: Leviathan et al. 2023, arXiv 2211.17192; Daliri, Musco and Suresh 2024,
    arXiv 2408.07978; docs/contracts.md.
    """

    drafter: str = "expert"
    mode: str = "coupled"
    max_drafts: int = 16
    adaptive: bool = True

    def __post_init__(self) -> None:
        for name, known in (("drafter", DRAFTERS), ("mode", VERIFY_MODES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        drafts = self.max_drafts
        if (
            isinstance(drafts, bool)
            or not isinstance(drafts, int)
            or not 1 <= drafts <= _MAX_DRAFTS
        ):
            raise ValueError(f"max_drafts must be an integer in [1, {_MAX_DRAFTS}], got {drafts!r}")
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive must be True or False, got {self.adaptive!r}")


@dataclass
class SpeculationStats:
    """What speculation did for a request.

    Args:
        drafted: drafts that were verified.
        accepted: those that were kept.
        emitted_per_round: tokens of each round, the recovered or bonus one included; a plain step
            is no round.
    """

    drafted: int = 0
    accepted: int = 0
    emitted_per_round: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were kept; NaN where there were none."""
        return self.accepted / self.drafted if self.drafted else float("nan")


class Acceptance:
    """The probability that a draft is kept if all drafts before it were, as lately seen."""

    def __init__(self, prior: Acceptance | None = None) -> None:
        rate = _PRIOR_ACCEPTANCE if prior is None else prior.rate
        self._accepted, self._tried = rate * _PRIOR_WEIGHT, _PRIOR_WEIGHT

    @property
    def rate(self) -> float:
        """In [0, 1]."""
        return self._accepted / self._tried

    def observe(self, drafted: int, accepted: int) -> None:
        """Count a round. Drafts behind the first that was refused were never tried."""
        tried = min(accepted + 1, drafted)
        keep = 1 - tried / _MEMORY if tried < _MEMORY else 0.0
        if self._tried > _MEMORY:
            self._accepted *= keep
            self._tried *= keep
        self._accepted += accepted
        self._tried += tried

    def tokens(self, drafts: int) -> float:
        """Expected tokens of a round with so many drafts: 1 + a + ... + a^drafts."""
        return sum(self.rate**j for j in range(drafts + 1))


class StepTimes:
    """Seconds of a step by its number of rows and of drafts (0 is a plain step)."""

    def __init__(self) -> None:
        # rows -> drafts -> the last measurements.
        self._seen: dict[int, dict[int, deque[float]]] = {}

    def observe(self, rows: int, drafts: int, seconds: float) -> None:
        """Add a measurement."""
        times = self._seen.setdefault(rows, {}).setdefault(drafts, deque(maxlen=_TIMES))
        times.append(seconds)

    def forget_rounds(self) -> None:
        """Keep the plain steps alone."""
        for times in self._seen.values():
            for drafts in [d for d in times if d]:
                del times[drafts]

    def estimates(self, rows: int, most: int) -> list[float] | None:
        """Seconds of steps with 0 to ``most`` drafts; None before both kinds have been timed.

        The median where there are measurements, and a straight line between and beyond them. A
        number of rows that lacks one kind takes the ratios of the nearest number that has both.
        """
        both = [r for r, times in self._seen.items() if 0 in times and len(times) > 1]
        if not both:
            return None
        like = min(both, key=lambda r: abs(r - rows))
        shape = _line({d: median_low(t) for d, t in self._seen[like].items()}, most)
        own = self._seen.get(rows, {})
        if like == rows or 0 not in own:
            return shape
        scale = median_low(own[0]) / shape[0]
        return [seconds * scale for seconds in shape]


def _line(known: dict[int, float], most: int) -> list[float]:
    """Values at 0 to ``most``: the known ones, else on the line through the nearest two."""
    values = []
    for place in range(most + 1):
        if place in known:
            values.append(known[place])
            continue
        low, high = sorted(sorted(known, key=lambda d: abs(d - place))[:2])
        slope = (known[high] - known[low]) / (high - low)
        # Measured times are noisy and the line may fall; more drafts never take less time.
        values.append(known[low] + max(slope, 0.0) * (place - low))
    return values


class DraftController:
    """Chooses how many drafts the next round has: what promises the most tokens a second.

    In coupled mode the choice changes no token, so it may depend on the clock.

    Args:
        speculation: what is asked for.
        captured: rounds are captured, so they are of few sizes: powers of two, and the largest;
            that one alone where the number is fixed. Drafts that a row can't use are not verified.
    """

    def __init__(self, speculation: Speculation, captured: bool = False) -> None:
        self._speculation = speculation
        most = speculation.max_drafts
        sizes = [n for n in range(1, most) if n.bit_count() == 1 or not captured]
        fixed = captured and not speculation.adaptive
        self.sizes = [0, *([] if fixed else sizes), most]
        """How many drafts a round can have, 0 for a plain step among them; in order."""
        self._times = StepTimes()
        self._overall = Acceptance()
        self._untimed = 0
        self._rest = 0
        self._next_rest = _SHORTEST_REST
        self._probing = False

    def new_request(self) -> Acceptance:
        """An estimate for a new request, from what the others accepted.

        Its text may be of another kind, so a round is tried again soon.
        """
        self._rest = min(self._rest, _SHORTEST_REST)
        self._next_rest = _SHORTEST_REST
        return Acceptance(self._overall)

    def choose(self, requests: Sequence[tuple[Acceptance, int]]) -> int:
        """Drafts of the next round; 0 is a plain step.

        Args:
            requests: of each row, its acceptance and the drafts it can use at most.
        """
        limit = self._size(max((n for _, n in requests), default=0))
        if limit == 0 or not self._speculation.adaptive:
            return limit
        if self._rest > 0:
            self._rest -= 1
            return 0
        seconds = self._times.estimates(len(requests), limit)
        if seconds is None:
            # A plain step and a round, to see what they take.
            self._untimed += 1
            return min(self._size(_FIRST_DRAFTS), limit) if self._untimed % 2 == 0 else 0
        if self._probing:
            self._probing = False
            # The rounds before may have been timed at a bad moment.
            self._times.forget_rounds()
            return min(self._size(_PROBE_DRAFTS), limit)
        promise = {
            drafts: sum(acceptance.tokens(min(drafts, can)) for acceptance, can in requests)
            / max(seconds[drafts], 1e-9)
            for drafts in self.sizes
            if drafts <= limit
        }
        best = max(promise, key=promise.__getitem__)
        if promise[best] > _MARGIN * promise[0]:
            self._next_rest = _SHORTEST_REST
            return best
        self._rest, self._probing = self._next_rest, True
        self._next_rest = min(2 * self._next_rest, _LONGEST_REST)
        return 0

    def _size(self, drafts: int) -> int:
        """The smallest size for so many drafts, or the largest there is."""
        return next((size for size in self.sizes if size >= drafts), self.sizes[-1])

    def observe_time(self, rows: int, drafts: int, seconds: float) -> None:
        """A step of so many rows and drafts took ``seconds``."""
        self._times.observe(rows, drafts, seconds)

    def observe(self, acceptance: Acceptance, drafted: int, accepted: int) -> None:
        """Of a row's drafts so many were kept."""
        if self._speculation.drafter == "prompt_lookup":
            # A round without a draft at hand is no better than one whose draft was refused.
            drafted = max(drafted, 1)
        acceptance.observe(drafted, accepted)
        self._overall.observe(drafted, accepted)


class History:
    """The text of each slot so far, base's prompt and output, on the device, to draft from.

    Drafts that cost no forward: what followed the same tokens earlier in the text.

    Args:
        max_batch_size: number of slots.
        capacity: tokens that a slot can hold, drafts included.
        vocab_size: ids from here on are not drafted: a prompt may hold some that only the base has.
        device: where the drafts are wanted.

    Source: Saxena 2023, prompt lookup decoding; Yang et al. 2023, arXiv 2304.04487.
    """

    def __init__(
        self, max_batch_size: int, capacity: int, vocab_size: int, device: torch.device
    ) -> None:
        self._vocab_size = vocab_size
        self.token_ids = torch.full((max_batch_size, capacity), -1, device=device)
        self.lengths = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self._span = torch.arange(capacity, device=device)

    @staticmethod
    def numbers(prompts: Sequence[list[int]]) -> list[Tensor]:
        """What :meth:`start` wants of its device, on the host: tokens [n, q] and lengths [n]."""
        width = max(map(len, prompts), default=0)
        padded = [[*prompt, *[-1] * (width - len(prompt))] for prompt in prompts]
        lengths = [len(prompt) for prompt in prompts]
        return [torch.tensor(x, dtype=torch.int64) for x in (padded, lengths)]

    def start(self, slots: Tensor, token_ids: Tensor, lengths: Tensor, first: Tensor) -> None:
        """Begin in slots [n] with prompts (:meth:`numbers`) and the first output tokens [n]."""
        self.token_ids.index_fill_(0, slots, -1)
        self.token_ids[:, : token_ids.shape[1]].index_copy_(0, slots, token_ids)
        self.token_ids.index_put_((slots, lengths), first)
        self.lengths.index_copy_(0, slots, lengths + 1)

    def move(self, source: int, target: int) -> None:
        """Move what a slot holds to another."""
        self.token_ids[target].copy_(self.token_ids[source])
        self.lengths[target].copy_(self.lengths[source])

    def state(self) -> list[Tensor]:
        """What a step changes; a text past its length is never read."""
        return [self.lengths]

    def append(self, token_ids: Tensor, counts: Tensor) -> None:
        """Add the first ``counts`` [B] of the tokens [B, q] to the first B slots."""
        rows, width = token_ids.shape
        places = self.lengths[:rows, None] + self._span[:width]
        # A slot that nobody runs in stays put at the end.
        places = places.clamp(max=self._span.shape[0] - 1)
        self.token_ids[:rows].scatter_(1, places, token_ids)
        self.lengths[:rows] += counts

    def lookup(self, rows: int, width: int) -> Tensor:
        """Drafts int64 [B, width] for the first B slots, -1 where there are none.

        They are what followed the latest earlier occurrence of a row's last three tokens, or of
        its last two.
        """
        history, lengths = self.token_ids[:rows], self.lengths[:rows, None]
        matched = torch.zeros_like(history)
        unbroken = self._span < lengths - 1
        for back in range(_MAX_NGRAM):
            last = history.gather(1, (lengths - 1 - back).clamp(min=0))
            shifted = history.roll(back, 1)
            # Rolled tokens come from the end of the row: no n-gram begins before the text.
            unbroken = unbroken & (shifted == last) & (self._span >= back) & (lengths > back)
            matched += unbroken
        # The longest match, among those the latest.
        rank = matched * self._span.shape[0] + self._span
        end = rank.argmax(1, keepdim=True)
        places = end + 1 + self._span[:width]
        drafts = history.gather(1, places.clamp(max=self._span.shape[0] - 1))
        found = (matched.gather(1, end) >= _MIN_NGRAM) & (places < lengths)
        # Behind an id that can't be drafted there is no draft either.
        found &= (drafts < self._vocab_size).cumprod(1) > 0
        return torch.where(found, drafts, -1)
