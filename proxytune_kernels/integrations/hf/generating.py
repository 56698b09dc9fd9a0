"""The places of ``generate()`` where a model of three models needs its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import create_masks_for_generate

from proxytune_kernels.integrations.hf.caching import RoleCaches, cache_maker
from proxytune_kernels.integrations.hf.inputs import OWN_ARGUMENTS, checked_alpha, prompts_of
from proxytune_kernels.integrations.hf.row_engine import RowEngine
from proxytune_kernels.integrations.hf.rows import Rows
from proxytune_kernels.trio.roles import ROLES

# Its methods are typed for models that have no other parent.
_Generation: Any = GenerationMixin


class ProxyTunedGenerationMixin(_Generation):  # type: ignore[misc]
    """Arguments, caches and drafts of ``generate()`` for a model of three."""

    notes: dict[str, Any]
    config: Any
    _engine: RowEngine

    @property
    def models(self) -> dict[str, Any]:
        """Role -> its model."""
        return {role: getattr(self, role) for role in ROLES}

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers', with a mask per role where a cache is made for compiling."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = inputs.get("past_key_values")
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
            make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
            masks[role] = make(
                config=model.config,
                inputs_embeds=token_ids.new_empty((*token_ids.shape, 0), dtype=model.dtype),
                attention_mask=inputs.get("attention_mask"),
                past_key_values=caches.caches[role],
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
        """Make the cache: the engine's rows where they can be, else transformers' own."""
        given = model_kwargs.get("past_key_values")
        implementation = generation_config.cache_implementation
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if generation_config.prefill_chunk_size and "prompt_length" in model_kwargs:
            raise ValueError(
                "prefill_chunk_size must be None where roles have prompts of their own, got "
                f"{generation_config.prefill_chunk_size}"
            )
        if given is not None:
            self._check_given(given, implementation)
            self.notes["cache"] = f"{_kind(given)}: handed in"
        elif generation_config.use_cache is False:
            self.notes["cache"] = "none: use_cache is False"
        elif implementation is None and (refusal := self._no_rows(generation_config)) is None:
            model_kwargs["past_key_values"] = self._engine.rows(
                batch_size * copies, model_kwargs["position_ids"].shape[-1], max_cache_length
            )
            self.notes["cache"] = f"rows: the engine runs all three, the pair {self._engine.pair}"
        else:
            # A role's own prompt may be longer than the base's.
            own = prompts_of(model_kwargs, batch_size * copies).values()
            longer = [ids.shape[1] - model_kwargs["prompt_length"] for ids, _ in own]
            maker = cache_maker(implementation, max_cache_length + max([0, *longer]))
            model_kwargs["past_key_values"] = RoleCaches.make(self.models, maker)
            kind = implementation or "dynamic"
            reason = "asked for" if implementation else refusal
            self.notes["cache"] = f"{kind}: {reason}"
            if implementation == "dynamic":
                # This configuration also goes to an assistant, which brings a cache of its own and
                # would refuse the two.
                generation_config.cache_implementation = None

    def _no_rows(self, generation_config: Any) -> str | None:
        """Why the engine's rows can't be the cache; None if they can."""
        if generation_config.prefill_chunk_size is not None:
            return "prefill_chunk_size may leave a row nothing but padding"
        return self._engine.refusal()

    def _check_given(self, cache: Any, implementation: str | None) -> None:
        if not isinstance(cache, Rows | RoleCaches):
            raise ValueError(
                "past_key_values must be a cache that this model gave back, which has the tokens "
                f"of all roles, got {type(cache).__name__}"
            )
        if implementation is not None:
            raise ValueError(
                f"cache_implementation must be None where past_key_values are given, "
                f"got {implementation!r}"
            )
        # As transformers marks it: it outlives the call.
        vars(cache)["_is_user_defined"] = True

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


def _kind(cache: Any) -> str:
    if isinstance(cache, Rows):
        return "rows"
    return type(next(iter(cache.caches.values()))).__name__
