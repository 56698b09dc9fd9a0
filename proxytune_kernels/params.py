"""Sampling parameters: one request's (:class:`SamplingParams`) and a batch's (:class:`RowParams`).

Names and ranges are vLLM's, plus ``alpha`` and ``filter_order``.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

FILTER_ORDERS = ("vllm", "hf", "joint")
"""Filter orders by their code in :attr:`RowParams.filter_order`."""

LOGPROBS_MODES = ("raw", "drawn")
"""Of what :attr:`SamplingParams.logprobs` are: see there."""

MAX_LOGPROBS = 20
"""The most of the likeliest tokens that a request may ask for at each position."""

_SEED_LIMIT = 2**64

# The kernels hold numbers in fp32: what would overflow there is not finite.
_FP32_MAX = 3.4028234663852886e38


def _number(
    name: str, value: Any, wanted: str, inside: Callable[[float], bool] = lambda _: True
) -> float:
    """Check that a value is a number, finite in fp32 and in its range; returns it."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not abs(float(value)) <= _FP32_MAX
        or not inside(float(value))
    ):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return float(value)


def _integer(name: str, value: Any, low: int, wanted: str, high: int = 2**31) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    if int(value) >= high:
        raise ValueError(f"{name} must be {wanted} and below {high}, got {value!r}")
    return int(value)


def check_alpha(alpha: Any) -> float:
    """Check the strength of the steering, finite in fp32; returns it."""
    return _number("alpha", alpha, "a finite number")


def signed_seed(seed: int) -> int:
    """The int64 that holds a 64-bit seed's bit pattern (tensors have no uint64 arithmetic)."""
    seed %= _SEED_LIMIT
    return seed - _SEED_LIMIT if seed >= _SEED_LIMIT // 2 else seed


def _seed(value: Any) -> int:
    wanted = "an integer in [-2^63, 2^64)"
    if isinstance(value, Integral) and int(value) >= _SEED_LIMIT:
        raise ValueError(f"seed must be {wanted}, got {value!r}")
    return signed_seed(_integer("seed", value, -(2**63), wanted, high=_SEED_LIMIT))


def _filter_order(value: Any) -> int:
    if value not in FILTER_ORDERS:
        raise ValueError(f"filter_order must be one of {FILTER_ORDERS}, got {value!r}")
    return FILTER_ORDERS.index(value)


class RowField(NamedTuple):
    """What one field of :class:`RowParams` holds."""

    dtype: torch.dtype
    number: Callable[[Any], float]
    """What the tensor holds for a value of one row; ValueError where it is out of range."""


