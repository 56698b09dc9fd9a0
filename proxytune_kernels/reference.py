"""The truth: the numerical contract in plain PyTorch, short enough to check against docs/math.md.

Everything here is slow and whole: it sorts the vocabulary, and holds the [B, V] temporaries that
the kernels exist to avoid. Combined logits are fp32, as the contract defines them (fp64 where the
inputs are fp64); all that follows is fp64 and int64.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from proxytune_kernels import rng
from proxytune_kernels.heads import Head
from proxytune_kernels.params import Edits, RowParams

MASS_ONE = 2.0**44
"""Mass of the likeliest token: masses are integers, so their sums don't depend on the order."""

STATUS_NAN, STATUS_POSITIVE_INF, STATUS_EMPTY, STATUS_BAD_PARAMS = 1, 2, 4, 8

_SMALLEST_NORMAL = 2.0**-126


# The fields of what an operator returns, with their dtypes and shapes: ops/table.py derives its
# schemas, fakes and checks from these.


class TopLogprobs(NamedTuple):
    """The n likeliest tokens of each row: x descending, then id ascending, whatever the filters."""

    token_ids: Annotated[Tensor, torch.int64, "B", "n"]
    """int64 [B, n]: -1 where fewer tokens are left."""
    logprobs: Annotated[Tensor, torch.float32, "B", "n"]
    """fp32 [B, n]: their raw logprobs; NaN where the token is -1."""


ATTRIBUTION_COLUMNS = 7


class Attribution(NamedTuple):
    """What steering did to each row, of one token there: the one drawn, or one that was given.

    Probabilities are at temperature 1 and without filters; NaN where the row has no such token, and
    those of the pair also where alpha is 0 or there is no pair.
    """

    columns: Tensor
    """fp32 [B, 7]: what follows, in this order."""

    @property
    def base(self) -> Tensor:
        """fp32 [B]: the token's probability under the base."""
        return self.columns[:, 0]

    @property
    def expert(self) -> Tensor:
        """fp32 [B]: under the expert."""
        return self.columns[:, 1]

    @property
    def anti(self) -> Tensor:
        """fp32 [B]: under the anti-expert."""
        return self.columns[:, 2]

    @property
    def proxy(self) -> Tensor:
        """fp32 [B]: under the combined logits x, bias and mask applied."""
        return self.columns[:, 3]

    @property
    def base_rank(self) -> Tensor:
        """int32 [B]: its place in the base's order, 1 the likeliest; 0 where there is no token."""
        return self.columns[:, 4].int()

    @property
    def changed(self) -> Tensor:
        """bool [B]: whether the likeliest token of x is another than the base's."""
        return self.columns[:, 5].bool()

    @property
    def kl(self) -> Tensor:
        """fp32 [B]: the Kullback-Leibler divergence of x from the base, in nats."""
        return self.columns[:, 6]


class SampleOutput(NamedTuple):
    """What ``sample`` returns, one value per row."""

    token_ids: Annotated[Tensor, torch.int64, "B"]
    """int64 [B]: the token drawn; -1 where nothing was left or a parameter was out of range."""
    logprobs: Annotated[Tensor, torch.float32, "B"]
    """fp32 [B]: log of the probability it was drawn with; NaN where the token is -1."""
    raw_logprobs: Annotated[Tensor, torch.float32, "B"]
    """fp32 [B]: its log-softmax at temperature 1, no filter; NaN where the token is -1."""
    num_kept: Annotated[Tensor, torch.int32, "B"]
    """int32 [B]: size of the kept set."""
    status: Annotated[Tensor, torch.int32, "B"]
    """int32 [B]: 0, or the sum of 1 (NaN masked), 2 (+inf), 4 (nothing left), 8 (bad parameter)."""
    top: TopLogprobs | None = None
    """The likeliest tokens, where they were asked for."""
    attribution: Annotated[Attribution | None, torch.float32, "B", "a"] = None
    """What steering did, where it was asked for."""


