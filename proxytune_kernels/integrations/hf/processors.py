"""What a list of transformers' logits processors asks, in the op's words; or why it can't be said.

Read are the processors themselves, by type, not the options that they were made from: one that is
passed by hand, or that a later transformers adds, is then never overlooked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import transformers as hf
from torch import Tensor
from transformers.generation import logits_process

_NEVER = 2**62
"""A length that no text reaches."""


class NotInOp(ValueError):
    """Something that ``proxytune_kernels.sample`` does not have; the message names it."""


@dataclass(frozen=True)
class Block:
    """Tokens that can't be drawn while a text's length is in [start, stop).

    Args:
        token_ids: the tokens; those past the vocabulary mean nothing.
        start, stop: lengths in tokens, of prompt (padding included) and output together.
    """

    token_ids: frozenset[int]
    start: int = 0
    stop: int = _NEVER

    @property
    def ends(self) -> bool:
        """Whether there is a length from which the tokens can be drawn."""
        return self.stop < _NEVER


@dataclass(frozen=True)
class OpSampling:
    """How tokens are drawn, as the arguments of :func:`proxytune_kernels.sample`.

    Args:
        temperature, top_k, top_p, min_p: as there, for ``filter_order="hf"``; temperature 0 is
            greedy.
        blocks: tokens that its ``allowed_mask`` leaves out.
        bias: token -> what its ``bias`` adds.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    blocks: tuple[Block, ...] = ()
    bias: Mapping[int, float] = field(default_factory=dict)


def read_processors(processors: Iterable[Any], *, do_sample: bool) -> OpSampling:
    """What the op must do so that its tokens follow the law of these processors.

    Allowed are: first, in any order, ``suppress_tokens``, ``begin_suppress_tokens``,
    ``min_new_tokens``, ``min_length``, and ``bad_words_ids`` and ``sequence_bias`` of single
    tokens; then temperature, top_k, top_p and min_p in this order, each at most once, as
    ``generate`` builds them. ``renormalize_logits`` changes no law and may stand anywhere.

    The laws are equal where no two logits are. Of tokens with equal logits at the edge of the kept
    set, the op keeps the lowest ids, as many as top_k and top_p ask for; transformers' top_k keeps
    all, and its top_p the last of an unstable sort. And transformers' top_p sums in fp32: the kept
    sets may differ where p is within rounding of a prefix's mass (docs/contracts.md).

    Args:
        processors: of a :class:`transformers.LogitsProcessorList`.
        do_sample: False is greedy: filters don't move the likeliest token.

    Raises:
        NotInOp: names the first processor that the op does not have.
    """
    sampling = OpSampling()
    rank = 0
    for processor in processors:
        kind = type(processor)
        if kind is hf.LogitNormalization:
            continue
        if kind not in _READERS:
            raise NotInOp(f"{_describe(processor)} is not in the op")
        own_rank, read = _READERS[kind]
        if own_rank < rank or own_rank == rank > 0:
            raise NotInOp(f"{_describe(processor)} behind another filter is not in the op")
        rank = own_rank
        sampling = read(sampling, processor)
    if not do_sample:
        sampling = replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    return sampling


def _temperature(sampling: OpSampling, processor: Any) -> OpSampling:
    return replace(sampling, temperature=processor.temperature)


def _top_k(sampling: OpSampling, processor: Any) -> OpSampling:
    # It is at least its min_tokens_to_keep already.
    _check_filter(processor, 1)
    return replace(sampling, top_k=processor.top_k)


def _top_p(sampling: OpSampling, processor: Any) -> OpSampling:
    _check_filter(processor, processor.min_tokens_to_keep)
    if processor.top_p == 0:
        raise NotInOp("top_p 0.0 is not in the op, which takes (0, 1]")
    return replace(sampling, top_p=processor.top_p)


def _min_p(sampling: OpSampling, processor: Any) -> OpSampling:
    _check_filter(processor, processor.min_tokens_to_keep)
    return replace(sampling, min_p=processor.min_p)


def _check_filter(processor: Any, min_tokens_to_keep: int) -> None:
    if min_tokens_to_keep > 1:
        raise NotInOp(
            f"{_describe(processor)} with min_tokens_to_keep {min_tokens_to_keep} is not in the op"
        )
    if processor.filter_value != -math.inf:
        raise NotInOp(
            f"{_describe(processor)} with filter_value {processor.filter_value} is not in the op"
        )


def _blocked(sampling: OpSampling, token_ids: Tensor, start: int, stop: int) -> OpSampling:
    block = Block(frozenset(token_ids.flatten().tolist()), start, stop)
    return replace(sampling, blocks=(*sampling.blocks, block))


def _suppress(sampling: OpSampling, processor: Any) -> OpSampling:
    return _blocked(sampling, processor.suppress_tokens, 0, _NEVER)


def _suppress_at_begin(sampling: OpSampling, processor: Any) -> OpSampling:
    begin = processor.begin_index
    return _blocked(sampling, processor.begin_suppress_tokens, begin, begin + 1)


def _min_length(sampling: OpSampling, processor: Any) -> OpSampling:
    return _blocked(sampling, processor.eos_token_id, 0, processor.min_length)


def _min_new_tokens(sampling: OpSampling, processor: Any) -> OpSampling:
    stop = processor.prompt_length_to_skip + processor.min_new_tokens
    return _blocked(sampling, processor.eos_token_id, 0, stop)


def _bias(sampling: OpSampling, processor: Any) -> OpSampling:
    longer = [list(token_ids) for token_ids in processor.sequence_bias if len(token_ids) > 1]
    if longer:
        raise NotInOp(
            f"{_option(processor)} of several tokens, as {longer[0]}, is not in the op: it depends "
            "on the text"
        )
    added = {token_ids[0]: value for token_ids, value in processor.sequence_bias.items()}
    blocked = frozenset(token_id for token_id, value in added.items() if value == -math.inf)
    bias = dict(sampling.bias)
    for token_id in added.keys() - blocked:
        bias[token_id] = bias.get(token_id, 0.0) + added[token_id]
    blocks = (*sampling.blocks, Block(blocked)) if blocked else sampling.blocks
    return replace(sampling, blocks=blocks, bias=bias)


_Reader = Callable[[OpSampling, Any], OpSampling]

# Kind -> its place and what reads it. Place 0 is before all filters, in any order: a mask and a
# bias commute with each other, and with nothing that cuts or scales.
_READERS: dict[type, tuple[int, _Reader]] = {
    hf.SuppressTokensLogitsProcessor: (0, _suppress),
    hf.SuppressTokensAtBeginLogitsProcessor: (0, _suppress_at_begin),
    hf.MinLengthLogitsProcessor: (0, _min_length),
    hf.MinNewTokensLengthLogitsProcessor: (0, _min_new_tokens),
    hf.SequenceBiasLogitsProcessor: (0, _bias),
    hf.NoBadWordsLogitsProcessor: (0, _bias),
    hf.TemperatureLogitsWarper: (1, _temperature),
    hf.TopKLogitsWarper: (2, _top_k),
    hf.TopPLogitsWarper: (3, _top_p),
    hf.MinPLogitsWarper: (4, _min_p),
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
