"""Sampling in transformers' words: what its logits processors ask, and a sampler that does it.

It reads the processors themselves, by type, not the options that they were made from. So one that
is passed by hand, or that a later transformers adds, is never overlooked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.generation import logits_process

from proxytune_kernels import ops
from proxytune_kernels.params import RowParams, pack_mask, signed_seed
from proxytune_kernels.reference import SampleOutput

_NEVER = 2**62
"""A length that no text reaches."""


class NotInOp(ValueError):
    """Something that ``proxytune_kernels.sample`` does not have; the message names it."""


@dataclass(frozen=True)
class Block:
    """Tokens that can't be drawn while a text's length is in [start, stop).

    Args:
        option: of :class:`transformers.GenerationConfig`, which asks for it.
        token_ids: the tokens; those past the vocabulary mean nothing.
        start, stop: lengths in tokens, of prompt (padding included) and output together.
        forces: rather no others can, whatever the blocks before say.
    """

    option: str
    token_ids: frozenset[int]
    start: int = 0
    stop: int = _NEVER
    forces: bool = False


@dataclass(frozen=True)
class OpSampling:
    """How tokens are drawn, as the arguments of :func:`proxytune_kernels.sample`.

    Args:
        temperature, top_k, top_p, min_p: as there, for ``filter_order="hf"``; temperature 0 is
            greedy.
        blocks: tokens that its ``allowed_mask`` leaves out.
        words: tokens in a row, of which the last can't follow the others; for who knows the text.
        bias: token -> what its ``bias`` adds.
        repetition_penalty: of tokens in prompt and output, for who knows the text.
        ignored: how much of the beginning of each prompt does not count for it; None is nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    blocks: tuple[Block, ...] = ()
    words: tuple[tuple[int, ...], ...] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    ignored: int | Tensor | None = None

    @property
    def filters(self) -> dict[str, Any]:
        """The arguments that are one number a row."""
        names = ("temperature", "top_k", "top_p", "min_p")
        return {name: getattr(self, name) for name in names} | {"filter_order": "hf"}

    def allowed(self, length: int, vocab_size: int) -> Tensor | None:
        """Which tokens can be drawn behind a text of this length, bool [V]; None for all."""
        active = [block for block in self.blocks if block.start <= length < block.stop]
        if not active:
            return None
        allowed = torch.ones(vocab_size, dtype=torch.bool)
        for block in active:
            if block.forces:
                allowed[:] = False
            allowed[[i for i in block.token_ids if i < vocab_size]] = block.forces
        return allowed


def read_processors(
    processors: Iterable[Any], *, do_sample: bool, knows_text: bool = False
) -> OpSampling:
    """What the op must do so that its tokens follow the law of these processors.

    Allowed are: first, in any order, ``suppress_tokens``, ``begin_suppress_tokens``,
    ``min_new_tokens``, ``min_length``, ``forced_bos_token_id``, ``forced_eos_token_id`` of one
    token, and ``bad_words_ids`` and ``sequence_bias`` of single tokens; then temperature, top_k,
    top_p and min_p in this order, each at most once, as ``generate`` builds them.
    ``renormalize_logits`` changes no law and may stand anywhere.

    The laws are equal where no two logits are. Of tokens with equal logits at the edge of the kept
    set, the op keeps the lowest ids, as many as top_k and top_p ask for; transformers' top_k keeps
    all, and its top_p the last of an unstable sort. And transformers' top_p sums in fp32: the kept
    sets may differ where p is within rounding of a prefix's mass (docs/contracts.md). A token that
    is forced is drawn, unless the models give it no probability at all.

    Args:
        processors: of a :class:`transformers.LogitsProcessorList`.
        do_sample: False is greedy: filters don't move the likeliest token.
        knows_text: also read what depends on the text: ``repetition_penalty``, behind all biases,
            and ``bad_words_ids`` of several tokens.

    Raises:
        NotInOp: names the first processor that the op does not have.
    """
    sampling = OpSampling()
    rank = 0
    for processor in processors:
        kind = type(processor)
        if kind is hf.LogitNormalization:
            continue
        if kind not in _READERS or (kind is _REPETITION and not knows_text):
            raise NotInOp(f"{_describe(processor)} is not in the op")
        own_rank, read = _READERS[kind]
        if own_rank < rank or own_rank == rank > 0:
            raise NotInOp(f"{_describe(processor)} behind another filter is not in the op")
        rank = own_rank
        sampling = read(sampling, processor)
        if sampling.words and not knows_text:
            raise NotInOp(
                f"{_option(processor)} of several tokens, as {[*sampling.words[0]]}, is not in the "
                "op: it depends on the text"
            )
    if not do_sample:
        sampling = replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    return sampling