class VerifyOutput(NamedTuple):
    """What ``verify`` returns."""

    token_ids: Annotated[Tensor, torch.int64, "B", "k + 1"]
    """int64 [B, k + 1]: the tokens to emit, -1 past the last."""
    num_accepted: Annotated[Tensor, torch.int32, "B"]
    """int32 [B]: how many of them are draft tokens."""
    logprobs: Annotated[Tensor, torch.float32, "B", "k + 1"]
    """fp32 [B, k + 1]: log of the target's probability of each; NaN where the token is -1."""
    raw_logprobs: Annotated[Tensor, torch.float32, "B", "k + 1"]
    """fp32 [B, k + 1]: log-softmax of the target at temperature 1, no filter, at each; NaN where
    the token is -1."""
    status: Annotated[Tensor, torch.int32, "B"]
    """int32 [B]: as in :class:`SampleOutput`, over the positions that were used."""


def fma32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fp32 ``a * b + c`` with one rounding, but for double rounding (about one case in 2^29)."""
    return (a.double() * b.double() + c.double()).float()


def logits(head: Head, vocab_size: int) -> Tensor:
    """A role's logits from its final hidden states, [B, vocab_size]: fp64, rounded to fp32 once."""
    wide = head.hidden.double() @ head.weight[:vocab_size].double().T
    if head.bias is not None:
        wide = wide + head.bias[:vocab_size]
    if head.logit_scale is not None:
        wide = wide * head.logit_scale
    if head.soft_cap is not None:
        wide = head.soft_cap * (wide / head.soft_cap).tanh()
    return wide.float()


def combine(
    base: Tensor,
    expert: Tensor | None,
    anti: Tensor | None,
    alpha: Tensor,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    edits: Edits | None = None,
) -> Tensor:
    """Combined logits ``fma(alpha, expert - anti, base)``, [B, V], NaN and inf not yet dealt with.

    ``-inf`` in base stays ``-inf`` whatever the other two hold, and alpha = 0 gives base.
    """
    double = base.dtype == torch.float64
    wide = torch.float64 if double else torch.float32
    x = masked = base.to(wide)
    if expert is not None and anti is not None:
        difference = expert.to(wide) - anti.to(wide)
        a = alpha[:, None].to(wide)
        steered = a * difference + x if double else fma32(a, difference, x)
        x = torch.where(a == 0, x, steered)
    if bias is not None:
        x = x + bias
    x = x.masked_fill(masked == -torch.inf, -torch.inf)
    if allowed_mask is not None:
        x = x.masked_fill(~unpack_mask(allowed_mask, x.shape[-1]), -torch.inf)
    return x if edits is None else edit(x, edits)


def edit(x: Tensor, edits: Edits) -> Tensor:
    """Combined logits [B, V] with biases and penalties: docs/contracts.md, Edits."""
    ids, counts, in_prompt, bits = edits.entries.unbind(-1)
    inside = (ids >= 0) & (ids < x.shape[-1])
    at = torch.where(inside, ids, 0).long()
    given = x.gather(-1, at)
    repetition, presence, frequency = edits.penalties.to(x.dtype)[:, :, None].unbind(1)
    y = given + bits.contiguous().view(torch.float32)
    seen = counts > 0
    repeated = torch.where(y > 0, y / repetition, y * repetition)
    y = torch.where(seen | (in_prompt != 0), repeated, y)
    y = torch.where(seen, y - frequency * counts - presence, y)
    # A token that is masked stays so.
    change = inside & (given > -torch.inf)
    row = torch.arange(len(x), device=x.device)[:, None].expand_as(at)
    result = x.clone()
    result[row[change], at[change]] = y[change]
    return result