_GREEDY = "0 (greedy) or a positive finite number"
_OFF = "a positive integer, or 0 or -1 for off"
ROW_FIELDS = {
    "alpha": RowField(torch.float32, check_alpha),
    "temperature": RowField(
        torch.float32, lambda t: _number("temperature", t, _GREEDY, lambda t: t >= 0)
    ),
    "top_k": RowField(torch.int32, lambda k: _integer("top_k", k, -1, _OFF)),
    "top_p": RowField(
        torch.float32, lambda p: _number("top_p", p, "in (0, 1]", lambda p: 0 < p <= 1)
    ),
    "min_p": RowField(
        torch.float32, lambda p: _number("min_p", p, "in [0, 1]", lambda p: 0 <= p <= 1)
    ),
    "filter_order": RowField(torch.int32, _filter_order),
    "seed": RowField(torch.int64, _seed),
    "position": RowField(
        torch.int64,
        lambda i: _integer("position", i, 0, "an integer of at least 0", high=2**63),
    ),
}
"""The fields of :class:`RowParams`, in the order in which every operator takes them. Their defaults
are those of :class:`SamplingParams`, and 0 for seed and position."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is steered, filtered, sampled and stopped.

    Args:
        alpha: strength of the steering, finite; 1 is the paper's method, 0 the base alone. Or one
            for each output token, of which the last is that of all that follow.
        alpha_schedule: ``"constant"``, or a decoder's rule: ``"decay:R"`` multiplies alpha by R^i
            at output position i, R in [0, 1]; ``"entropy:H"`` leaves the base alone where the
            entropy of its softmax is at most H nats, finite and at least 0.
        pair_alphas: strength of each further pair of the trio (docs/pairs.md), finite; () leaves
            them out. A rule of alpha_schedule holds for them, too.
        temperature: 0 for greedy, or positive and finite.
        top_k: keep this many tokens; 0 or -1 turns it off.
        top_p: keep the shortest prefix whose mass reaches this share, in (0, 1]; 1 turns it off.
        min_p: keep tokens of at least this share of the likeliest one's probability, in [0, 1];
            0 turns it off.
        filter_order: of what top_p's mass is a share: ``"vllm"``, ``"hf"`` or ``"joint"``
            (docs/contracts.md, Selection).
        seed: key of the request's noise, in [-2^63, 2^64); None draws one.
        n: outputs for one prompt, at least 1. Output i has the seed ``seed + i`` modulo 2^64.
        logit_bias: token -> what is added to its combined logit, a finite number.
        allowed_token_ids: the only tokens that may be drawn; none is all of them.
        bad_words: what may not be drawn: strings, or tokens ids in a row, of which the last is
            barred where the output ends with the others.
        repetition_penalty: combined logits of tokens in prompt or output are divided by it where
            they are positive, else multiplied; positive, 1 turns it off.
        presence_penalty: subtracted from those of tokens in the output, in [-2, 2].
        frequency_penalty: as often as the output has them, in [-2, 2].
        penalty_prompt: whether the base's prompt counts for repetition_penalty.
        max_tokens: output tokens at most, at least 1.
        min_tokens: output tokens before a stop token or string may end the request, at least 0.
        stop: strings that end the request.
        stop_token_ids: tokens that end the request.
        ignore_eos: go on after the end-of-sequence token.
        include_stop_str_in_output: keep the stop string at the end of the text.
        skip_special_tokens: leave tokens such as the end of a turn out of the text.
        add_special_tokens: begin a prompt that is text as its tokenizer does, with BOS for most.
            Chat templates write their own.
        grammar: a :class:`proxytune_kernels.Grammar` that the output must be a text of; the
            request ends where it does. None allows all.
        logprobs: report this many of the likeliest tokens at each output position, beside the one
            drawn, in [0, 20]; -1 reports none.
        logprobs_mode: ``"raw"``: log-softmax of the combined logits, before temperature and
            filters. ``"drawn"``: of what the token was drawn from; tokens that the filters leave
            out are not reported.
        prompt_logprobs: the same at each position of the prompt, always raw; -1 reports none. It
            needs one prompt for all roles. It may be as large as the vocabulary.
        prompt_logprobs_last: only at so many of the prompt's last positions; 0 is at all.
        steering: report at each output position what steering did to its token (docs/contracts.md,
            Attribution).

    Raises:
        ValueError: names the field, its value and its range.
    """

    alpha: float | Sequence[float] = 1.0
    alpha_schedule: str = "constant"
    pair_alphas: Sequence[float] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    filter_order: str = "vllm"
    seed: int | None = None
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: Sequence[int] = ()
    bad_words: Sequence[str | Sequence[int]] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_prompt: bool = True
    max_tokens: int = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    grammar: Any = None
    logprobs: int = -1
    logprobs_mode: str = "raw"
    prompt_logprobs: int = -1
    prompt_logprobs_last: int = 0
    steering: bool = False

    @classmethod
    def from_generation_config(cls, source: Any, **overrides: Any) -> SamplingParams:
        """What a checkpoint's generation config recommends, as transformers' ``generate`` reads it.

        Filters apply in transformers' order. What the config does not say has transformers'
        defaults for sampling (do_sample False, which is greedy; top_k 50 where it is True), and for
        all else the defaults of this class. End-of-sequence tokens are the trio's already.

        Args:
            source: a :class:`transformers.GenerationConfig`, a mapping with its fields, or a model
                or a :class:`proxytune_kernels.Trio` that has one; a trio's is the base's.
            overrides: of this class's fields; they go before what the config says.

        Raises:
            ValueError: names the field that has no counterpart here (no_repeat_ngram_size 2, beams)
                or a value out of its range.

        Example:
            >>> config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
            >>> params = SamplingParams.from_generation_config(config, max_tokens=64)
            >>> params.temperature, params.top_k, params.top_p, params.filter_order
            (0.6, 50, 0.9, 'hf')
        """
        return cls(**{**generation_settings(source), **overrides})

    def __post_init__(self) -> None:
        if isinstance(self.alpha, Sequence) and not isinstance(self.alpha, str):
            if not self.alpha:
                raise ValueError("alpha must be a finite number or a sequence of them, got ()")
            object.__setattr__(self, "alpha", tuple(check_alpha(a) for a in self.alpha))
        self._check_schedule()
        if isinstance(self.pair_alphas, str) or not isinstance(self.pair_alphas, Sequence):
            raise ValueError(
                f"pair_alphas must be a sequence of finite numbers, got {self.pair_alphas!r}"
            )
        wanted = "finite numbers"
        numbers = tuple(_number("pair_alphas", a, wanted) for a in self.pair_alphas)
        object.__setattr__(self, "pair_alphas", numbers)
        for name, row_field in ROW_FIELDS.items():
            value = self.alphas[0] if name == "alpha" else getattr(self, name, None)
            if value is not None or name not in ("seed", "position"):
                row_field.number(value)
        _integer("n", self.n, 1, "an integer of at least 1")
        self._check_edits()
        _integer("max_tokens", self.max_tokens, 1, "an integer of at least 1")
        _integer("min_tokens", self.min_tokens, 0, "an integer of at least 0")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        wanted = "an integer of at least -1"
        _integer("logprobs", self.logprobs, -1, wanted, high=MAX_LOGPROBS + 1)
        _integer("prompt_logprobs", self.prompt_logprobs, -1, wanted)
        _integer("prompt_logprobs_last", self.prompt_logprobs_last, 0, "an integer of at least 0")
        if self.logprobs_mode not in LOGPROBS_MODES:
            raise ValueError(
                f"logprobs_mode must be one of {LOGPROBS_MODES}, got {self.logprobs_mode!r}"
            )
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        for name in ("stop_token_ids", "allowed_token_ids"):
            object.__setattr__(self, name, _token_ids(name, getattr(self, name)))
        for name in (
            *("ignore_eos", "include_stop_str_in_output", "penalty_prompt", "steering"),
            *("skip_special_tokens", "add_special_tokens"),
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")

        # Its class is the decoder's, which this module does not import.
        if self.grammar is not None and not hasattr(self.grammar, "kind"):
            raise ValueError(f"grammar must be a Grammar or None, got {self.grammar!r}")

    def _check_schedule(self) -> None:
        found = re.fullmatch(r"(decay|entropy):(\d*\.?\d+(?:e-?\d+)?)", str(self.alpha_schedule))
        most = 1.0 if found and found[1] == "decay" else _FP32_MAX
        if self.alpha_schedule != "constant" and not (found and float(found[2]) <= most):
            raise ValueError(
                "alpha_schedule must be constant, decay:R with R in [0, 1], or entropy:H with a "
                f"finite H of at least 0, got {self.alpha_schedule!r}"
            )

    def _check_edits(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(
                f"logit_bias must be a mapping from token ids to numbers, got {self.logit_bias!r}"
            )
        bias = {
            _integer("logit_bias", i, 0, "of token ids of at least 0"): _number(
                f"logit_bias of token {i}", value, "a finite number"
            )
            for i, value in self.logit_bias.items()
        }
        object.__setattr__(self, "logit_bias", bias)
        words = self.bad_words
        if isinstance(words, str) or not isinstance(words, Sequence) or "" in words:
            raise ValueError(
                f"bad_words must be a sequence of strings or lists of token ids, got {words!r}"
            )
        checked = tuple(w if isinstance(w, str) else _token_ids("bad_words", w) for w in words)
        if () in checked:
            raise ValueError(f"bad_words must be of at least one token, got {words!r}")
        object.__setattr__(self, "bad_words", checked)
        _number("repetition_penalty", self.repetition_penalty, "a positive number", lambda p: p > 0)
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), "in [-2, 2]", lambda p: -2 <= p <= 2)

    @property
    def alphas(self) -> tuple[float, ...]:
        """alpha of each output token up to the last one that is its own; its rule is not in it."""
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    @property
    def schedule(self) -> tuple[float, float]:
        """R of a decay, else 1; and nats of entropy up to which the base is left alone, else -1."""
        rule, _, number = self.alpha_schedule.partition(":")
        return (
            float(number) if rule == "decay" else 1.0,
            float(number) if rule == "entropy" else -1.0,
        )

    @property
    def penalties(self) -> tuple[float, float, float]:
        """Repetition, presence and frequency penalty, as in :class:`Edits`."""
        return self.repetition_penalty, self.presence_penalty, self.frequency_penalty

    def with_seed(self) -> SamplingParams:
        """These parameters with a seed drawn from the operating system where none was given."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(64))

    def seeded(self) -> list[SamplingParams]:
        """Those of each of the n outputs, with its seed."""
        first = self.with_seed()
        assert first.seed is not None
        others = (replace(first, seed=(first.seed + i) % _SEED_LIMIT) for i in range(1, self.n))
        return [first, *others]


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise ValueError(f"{name} must be a sequence of token ids, got {ids!r}")
    return tuple(_integer(name, i, 0, "token ids of at least 0") for i in ids)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop must be a non-empty string or a sequence of them, got {stop!r}")
    return tuple(strings)


# Field of transformers' generation configs -> ours.
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")
_SAME = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "repetition_penalty": "repetition_penalty",
}
# What says nothing of how a request is drawn or ended. The trio has end-of-sequence tokens from
# elsewhere, and the decoder bounds prompt and output together by max_seq_len.
_SILENT = re.compile(
    r"_.*|output_\w+|(bos|eos|pad|decoder_start)_token_id|max_length|use_cache|cache_\w+|"
    r"transformers_version|renormalize_logits|return_dict_in_generate|compile_config|"
    r"disable_compile|trust_remote_code|.*assistant.*|.*_lookbehind"
)
# Fields that are off at 1; all others are off at what is false.
_OFF_AT_1 = (
    *("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "guidance_scale"),
    *("encoder_repetition_penalty", "typical_p", "top_h"),
)


def generation_settings(source: Any) -> dict[str, Any]:
    """Fields of :class:`SamplingParams`: see :meth:`SamplingParams.from_generation_config`."""
    model = getattr(source, "base", source)
    config = getattr(model, "generation_config", model)
    said = config.to_diff_dict() if hasattr(config, "to_diff_dict") else config
    if not isinstance(said, Mapping):
        raise TypeError(
            "source must be a GenerationConfig, a mapping, or a model or trio that has one, got "
            f"{source!r:.80}"
        )
    values = {k: v for k, v in said.items() if v is not None and not _SILENT.fullmatch(k)}
    sampled = values.pop("do_sample", False)
    if not isinstance(sampled, bool):
        raise ValueError(f"do_sample must be True or False, got {sampled!r}")
    filters = {"top_k": 50} | {name: values.pop(name) for name in _SAMPLED if name in values}
    settings = {ours: values.pop(name) for name, ours in _SAME.items() if name in values}
    for name, value in values.items():
        # An id of 0 is an id.
        off = False if name.endswith("_token_id") else value == (name in _OFF_AT_1)
        if not off and value not in ([], {}):
            raise ValueError(
                f"{name} of a generation config has no counterpart in SamplingParams, got "
                f"{value!r:.80}: give a config without it"
            )
    return {"filter_order": "hf", **(filters if sampled else {"temperature": 0.0}), **settings}


def mask_without(token_ids: Iterable[int], vocab_size: int) -> Tensor:
    """Packed mask, int32 [ceil(vocab_size / 32)], of all tokens but these (docs/contracts.md).

    Ids past the vocabulary mean nothing.
    """
    words = [-1] * (-(-vocab_size // 32))
    for i in token_ids:
        if i < vocab_size:
            words[i >> 5] &= ~(1 << (i & 31))
    # As int32 bit patterns: a word with bit 31 cleared is positive.
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def pack_mask(allowed: Tensor) -> Tensor:
    """Packed mask, int32 [ceil(V / 32)], of the tokens that are allowed, bool [V]."""
    bits = torch.zeros(-(-len(allowed) // 32) * 32, dtype=torch.int64)
    bits[: len(allowed)] = allowed
    return (bits.view(-1, 32) << torch.arange(32)).sum(1).to(torch.int32)


class RowParams(NamedTuple):
    """A batch's sampling parameters: contiguous tensors of shape [B] on one device.

    The kernels read them where they are, so a captured CUDA graph sees what is written into them
    in place. Values out of range are reported in the row's status, not checked here: a check would
    stall the device.
    """

    alpha: Tensor
    """fp32: strength of the steering."""
    temperature: Tensor
    """fp32: 0 is greedy."""
    top_k: Tensor
    """int32: 0 or -1 is off."""
    top_p: Tensor
    """fp32: 1 is off."""
    min_p: Tensor
    """fp32: 0 is off."""
    filter_order: Tensor
    """int32: index into :data:`FILTER_ORDERS`."""
    seed: Tensor
    """int64: bit pattern of the 64-bit seed."""
    position: Tensor
    """int64: index of the output token within its request."""

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.alpha.shape[0]

    @classmethod
    def make(
        cls,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        alpha: float | Tensor = 1.0,
        temperature: float | Tensor = SamplingParams.temperature,
        top_k: int | Tensor = SamplingParams.top_k,
        top_p: float | Tensor = SamplingParams.top_p,
        min_p: float | Tensor = SamplingParams.min_p,
        filter_order: str | Tensor = SamplingParams.filter_order,
        seed: int | Tensor = 0,
        position: int | Tensor = 0,
    ) -> RowParams:
        """Build from scalars or tensors of shape [batch_size].

        Scalars are checked against their range. A tensor is converted to the field's dtype and
        device; its values are checked by the kernels (a status bit), not here.

        Example:
            >>> RowParams.make(2, temperature=0.7, seed=torch.tensor([1, 2])).seed.tolist()
            [1, 2]

        Raises:
            ValueError: a scalar out of range, or a tensor of another shape or kind of number.
        """
        values = (alpha, temperature, top_k, top_p, min_p, filter_order, seed, position)
        # All scalars before any tensor: what is out of range is named first.
        numbers = [
            value if isinstance(value, Tensor) else field.number(value)
            for field, value in zip(ROW_FIELDS.values(), values, strict=True)
        ]
        columns = zip(ROW_FIELDS, numbers, strict=True)
        return cls(*(_column(name, value, batch_size, device) for name, value in columns))

    @classmethod
    def from_sampling_params(
        cls,
        params: Sequence[SamplingParams],
        positions: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> RowParams:
        """One row per request, at the given positions (0 unless told).

        Raises:
            ValueError: a request without a seed (see :meth:`SamplingParams.with_seed`), or another
                number of positions than of requests.
        """
        positions = [0] * len(params) if positions is None else positions
        if len(positions) != len(params):
            raise ValueError(
                f"positions must have one value per request ({len(params)}), got {len(positions)}"
            )
        if any(p.seed is None for p in params):
            raise ValueError("seed must be set in each SamplingParams, got None: use with_seed()")
        columns = []
        for name, row_field in ROW_FIELDS.items():
            if name == "position":
                numbers: list[float] = list(positions)
            elif name == "alpha":
                pairs = zip(params, positions, strict=True)
                numbers = [
                    p.alphas[min(i, len(p.alphas) - 1)] * p.schedule[0] ** i for p, i in pairs
                ]
            else:
                numbers = [row_field.number(getattr(p, name)) for p in params]
            columns.append(torch.tensor(numbers, dtype=row_field.dtype, device=device))
        return cls(*columns)

    def rows(self, index: slice | Tensor) -> RowParams:
        """The parameters of some of the rows, by slice (views) or by index tensor (copies)."""
        return RowParams(*(column[index] for column in self))


class Edits(NamedTuple):
    """What penalties and biases do to some tokens of each row: docs/contracts.md, Edits.

    The kernels read them where they are, as :class:`RowParams`. Both tensors are contiguous.
    """

    entries: Tensor
    """int32 [B, M, 4], or [B, T, M, 4] at T positions. Of each entry: the token's id, unlike all
    others of its row, -1 for none; how often the output has it; whether the prompt has it; the bits
    of an fp32 bias."""
    penalties: Tensor
    """fp32 [B, 3]: repetition, 1 is off; presence and frequency, 0 is off."""

    @classmethod
    def make(
        cls,
        ids: Tensor,
        *,
        counts: Tensor | None = None,
        in_prompt: Tensor | None = None,
        bias: Tensor | None = None,
        repetition_penalty: float | Tensor = 1.0,
        presence_penalty: float | Tensor = 0.0,
        frequency_penalty: float | Tensor = 0.0,
    ) -> Edits:
        """Build from the entries' columns, each [B, M] or [B, T, M], and a penalty or one per row.

        Example:
            >>> edits = Edits.make(torch.tensor([[5, 7]]), bias=torch.tensor([[1.0, -2.0]]))
            >>> edits.entries.shape, edits.penalties.tolist()
            (torch.Size([1, 2, 4]), [[1.0, 0.0, 0.0]])
        """
        none = torch.zeros_like(ids, dtype=torch.int32)
        numbers = [none if column is None else column.int() for column in (counts, in_prompt)]
        bits = none if bias is None else bias.float().contiguous().view(torch.int32)
        columns = torch.broadcast_tensors(ids.int(), *numbers, bits)
        values = (repetition_penalty, presence_penalty, frequency_penalty)
        penalties = torch.empty((ids.shape[0], 3), device=ids.device)
        for i, value in enumerate(values):
            penalties[:, i] = value
        return cls(torch.stack(columns, -1), penalties)


def _column(
    name: str, value: float | Tensor, batch_size: int, device: torch.device | str
) -> Tensor:
    dtype = ROW_FIELDS[name].dtype
    if not isinstance(value, Tensor):
        return torch.full((batch_size,), value, dtype=dtype, device=device)
    if value.shape != (batch_size,):
        raise ValueError(
            f"{name} must have shape [{batch_size}], one value per row, got {list(value.shape)}"
        )
    if value.is_complex() or (value.is_floating_point() and not dtype.is_floating_point):
        raise ValueError(f"{name} must be convertible to {dtype}, got {value.dtype}")
    return value.to(device=device, dtype=dtype).contiguous()


SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))
"""Names of the fields of :class:`SamplingParams`, in order."""