def _filter(sampling: OpSampling, processor: Any) -> OpSampling:
    name = _option(processor)  # and of the processor's attribute, and of the op's argument
    # top_k is at least its min_tokens_to_keep already; temperature has neither of the two.
    least = 1 if name == "top_k" else getattr(processor, "min_tokens_to_keep", 1)
    dropped = getattr(processor, "filter_value", -math.inf)
    if least > 1:
        raise NotInOp(f"{_describe(processor)} with min_tokens_to_keep {least} is not in the op")
    if dropped != -math.inf:
        raise NotInOp(f"{_describe(processor)} with filter_value {dropped} is not in the op")
    if name == "top_p" and processor.top_p == 0:
        raise NotInOp("top_p 0.0 is not in the op, which takes (0, 1]")
    values: dict[str, Any] = {name: getattr(processor, name)}
    return replace(sampling, **values)


def _blocked(
    sampling: OpSampling, processor: Any, token_ids: Iterable[int], start: int, stop: int
) -> OpSampling:
    block = Block(_option(processor), frozenset(token_ids), start, stop)
    return replace(sampling, blocks=(*sampling.blocks, block))


def _suppress(sampling: OpSampling, processor: Any) -> OpSampling:
    return _blocked(sampling, processor, processor.suppress_tokens.flatten().tolist(), 0, _NEVER)


def _suppress_at_begin(sampling: OpSampling, processor: Any) -> OpSampling:
    begin, token_ids = processor.begin_index, processor.begin_suppress_tokens.flatten().tolist()
    return _blocked(sampling, processor, token_ids, begin, begin + 1)


def _min_length(sampling: OpSampling, processor: Any) -> OpSampling:
    return _blocked(
        sampling, processor, processor.eos_token_id.flatten().tolist(), 0, processor.min_length
    )


def _min_new_tokens(sampling: OpSampling, processor: Any) -> OpSampling:
    stop = processor.prompt_length_to_skip + processor.min_new_tokens
    return _blocked(sampling, processor, processor.eos_token_id.flatten().tolist(), 0, stop)


def _forced(
    sampling: OpSampling, processor: Any, token_ids: Iterable[int], length: int
) -> OpSampling:
    block = Block(_option(processor), frozenset(token_ids), length, length + 1, forces=True)
    if len(block.token_ids) > 1:  # transformers draws evenly from them
        raise NotInOp(f"{_option(processor)} of several tokens is not in the op")
    return replace(sampling, blocks=(*sampling.blocks, block))


def _force_first(sampling: OpSampling, processor: Any) -> OpSampling:
    return _forced(sampling, processor, [processor.bos_token_id], 1)


def _force_last(sampling: OpSampling, processor: Any) -> OpSampling:
    token_ids = processor.eos_token_id.flatten().tolist()
    return _forced(sampling, processor, token_ids, processor.max_length - 1)


def _repetition(sampling: OpSampling, processor: Any) -> OpSampling:
    if sampling.repetition_penalty != 1:
        raise NotInOp(f"{_describe(processor)} behind another one is not in the op")
    ignored = getattr(processor, "prompt_ignore_length", None)
    return replace(sampling, repetition_penalty=processor.penalty, ignored=ignored)