def unpack_mask(allowed_mask: Tensor, vocab_size: int) -> Tensor:
    """bool [B, V] of a packed mask, int32 [B, ceil(V / 32)]; token i: word i >> 5, bit i & 31."""
    shifts = torch.arange(32, device=allowed_mask.device)
    bits = (allowed_mask.long()[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :vocab_size].bool()


class Distribution(NamedTuple):
    """A batch of filtered distributions over the vocabulary; tensors [B, V], by token id."""

    shifted: Tensor
    """fp64 [B, V]: x - max, -inf where masked."""
    scaled: Tensor
    """fp64 [B, V]: (x - max) / T; at temperature 0 just x - max."""
    kept: Tensor
    """bool [B, V]: the kept set."""
    mass: Tensor
    """int64 [B, V]: 2^44 * exp(scaled), rounded; 0 outside the kept set."""
    order: Tensor
    """int64 [B, V], by rank: token ids, x descending, then id ascending."""
    status: Tensor
    """int32 [B]."""

    @property
    def total(self) -> Tensor:
        """int64 [B]: mass of the kept set."""
        return self.mass.sum(-1)

    def logprobs(self) -> Tensor:
        """fp64 [B, V]: log of the probability of each token; -inf outside the kept set."""
        log_total = (self.total.double() / MASS_ONE).log()[:, None]
        return (self.scaled - log_total).masked_fill(~self.kept, -torch.inf)

    def raw_logprobs(self) -> Tensor:
        """fp64 [B, V]: log-softmax of x at temperature 1, no filter."""
        return self.shifted.log_softmax(-1)


def _bad_params(params: RowParams) -> Tensor:
    good = params.alpha.isfinite() & params.temperature.isfinite() & (params.temperature >= 0)
    good &= (params.top_k >= -1) & (params.top_p > 0) & (params.top_p <= 1)
    good &= (params.min_p >= 0) & (params.min_p <= 1) & (params.position >= 0)
    return ~(good & (params.filter_order >= 0) & (params.filter_order <= 2))


def mass_target(top_p: Tensor, mass: Tensor) -> Tensor:
    """``ceil(p * mass)`` with p cut to 32 fractional bits, at least 1: int64, exact.

    ``mass`` is below 2^63, so ``p * mass`` is summed from 32-bit halves.
    """
    p = (top_p.double() * 2.0**32).long()
    low, high = p * (mass & 0xFFFFFFFF), p * (mass >> 32)
    # low may wrap past 2^63: its bits are right, the shift must not carry the sign.
    low_high = (low >> 32) & 0xFFFFFFFF
    return (high + low_high + ((low & 0xFFFFFFFF) != 0)).clamp(min=1)


class Prefix(NamedTuple):
    """A prefix of each row's order, int64 [B] each."""

    length: Tensor
    """Its number of tokens."""
    mass: Tensor
    """Their mass."""
    cut: Tensor
    """Where it ends: the rank of its end here, an order key where several ranks hold the row."""

    def where(self, condition: Tensor, other: Prefix) -> Prefix:
        """This prefix where the condition holds, else the other."""
        return Prefix(*(torch.where(condition, a, b) for a, b in zip(self, other, strict=True)))

    def shorter(self, other: Prefix) -> Prefix:
        """The shorter of two prefixes; this one where they are equal."""
        return self.where(self.length <= other.length, other)


class Order(Protocol):
    """Rows' tokens, x descending, then id ascending, as far as the filters ask for them."""

    whole: Prefix
    """All tokens that are not masked."""
    likely: Prefix
    """The tokens that min_p keeps."""

    def first(self, count: Tensor) -> Prefix:
        """The first tokens of each row, int64 [B]."""

    def reaching(self, mass: Tensor) -> Prefix:
        """The shortest prefix of at least this mass, int64 [B]."""


def kept_prefix(order: Order, params: RowParams) -> Prefix:
    """The kept set, a prefix: docs/contracts.md, Selection. The policy of the filters, whole."""
    whole, likely = order.whole, order.likely
    k = torch.where(params.top_k > 0, params.top_k.long(), whole.length)
    by_k = order.first(k.minimum(whole.length))
    kept = by_k.shorter(likely)
    nucleus = params.top_p < 1
    if bool(nucleus.any()):
        # What top_p's mass is a share of, by FILTER_ORDERS.
        vllm, joint = params.filter_order == 0, params.filter_order == 2
        share = kept.where(vllm, whole.where(joint, by_k))
        target = torch.where(nucleus, mass_target(params.top_p, share.mass), whole.mass)
        kept = kept.shorter(order.reaching(target).where(nucleus, whole))
    return kept


class _Sorted:
    """:class:`Order` of rows whose tokens are sorted.

    Args:
        mass: int64 [B, V], by rank.
        scaled: fp64 [B, V], by rank: (x - max) / T.
        count: int64 [B]: tokens that are not masked.
        min_p: [B].
    """

    def __init__(self, mass: Tensor, scaled: Tensor, count: Tensor, min_p: Tensor) -> None:
        self._cumulative = mass.cumsum(-1)
        self.whole = self.first(count)
        likely = (scaled >= min_p.double().log()[:, None]).sum(-1).clamp(min=1)
        self.likely = self.first(torch.where(min_p > 0, likely, count))

    def first(self, count: Tensor) -> Prefix:
        last = (count - 1).clamp(0, self._cumulative.shape[-1] - 1)
        mass = self._cumulative.gather(-1, last[:, None])[:, 0]
        return Prefix(count, mass, count)

    def reaching(self, mass: Tensor) -> Prefix:
        return self.first((self._cumulative < mass[:, None]).sum(-1) + 1)


def distribution(x: Tensor, params: RowParams) -> Distribution:
    """Filter combined logits: docs/contracts.md, Selection.

    Args:
        x: combined logits, fp32 or fp64 [B, V].
        params: one value per row.
    """
    nan = x.isnan()
    x = x.masked_fill(nan, -torch.inf)
    infinite = x == torch.inf
    positive = infinite.any(-1)
    x = torch.where(positive[:, None], torch.where(infinite, 0.0, -torch.inf), x).double()
    bad = _bad_params(params)
    x = x.masked_fill(bad[:, None], -torch.inf)
    count = (x > -torch.inf).sum(-1)

    top = x.amax(-1, keepdim=True)
    shifted = torch.where(x > -torch.inf, x - top, -torch.inf)
    greedy = params.temperature < _SMALLEST_NORMAL
    scaled = shifted / torch.where(greedy, 1.0, params.temperature.double())[:, None]
    mass = (MASS_ONE * scaled.exp()).round().long()

    order = x.sort(dim=-1, descending=True, stable=True).indices
    ranked = _Sorted(mass.gather(-1, order), scaled.gather(-1, order), count, params.min_p)
    size = kept_prefix(ranked, params).length
    size = torch.where(greedy, count.clamp(max=1), size.minimum(count))
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(x.shape[-1], device=x.device).expand_as(order)
    )
    kept = rank < size[:, None]

    status = STATUS_NAN * (nan.any(-1) & ~bad) + STATUS_POSITIVE_INF * (positive & ~bad)
    status = status + STATUS_EMPTY * ((count == 0) & ~bad) + STATUS_BAD_PARAMS * bad
    return Distribution(shifted, scaled, kept, mass * kept, order, status.int())


