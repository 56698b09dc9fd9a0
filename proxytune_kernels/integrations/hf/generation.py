"""``generate()`` of a model of three: through the decoder where it can, else transformers' loops.

``notes`` says which of them a call took, and why.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_masks_for_generate

from proxytune_kernels.decoder import Decoder
from proxytune_kernels.decoder.cache import cache_keyword
from proxytune_kernels.integrations.hf.cache import CACHE, RoleCaches, cache_maker, checked_cache
from proxytune_kernels.integrations.hf.custom_generate import (
    Call,
    EngineGenerate,
    NotInDecoder,
    notes,
)
from proxytune_kernels.integrations.hf.inputs import OWN_ARGUMENTS, checked_alpha, prompts_of
from proxytune_kernels.trio.roles import ROLES

# They look at each row for itself, so they may be called row by row.
_ROW_BY_ROW = (MaxTimeCriteria, StopStringCriteria)

# Its methods are typed for models that have no other parent.
_Generation: Any = GenerationMixin


class ProxyTunedGenerationMixin(_Generation):  # type: ignore[misc]
    """Arguments, ways, caches and drafts of ``generate()`` for a model of three."""

    notes: dict[str, Any]
    config: Any
    engine: EngineGenerate

    @property
    def models(self) -> dict[str, Any]:
        """Role -> its model."""
        return {role: getattr(self, role) for role in ROLES}

    def _sample(
        self,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy decoding or sampling; arguments and result as in transformers."""
        model_kwargs = _for_forward(model_kwargs)
        prepared = (input_ids, logits_processor, stopping_criteria, generation_config)
        try:
            _check_loop(generation_config, synced_gpus, model_kwargs)
            call = self.engine.read(self, *prepared, **model_kwargs)
            _check_rows(call, stopping_criteria)
            decoder = self._decoder_for(call)
        except NotInDecoder as refusal:
            self.notes["sampling"] = f"transformers' loop: {refusal.reason}"
        else:
            self.notes |= notes(decoder)
            return self.engine.run(decoder, call, generation_config, streamer)
        return super()._sample(
            *prepared, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs
        )

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        self.notes["sampling"] = "transformers' loop: beam search ranks whole rows of logits"
        return super()._beam_search(*args, **_for_forward(kwargs))

    def _assisted_decoding(
        self, input_ids: Any, *args: Any, inputs_tensor: Any = None, **kwargs: Any
    ) -> Any:
        self.notes["sampling"] = (
            "transformers' loop: assisted decoding checks its drafts on whole rows of logits "
            "(custom_generate with speculation checks them in the decoder)"
        )
        return super()._assisted_decoding(input_ids, *args, inputs_tensor=inputs_tensor, **kwargs)

    def _decoder_for(self, call: Call) -> Decoder:
        """The decoder for a call; NotInDecoder if these models, as they are, can't run in it."""
        for role, model in self.models.items():
            if model.training:
                raise NotInDecoder(f"{role} is in training mode")
            if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
                raise NotInDecoder(f"{role} has forward hooks, which the decoder would not call")
        try:
            return self.engine.decoder_for(call)
        except ValueError as error:
            raise NotInDecoder(str(error)) from error

    def _extract_generation_mode_kwargs(
        self,
        custom_generate: Any,
        kwargs: dict[str, Any],
        synced_gpus: Any,
        assistant_model: Any,
        streamer: Any,
    ) -> dict[str, Any]:
        """As transformers', which keeps back from a callable what ``generate`` takes by name."""
        named = {
            "streamer": streamer,
            "assistant_model": assistant_model,
            "tokenizer": kwargs.get("tokenizer"),
        }
        found: dict[str, Any] = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        if callable(custom_generate):
            taken = inspect.signature(custom_generate).parameters
            found |= {k: v for k, v in named.items() if k in taken and v is not None}
        return found

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers', with a mask per role where a cache is made for compiling."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = inputs.get(CACHE)
        if isinstance(cache, RoleCaches) and cache.is_compileable and not cache.masks:
            inputs["attention_mask"] = self._masks_by_role(cache, inputs)
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask: Any, **kwargs: Any) -> Any:
        """The mask as it is: each role's is made of it, with that role's layers."""
        return attention_mask

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' paged cache is for one model's layers, and here are three."""
        raise ValueError(
            "transformers' continuous batching (generate_batch, cache_implementation='paged') "
            "keeps one cache for one model: use custom_generate=engine_generate, "
            "proxytune_kernels.Decoder or vLLM"
        )

    def _masks_by_role(self, caches: RoleCaches, inputs: dict[str, Any]) -> dict[str, Any]:
        token_ids, masks = inputs["input_ids"], {}
        for role, model in self.models.items():
            make: Any = getattr(model, "create_masks_for_generate", create_masks_for_generate)
            masks[role] = make(
                config=model.config,
                inputs_embeds=token_ids.new_empty((*token_ids.shape, 0), dtype=model.dtype),
                attention_mask=inputs.get("attention_mask"),
                **{cache_keyword(make): caches.caches[role]},
                position_ids=inputs.get("position_ids"),
            )
        return masks

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Check alpha and the prompts once; from here on each is a tensor with a row per row."""
        rows = input_ids.shape[0]
        if model_kwargs.get("alpha") is not None:
            model_kwargs["alpha"] = checked_alpha(model_kwargs["alpha"], rows)
        if prompts_of(model_kwargs, rows):
            # The first pass of assisted decoding has drafts behind the prompt.
            model_kwargs["prompt_length"] = input_ids.shape[1]
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **model_kwargs
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Make a cache for transformers' loops; the decoder has its own, and leaves this empty."""
        given = checked_cache(model_kwargs.get(CACHE))
        implementation = generation_config.cache_implementation
        if generation_config.prefill_chunk_size and "prompt_length" in model_kwargs:
            raise ValueError(
                "prefill_chunk_size must be None where roles have prompts of their own, got "
                f"{generation_config.prefill_chunk_size}"
            )
        if given is not None:
            if implementation is not None:
                raise ValueError(
                    f"cache_implementation must be None where past_key_values are given, "
                    f"got {implementation!r}"
                )
            # As transformers marks it: it outlives the call.
            vars(given)["_is_user_defined"] = True
            self.notes["cache"] = "handed in"
        elif generation_config.use_cache is False:
            self.notes["cache"] = "none: use_cache is False"
        else:
            copies = max(generation_config.num_beams, generation_config.num_return_sequences)
            # A role's own prompt may be longer than the base's.
            own = prompts_of(model_kwargs, batch_size * copies).values()
            longer = [ids.shape[1] - model_kwargs["prompt_length"] for ids, _ in own]
            maker = cache_maker(implementation, max_cache_length + max([0, *longer]))
            cache = RoleCaches.make(self.models, maker)
            model_kwargs[CACHE] = cache
            self.notes["cache"] = implementation or "dynamic"
            if generation_config.is_assistant:
                cache.activate_past_recording()
            if generation_mode == GenerationMode.ASSISTED_GENERATION:
                # This configuration also goes to an assistant, which brings a cache of its own and
                # would refuse the two.
                generation_config.cache_implementation = None

    def _validate_generation_mode(self, mode: Any, config: Any, mode_kwargs: Any) -> None:
        """As transformers'; a member's vocabulary is agreed, whatever the width of its logits."""
        if mode_kwargs.get("assistant_model") in self.models.values():
            mode_kwargs = {k: v for k, v in mode_kwargs.items() if k != "assistant_model"}
        super()._validate_generation_mode(mode, config, mode_kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with drafts of the shared vocabulary only.

        What transformers hands on to the assistant would have this model's own arguments in it.
        """
        width = self.config.vocab_size
        known = {k: v for k, v in kwargs["model_kwargs"].items() if k not in OWN_ARGUMENTS}
        processors = LogitsProcessorList([*kwargs["logits_processor"], _Within(width)])
        mine = {**kwargs, "model_kwargs": known, "logits_processor": processors}
        generator: Any = super()._get_candidate_generator(*args, **mine)
        candidates = generator.get_candidates

        def within(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            token_ids, logits = candidates(*args, **kwargs)
            return token_ids, None if logits is None else logits[..., :width]

        generator.get_candidates = within
        return generator


class _Within(LogitsProcessor):
    """Leaves the ids below a width: an assistant may know more of them."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if scores.shape[-1] <= self.width:
            return scores
        past = torch.arange(scores.shape[-1], device=scores.device) >= self.width
        return scores.masked_fill(past, -torch.inf)


def _for_forward(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what is for stop strings, which transformers' loops hand on to the model."""
    return {k: v for k, v in kwargs.items() if k not in ("tokenizer", "assistant_tokenizer")}


def _check_loop(config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    """NotInDecoder if the call asks for transformers' loop or its cache."""
    if synced_gpus:
        raise NotInDecoder("synced_gpus is not in the decoder")
    if config.is_assistant:
        raise NotInDecoder("a drafter's loop is transformers'")
    if config.cache_implementation is not None:
        raise NotInDecoder(f"cache_implementation {config.cache_implementation!r} is asked for")
    if getattr(model_kwargs.get(CACHE), "_is_user_defined", False):
        raise NotInDecoder("past_key_values are handed in")


def _check_rows(call: Call, criteria: Iterable[Any]) -> None:
    """NotInDecoder if rows that end apart would not be what they are in transformers' loop."""
    if len(call.prompts) == 1 or not call.criteria:
        return
    for criterion in call.criteria:
        if type(criterion) not in _ROW_BY_ROW:
            raise NotInDecoder(
                f"{type(criterion).__name__} may look at all rows of the batch at once"
            )
    if not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
        raise NotInDecoder("rows that end apart go on to the last without end-of-sequence tokens")