def _bias(sampling: OpSampling, processor: Any) -> OpSampling:
    longer = {ids: value for ids, value in processor.sequence_bias.items() if len(ids) > 1}
    for token_ids, value in longer.items():
        if value != -math.inf:
            raise NotInOp(
                f"{_option(processor)} of several tokens, as {[*token_ids]}, is not in the op"
            )
    sampling = replace(sampling, words=(*sampling.words, *longer))
    added = {ids[0]: value for ids, value in processor.sequence_bias.items() if len(ids) == 1}
    blocked = {token_id for token_id, value in added.items() if value == -math.inf}
    if sampling.repetition_penalty != 1 and added.keys() - blocked:
        raise NotInOp(f"{_option(processor)} behind repetition_penalty is not in the op")
    bias = dict(sampling.bias)
    for token_id in added.keys() - blocked:
        bias[token_id] = bias.get(token_id, 0.0) + added[token_id]
    sampling = replace(sampling, bias=bias)
    return _blocked(sampling, processor, blocked, 0, _NEVER) if blocked else sampling


_Reader = Callable[[OpSampling, Any], OpSampling]
_REPETITION = hf.RepetitionPenaltyLogitsProcessor

# Kind -> its place and what reads it. Place 0 is before all filters, in any order: a mask and a
# bias commute with each other, and with nothing that cuts or scales.
_READERS: dict[type, tuple[int, _Reader]] = {
    hf.SuppressTokensLogitsProcessor: (0, _suppress),
    hf.SuppressTokensAtBeginLogitsProcessor: (0, _suppress_at_begin),
    hf.MinLengthLogitsProcessor: (0, _min_length),
    hf.MinNewTokensLengthLogitsProcessor: (0, _min_new_tokens),
    hf.SequenceBiasLogitsProcessor: (0, _bias),
    hf.NoBadWordsLogitsProcessor: (0, _bias),
    hf.ForcedBOSTokenLogitsProcessor: (0, _force_first),
    hf.ForcedEOSTokenLogitsProcessor: (0, _force_last),
    _REPETITION: (0, _repetition),
    hf.TemperatureLogitsWarper: (1, _filter),
    hf.TopKLogitsWarper: (2, _filter),
    hf.TopPLogitsWarper: (3, _filter),
    hf.MinPLogitsWarper: (4, _filter),
}

# Kind -> the option of GenerationConfig that makes it, and where it keeps that option's value.
_OPTIONS: dict[type, tuple[str, str | None]] = {
    hf.TemperatureLogitsWarper: ("temperature", "temperature"),
    hf.TopKLogitsWarper: ("top_k", "top_k"),
    hf.TopPLogitsWarper: ("top_p", "top_p"),
    hf.MinPLogitsWarper: ("min_p", "min_p"),
    logits_process.TopHLogitsWarper: ("top_h", "top_h"),
    hf.TypicalLogitsWarper: ("typical_p", "mass"),
    hf.EpsilonLogitsWarper: ("epsilon_cutoff", "epsilon"),
    hf.EtaLogitsWarper: ("eta_cutoff", None),
    hf.RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    hf.EncoderRepetitionPenaltyLogitsProcessor: ("encoder_repetition_penalty", None),
    hf.NoRepeatNGramLogitsProcessor: ("no_repeat_ngram_size", "ngram_size"),
    hf.EncoderNoRepeatNGramLogitsProcessor: ("encoder_no_repeat_ngram_size", "ngram_size"),
    hf.SequenceBiasLogitsProcessor: ("sequence_bias", None),
    hf.NoBadWordsLogitsProcessor: ("bad_words_ids", None),
    hf.SuppressTokensLogitsProcessor: ("suppress_tokens", None),
    hf.SuppressTokensAtBeginLogitsProcessor: ("begin_suppress_tokens", None),
    hf.MinLengthLogitsProcessor: ("min_length", "min_length"),
    hf.MinNewTokensLengthLogitsProcessor: ("min_new_tokens", "min_new_tokens"),
    hf.PrefixConstrainedLogitsProcessor: ("prefix_allowed_tokens_fn", None),
    hf.ForcedBOSTokenLogitsProcessor: ("forced_bos_token_id", "bos_token_id"),
    hf.ForcedEOSTokenLogitsProcessor: ("forced_eos_token_id", None),
    hf.InfNanRemoveLogitsProcessor: ("remove_invalid_values", None),
    hf.ExponentialDecayLengthPenalty: ("exponential_decay_length_penalty", None),
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor: ("guidance_scale", "guidance_scale"),
    hf.WatermarkLogitsProcessor: ("watermarking_config", None),
    hf.SynthIDTextWatermarkLogitsProcessor: ("watermarking_config", None),
}