def scores(d: Distribution, params: RowParams, noise_stream: int) -> Tensor:
    """What the draw is the argmax of: ``(x - max) / T + g`` on the kept set, fp64 [B, V]."""
    ids = torch.arange(d.kept.shape[-1], device=d.kept.device)
    noise = rng.gumbel(params.seed, params.position, ids, noise_stream)
    return (d.scaled + noise).masked_fill(~d.kept, -torch.inf)


def _argmax(score: Tensor) -> Tensor:
    """Argmax, lowest id on ties; -1 where all are -inf: int64 [B]."""
    best, index = score.sort(dim=-1, descending=True, stable=True)
    return torch.where(best[:, 0] > -torch.inf, index[:, 0], -1)


def _at(values: Tensor, token_ids: Tensor) -> Tensor:
    """fp32 values at the tokens, NaN where the token is -1; [B, V], [B] -> [B]."""
    value = values.gather(-1, token_ids.clamp(min=0)[:, None])[:, 0]
    return value.masked_fill(token_ids < 0, torch.nan).float()


def _likeliest(d: Distribution, number: int) -> TopLogprobs:
    token_ids = d.order[:, :number]
    logprobs = d.raw_logprobs().gather(-1, token_ids).float()
    masked = d.shifted.gather(-1, token_ids) == -torch.inf
    missing = (0, number - token_ids.shape[-1])
    return TopLogprobs(
        pad(token_ids.masked_fill(masked, -1), missing, value=-1),
        pad(logprobs.masked_fill(masked, torch.nan), missing, value=torch.nan),
    )


