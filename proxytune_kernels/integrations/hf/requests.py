"""A prepared ``generate()`` call as requests of the decoder; what they can't say is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode

from proxytune_kernels.integrations.hf.inputs import checked_alpha, prompts_of, unpadded
from proxytune_kernels.integrations.hf.logits import draw_seeds
from proxytune_kernels.integrations.hf.processors import Block, NotInOp, read_processors
from proxytune_kernels.integrations.hf.stops import Criteria
from proxytune_kernels.params import SamplingParams


class Refused(ValueError):
    """Something that the decoder does not do; the message names it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"custom_generate: {reason}")


@dataclass(frozen=True)
class Call:
    """What a call asks of the decoder.

    Args:
        prompts: of each row, role -> token ids without padding.
        params: of each row.
        stops: what ends a row beside its length and its end-of-sequence tokens.
        pad_token_id: what follows in a row that ended before the longest; None if there is none.
    """

    prompts: list[dict[str, list[int]]]
    params: list[SamplingParams]
    stops: Criteria
    pad_token_id: int | None


def read_call(
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    alpha: Any,
    roles: Sequence[str],
    vocab_size: int,
    own_prompts: Mapping[str, Tensor | None],
    model_kwargs: Mapping[str, Any],
) -> Call:
    """Read what ``generate()`` prepared.

    Args:
        input_ids: int64 [B, P], padded on the left, each prompt ``num_return_sequences`` times.
        alpha: a number, or one per prompt.
        roles: that read prompts.
        vocab_size: agreed width.
        own_prompts: ``expert_input_ids`` and the like, a row per prompt, or None.
        model_kwargs: what else the model would get.

    Raises:
        Refused: names what the decoder does not do.
        ValueError, TypeError: alpha or a role's prompt is out of shape.
    """
    _check_config(generation_config)
    _check_model_kwargs(model_kwargs)
    rows, width = input_ids.shape
    repeats = generation_config.num_return_sequences
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device)
    _check_positions(model_kwargs.get("position_ids"), mask)
    token_ids = {"base": _unpadded("attention_mask", input_ids, mask)}
    for role, (ids, own_mask) in prompts_of(own_prompts, rows // repeats).items():
        listed = _unpadded(f"{role}_attention_mask", ids, own_mask)
        token_ids[role] = [row for row in listed for _ in range(repeats)]
    prompts = [{role: token_ids.get(role, token_ids["base"])[i] for role in roles}
               for i in range(rows)]  # fmt: skip
    stops = Criteria.read(stopping_criteria)
    max_length = stops.max_length or generation_config.max_length
    params = _params(
        logits_processor,
        _per_row(alpha, rows, repeats),
        do_sample=generation_config.do_sample,
        prompt_length=width,
        max_tokens=max_length - width,
        stop_token_ids=tuple(sorted(i for i in stops.eos_token_ids if i < vocab_size)),
    )
    pad = generation_config._pad_token_tensor
    return Call(prompts, params, stops, None if pad is None else int(pad))


def _params(
    logits_processor: Any,
    alphas: Sequence[float],
    *,
    do_sample: bool,
    prompt_length: int,
    max_tokens: int,
    stop_token_ids: tuple[int, ...],
) -> list[SamplingParams]:
    try:
        sampling = read_processors(logits_processor, do_sample=do_sample)
    except NotInOp as reason:
        raise Refused(str(reason)) from reason
    if sampling.bias:
        raise Refused("sequence_bias is not in the decoder")
    min_tokens = [_min_tokens(b, stop_token_ids) - prompt_length for b in sampling.blocks]
    seeds = draw_seeds(len(alphas)).tolist() if sampling.temperature else [0] * len(alphas)
    return [
        SamplingParams(
            alpha=alpha,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            filter_order="hf",
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=min(max([0, *min_tokens]), max_tokens),
            stop_token_ids=stop_token_ids,
            ignore_eos=True,
        )
        for alpha, seed in zip(alphas, seeds, strict=True)
    ]


def _min_tokens(block: Block, stop_token_ids: tuple[int, ...]) -> int:
    """The length up to which a block holds back the tokens that end a row."""
    if block.start or not block.ends or not block.token_ids.issuperset(stop_token_ids):
        raise Refused("suppress_tokens, begin_suppress_tokens and bad_words_ids are not in the "
                      "decoder")  # fmt: skip
    if not stop_token_ids:
        raise Refused("min_new_tokens without end-of-sequence tokens is not in the decoder")
    return block.stop


def _per_row(alpha: Any, rows: int, repeats: int) -> list[float]:
    checked = checked_alpha(alpha, rows // repeats)
    if isinstance(checked, Tensor):
        return [float(value) for value in checked.repeat_interleave(repeats)]
    return [checked] * rows


def _unpadded(name: str, input_ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Token ids of each row, int64 [B, P], without the padding on its left."""
    if mask.shape != input_ids.shape or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise Refused(f"{name} must be {list(input_ids.shape)} with padding on the left alone")
    return unpadded(input_ids, mask)


def _check_positions(position_ids: Tensor | None, mask: Tensor) -> None:
    if position_ids is None:
        return
    counted = mask.long().cumsum(-1) - 1
    given = position_ids.to(mask.device)
    if given.shape[-1] != mask.shape[-1] or bool((given != counted)[mask != 0].any()):
        raise Refused("position_ids other than the attention mask counts are not in the decoder")


def _check_config(config: Any) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise Refused(
            f"generation mode {mode.value} is not in the decoder"
            + (" (it drafts with EngineGenerate(speculation=...))" if "assisted" in mode else "")
        )
    if not config.use_cache:
        raise Refused("use_cache False is not in the decoder")
    if config.cache_implementation not in (None, "dynamic"):
        raise Refused(
            f"cache_implementation {config.cache_implementation!r}: the decoder has a cache of its "
            "own"
        )
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise Refused(f"{name} is not in the decoder")
    for name, instead in (("prefill_chunk_size", "prefill_chunk"), ("compile_config", "compile")):
        if getattr(config, name) is not None:
            raise Refused(f"{name}: give {instead} to EngineGenerate")


_READ = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
         "prompt_length", "output_attentions", "output_hidden_states")  # fmt: skip


def _check_model_kwargs(model_kwargs: Mapping[str, Any]) -> None:
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise Refused("past_key_values with tokens in it: the decoder has a cache of its own")
    for name, value in model_kwargs.items():
        if name not in _READ and value is not None:
            raise Refused(f"{name} is not in the decoder")