def _option(processor: Any) -> str:
    return _OPTIONS.get(type(processor), (type(processor).__name__, None))[0]


def _describe(processor: Any) -> str:
    """The option, with its value where it has a short one; the class where none makes it."""
    name, attribute = _OPTIONS.get(type(processor), (type(processor).__name__, None))
    return name if attribute is None else f"{name} {getattr(processor, attribute):g}"


class LogitsSampler:
    """Draws the next tokens of B rows, step by step, by one op on their three rows of logits.

    For a decoding loop of one's own. A ``LogitsProcessor`` that runs the small models is the usual
    way to proxy-tune inside ``generate``, and is wrong in two ways that this is not: it holds the
    small models' caches, which no one rolls back when assisted decoding refuses drafts, or reorders
    for beams; and the warpers behind it read the vocabulary again, several times.

    Args:
        sampling: what to draw by; :meth:`from_config` reads it off a generation config.
        batch_size: B.
        vocab_size: agreed width; what lies past it is never read.
        alpha: a number or a tensor [B].
        seeds: int64 [B], key of each row's noise; :func:`draw_seeds` unless told.
        prompt_length: tokens of the prompts, padding included.
        device: of the logits.

    Raises:
        ValueError: names the argument, what it got and what it wanted.

    Example:
        >>> options = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=0)
        >>> sampler = LogitsSampler.from_config(**options, vocab_size=1000, alpha=0.5, seed=7)
        >>> base, expert, anti = torch.randn(3, 1, 1000)
        >>> sampler.draw(base, expert, anti).token_ids.shape
        torch.Size([1])
    """

    def __init__(
        self,
        sampling: OpSampling,
        batch_size: int,
        vocab_size: int,
        *,
        alpha: float | Tensor = 1.0,
        seeds: Tensor | None = None,
        prompt_length: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        outside = [i for i in sampling.bias if i >= vocab_size]
        if outside:
            raise ValueError(
                f"sequence_bias must be of tokens below the vocabulary's size {vocab_size}, "
                f"got {outside[0]}"
            )
        greedy = sampling.temperature == 0
        if seeds is None:
            seeds = torch.zeros(batch_size, dtype=torch.int64) if greedy else draw_seeds(batch_size)
        self.sampling = sampling
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.prompt_length = prompt_length
        self._params = RowParams.make(
            batch_size, device=device, alpha=alpha, seed=seeds, **sampling.filters
        )
        self._position = 0
        self._bias = self._make_bias(device)
        self._masks: dict[tuple[bool, ...], Tensor | None] = {}

    @classmethod
    def from_config(
        cls,
        generation_config: hf.GenerationConfig | None = None,
        *,
        vocab_size: int,
        batch_size: int = 1,
        alpha: float | Tensor = 1.0,
        seed: int | None = None,
        prompt_length: int = 0,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> LogitsSampler:
        """A sampler for a generation config, or for options in its words, as ``generate`` reads it.

        What is not said has transformers' defaults: do_sample False, and top_k 50 where it is True.

        Args:
            generation_config: not changed.
            seed: one key for all rows; None draws one for each. Other arguments: see the class.
            options: of :class:`transformers.GenerationConfig`; they go before generation_config.

        Raises:
            NotInOp: names an option that the op does not have.
            ValueError: names the argument, what it got and what it wanted.
        """
        config = copy.deepcopy(generation_config or hf.GenerationConfig())
        unknown = config.update(**options)
        if unknown:
            raise ValueError(
                f"options must be fields of GenerationConfig, got {', '.join(sorted(unknown))}"
            )
        config.update(**config._get_default_generation_params(), defaults_only=True)
        if config.num_beams > 1:
            raise NotInOp(f"num_beams {config.num_beams} is not in the op")
        builder: Any = _ProcessorBuilder(vocab_size)
        builder._prepare_special_tokens(config, device=device)
        processors = builder._get_logits_processor(
            config, input_ids_seq_length=prompt_length, device=device, model_kwargs={}
        )
        seeds = None
        if seed is not None:
            seeds = torch.full((batch_size,), signed_seed(seed), dtype=torch.int64)
        return cls(
            read_processors(processors, do_sample=config.do_sample),
            batch_size,
            vocab_size,
            alpha=alpha,
            seeds=seeds,
            prompt_length=prompt_length,
            device=device,
        )

    @property
    def alpha(self) -> Tensor:
        """Strength of the steering, fp32 [B]."""
        return self._params.alpha

    @property
    def position(self) -> int:
        """Index of the next output token; set it back to draw again what was rolled back."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        self._position = value
        self._params.position.fill_(value)

    def draw(
        self, base: Tensor, expert: Tensor | None = None, anti: Tensor | None = None
    ) -> SampleOutput:
        """Draw each row's next token, and move on by one position.

        Args:
            base, expert, anti: logits [B, V_role], as in :func:`proxytune_kernels.sample`; base
                alone may also be the combined logits.

        Returns:
            :class:`~proxytune_kernels.reference.SampleOutput`: a token of -1 where nothing was left
            to draw, and a status bit that says why.
        """
        drawn = ops.sample(
            base,
            expert,
            anti,
            self._params,
            bias=self._bias,
            allowed_mask=self._allowed() if self.sampling.blocks else None,
            vocab_size=self.vocab_size,
        )
        self._position += 1
        self._params.position.add_(1)
        return drawn

    def _make_bias(self, device: torch.device | str) -> Tensor | None:
        if not self.sampling.bias:
            return None
        row = torch.zeros(self.vocab_size, device=device)
        for token_id, value in self.sampling.bias.items():
            row[token_id] = value
        return row.repeat(self.batch_size, 1)

    def _allowed(self) -> Tensor | None:
        """Packed mask int32 [B, words] of the tokens that no block has at this length, or None."""
        length = self.prompt_length + self._position
        active = tuple(block.start <= length < block.stop for block in self.sampling.blocks)
        if active not in self._masks:
            allowed = self.sampling.allowed(length, self.vocab_size)
            self._masks[active] = None
            if allowed is not None:
                mask = pack_mask(allowed).to(self.alpha.device)
                self._masks[active] = mask.repeat(self.batch_size, 1)
        return self._masks[active]


def draw_seeds(batch_size: int) -> Tensor:
    """int64 [batch_size]: a seed for each row, from torch's global generator of the CPU.

    ``transformers.set_seed`` and ``torch.manual_seed`` repeat them. The first seeds of a larger
    batch are those of a smaller one, so a row draws the same whatever comes behind it.
    """
    return torch.randint(-(2**63), 2**63 - 1, (batch_size,), dtype=torch.int64)


class _ProcessorBuilder(hf.GenerationMixin):
    """As much of a model as ``_get_logits_processor`` reads."""

    def __init__(self, vocab_size: int) -> None:
        self.config: Any = hf.PreTrainedConfig()
        self.config.vocab_size = vocab_size