def sample(
    x: Tensor, params: RowParams, noise_stream: str = "sample", top_logprobs: int = 0
) -> SampleOutput:
    """Draw one token per row from combined logits x, fp32 or fp64 [B, V].

    With ``top_logprobs`` above 0, ``top`` holds that many of the likeliest tokens.
    """
    d = distribution(x, params)
    token_ids = _argmax(scores(d, params, rng.STREAMS[noise_stream]))
    return SampleOutput(
        token_ids,
        _at(d.logprobs(), token_ids),
        _at(d.raw_logprobs(), token_ids),
        d.kept.sum(-1).int(),
        d.status,
        _likeliest(d, top_logprobs) if top_logprobs else None,
    )


def attribute(
    base: Tensor, expert: Tensor | None, anti: Tensor | None, alpha: Tensor, x: Tensor,
    token_ids: Tensor,
) -> Attribution:  # fmt: skip
    """What steering did to rows, of tokens int64 [B]: docs/contracts.md, Attribution.

    Args:
        base, expert, anti: logits [B, V].
        alpha: [B].
        x: their combination, bias and mask applied.
        token_ids: -1 where a row has none.
    """
    free = RowParams.make(len(x), device=x.device)
    proxy, own = distribution(x, free), distribution(base, free)
    lost = (token_ids < 0) | (token_ids >= x.shape[-1]) | (proxy.status >= STATUS_EMPTY)
    token_ids = torch.where(lost, -1, token_ids)
    unsteered = torch.where(alpha == 0, -1, token_ids)

    def probability(logits: Tensor | None, ids: Tensor) -> Tensor:
        if logits is None:
            return torch.full_like(x[:, 0], torch.nan).float()
        return _at(distribution(logits, free).raw_logprobs().exp(), ids)

    p, q = proxy.raw_logprobs(), own.raw_logprobs()
    kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1).clamp(min=0)
    rank = 1 + (own.order == token_ids[:, None]).long().argmax(-1)
    columns = (
        probability(base, token_ids),
        probability(expert, unsteered),
        probability(anti, unsteered),
        _at(p.exp(), token_ids),
        torch.where(lost, 0, rank),
        (proxy.order[:, 0] != own.order[:, 0]) & ~lost,
        kl.masked_fill(lost, torch.nan),
    )
    return Attribution(torch.stack([column.float() for column in columns], 1))


def score(x: Tensor, token_ids: Tensor) -> Tensor:
    """Raw logprobs of given tokens: x [B, T, V], token_ids int64 [B, T] -> fp32 [B, T].

    A token outside [0, V) gives NaN, a masked one -inf.
    """
    rows = x.reshape(-1, x.shape[-1])
    params = RowParams.make(len(rows), device=x.device)
    ids = token_ids.reshape(-1)
    inside = (ids >= 0) & (ids < x.shape[-1])
    raw = distribution(rows, params).raw_logprobs()
    return _at(raw, torch.where(inside, ids, -1)).reshape(token_ids.shape)


def verify(
    x: Tensor,
    draft_token_ids: Tensor,
    params: RowParams,
    mode: str = "coupled",
    draft_x: Tensor | None = None,
) -> VerifyOutput:
    """Check drafted tokens against the target: docs/contracts.md, Speculative verification.

    Args:
        x: the target's combined logits [B, k + 1, V].
        draft_token_ids: int64 [B, k]; -1 where a row has fewer drafts.
        params: one value per request; ``position`` is that of the first drafted token.
        mode: ``"coupled"`` or ``"rejection"``.
        draft_x: the drafter's logits [B, k, V], for rejection.
    """
    batch, steps, _ = x.shape
    tokens = torch.full((batch, steps), -1, device=x.device)
    logprobs = torch.full((batch, steps), torch.nan, device=x.device)
    raw_logprobs = logprobs.clone()
    accepted = torch.zeros(batch, dtype=torch.int32, device=x.device)
    status = torch.zeros(batch, dtype=torch.int32, device=x.device)
    active = torch.ones(batch, dtype=torch.bool, device=x.device)
    for j in range(steps):
        at = params._replace(position=params.position + j)
        target = distribution(x[:, j], at)
        drafted = draft_token_ids[:, j] if j < steps - 1 else tokens.new_full((batch,), -1)
        if mode == "coupled":
            emitted = _argmax(scores(target, at, rng.STREAMS["sample"]))
            agrees = (emitted == drafted) & (emitted >= 0)
        else:
            drafter = None if j == steps - 1 or draft_x is None else draft_x[:, j]
            emitted, agrees = _reject(target, drafter, drafted, at, "bonus" if j else "sample")
        tokens[:, j] = torch.where(active, emitted, tokens[:, j])
        for out, values in ((logprobs, target.logprobs()), (raw_logprobs, target.raw_logprobs())):
            out[:, j] = torch.where(active, _at(values, emitted), out[:, j])
        status |= torch.where(active, target.status, 0)
        active &= agrees
        accepted += active.int()
    return VerifyOutput(tokens, accepted, logprobs, raw_logprobs, status)


def _reject(
    target: Distribution, draft_x: Tensor | None, drafted: Tensor, params: RowParams,
    noise_stream: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rejection at one position: tokens to emit and whether each is the draft, [B], [B].

    ``noise_stream`` is what rows without a draft here are drawn with.
    """
    free = _argmax(scores(target, params, rng.STREAMS[noise_stream]))
    if draft_x is None:
        return free, torch.zeros_like(drafted, dtype=torch.bool)
    draft = distribution(draft_x, params)
    p, q = target.logprobs().exp(), draft.logprobs().exp()
    q = torch.where(draft.kept, q, 0.0)
    inside = (drafted >= 0) & (drafted < p.shape[-1])
    at = torch.where(inside, drafted, 0)[:, None]
    u = rng.uniform(params.seed, params.position, at, rng.STREAMS["accept"])[:, 0].double()
    p_draft, q_draft = p.gather(-1, at)[:, 0], q.gather(-1, at)[:, 0]
    agrees = inside & (p_draft > 0) & (u * q_draft < p_draft)

    left = (p - q).clamp(min=0)
    # Rounding may leave nothing where target and draft agree: then the target itself is drawn.
    left = torch.where((left > 0).any(-1, keepdim=True), left, p)
    ids = torch.arange(p.shape[-1], device=p.device)
    noise = rng.gumbel(params.seed, params.position, ids, rng.STREAMS["residual"])
    recovered = _argmax((left.log() + noise).masked_fill(~target.kept, -torch.inf))
    emitted = torch.where(agrees, drafted, torch.where(drafted < 0, free, recovered))
    return emitted, agrees
