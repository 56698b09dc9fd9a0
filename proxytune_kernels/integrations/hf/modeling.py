"""A trio as one transformers model: its logits are the combined logits of the three."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BatchEncoding, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from proxytune_kernels import ops
from proxytune_kernels.decoder.model import input_device
from proxytune_kernels.integrations.hf.cache import (
    CACHE,
    RoleCaches,
    cache_maker,
    checked_cache,
    role_logits,
    roles_to_run,
)
from proxytune_kernels.integrations.hf.configuration import ProxyTunedConfig
from proxytune_kernels.integrations.hf.custom_generate import EngineGenerate
from proxytune_kernels.integrations.hf.generation import ProxyTunedGenerationMixin
from proxytune_kernels.integrations.hf.inputs import (
    checked_alpha,
    left_padded,
    prompts_of,
    refuse,
)
from proxytune_kernels.integrations.hf.saving import SavedByName
from proxytune_kernels.trio import Trio, model_info
from proxytune_kernels.trio.adapters import unwrapped
from proxytune_kernels.trio.remote import RemoteModel
from proxytune_kernels.trio.roles import ROLES

_ROWS = 64
"""Rows of a call that the decoder runs at the same time, at most."""


class ProxyTunedForCausalLM(  # type: ignore[misc]
    ProxyTunedGenerationMixin, SavedByName, PreTrainedModel
):
    """Proxy-tuning in transformers: ``generate()`` in all its modes, pipelines, streamers.

    Made by :meth:`from_models`, :meth:`from_trio` or ``from_pretrained``.

    Args:
        config: of these models.
        models: role -> transformers causal LM.
        trio: the same models with their tokenizers, where there are any.
    """

    # Of GenerationMixin, whose methods mypy can't see from here.
    generate: Any

    config_class = ProxyTunedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(
        self,
        config: ProxyTunedConfig,
        models: Mapping[str, Any] | None = None,
        trio: Trio | None = None,
    ) -> None:
        if models is None:
            raise ValueError(
                "ProxyTunedForCausalLM must be made by from_models, from_trio or from_pretrained: "
                "a configuration alone has no weights"
            )
        super().__init__(config)
        self.base, self.expert, self.anti = (models[role] for role in ROLES)
        self.trio = trio
        # What the last generate() says of itself, for info().
        self.notes: dict[str, Any] = {}
        self.engine = EngineGenerate(max_batch_size=_ROWS)
        self.post_init()
        self.training = self.base.training
        self.generation_config = copy.deepcopy(self.base.generation_config)
        if trio is not None and trio.eos_token_ids:
            self.generation_config.eos_token_id = list(trio.eos_token_ids)

    @classmethod
    def from_models(
        cls,
        base: Any,
        expert: Any,
        anti: Any,
        tokenizer: Any = None,
        *,
        alpha: float = 1.0,
        prompts: Mapping[str, str] | None = None,
    ) -> ProxyTunedForCausalLM:
        """Make one model of three in memory, which are not copied or changed.

        Args:
            base, expert, anti: transformers causal LMs; the expert may be a PEFT model with a LoRA
                adapter.
            tokenizer: one for all roles or a mapping from role to tokenizer: the vocabulary is
                agreed as :func:`proxytune_kernels.load_trio` does it. Without one the three models
                are taken to share their vocabulary, and must give logits of one width.
            alpha: strength of the steering where a call names none.
            prompts: role -> ``"plain"`` (default) or ``"chat"``; needs a tokenizer.

        Raises:
            ValueError: names the argument, what it got and what it wanted.
            VocabularyError: the roles disagree on the meaning of an id.
        """
        if tokenizer is not None:
            trio = Trio.from_models(base, expert, anti, tokenizer, prompts=prompts)
            return cls.from_trio(trio, alpha)
        if prompts is not None:
            raise ValueError("prompts need a tokenizer, got None")
        models = {"base": base, "expert": unwrapped("expert", expert), "anti": anti}
        widths = {r: m.get_output_embeddings().weight.shape[0] for r, m in models.items()}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{width} of {role}" for role, width in widths.items())
            raise ValueError(
                f"tokenizer must be given where the models' logits have different widths, "
                f"got None and {listed}"
            )
        config = ProxyTunedConfig.of_models(models, widths["base"], alpha=alpha)
        return cls(config, models)

    @classmethod
    def from_trio(cls, trio: Trio, alpha: float = 1.0) -> ProxyTunedForCausalLM:
        """Make one model of a trio; ``alpha`` is the steering where a call names none.

        Example:
            >>> import proxytune_kernels as ptk
            >>> model = ProxyTunedForCausalLM.from_trio(ptk.load_trio("shipped"))
            >>> model.config.vocab_size == model.trio.vocab_size
            True
        """
        if trio.roles != ROLES:
            raise ValueError(f"trio must have {', '.join(ROLES)}, got {', '.join(trio.roles)}")
        if isinstance(trio.base, RemoteModel):
            raise ValueError("trio must have its base in this process, got one behind an API")
        trio.check_modules(cls.__name__)
        trio.check_one_pair(cls.__name__)
        config = ProxyTunedConfig.of_models(
            dict(trio.models), trio.vocab_size, alpha=alpha, prompts=dict(trio.prompts)
        )
        return cls(config, trio.models, trio)

    @property
    def device(self) -> torch.device:
        """Where token ids go, also where accelerate keeps the base's weights elsewhere."""
        return input_device(self.base)

    @property
    def alpha(self) -> float:
        """Strength of the steering where a call names none."""
        return float(self.config.alpha)

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.config.alpha = float(value)

    def init_weights(self) -> None:
        """Nothing: the models come with their weights."""

    def _init_weights(self, module: Any) -> None:
        """Nothing, as :meth:`init_weights`."""

    def get_input_embeddings(self) -> Any:
        """The base's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The base's."""
        return self.base.get_output_embeddings()

    def info(self) -> dict[str, Any]:
        """What the model is and how its last ``generate()`` ran, as plain values."""
        described = {role: model_info(model) for role, model in self.models.items()}
        attention = {role: model.config._attn_implementation for role, model in self.models.items()}
        return {
            "roles": described,
            "alpha": self.alpha,
            "vocab_size": self.config.vocab_size,
            "vocabulary_notes": (
                ["no tokenizers to compare: ids are taken to mean the same to all roles"]
                if self.trio is None
                else list(self.trio.agreement.notes)
            ),
            "attention": attention,
            **self.notes,
        }

    def tokenize(self, prompts: Any) -> BatchEncoding:
        """A batch's inputs for ``generate()``: token ids and masks, padded on the left.

        Args:
            prompts: one prompt, or a list of them; a prompt is a string, chat messages, a list of
                token ids, or a mapping from role to one of these.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 [B, P], and for a role that reads another
            prompt than the base ``expert_input_ids``, ``expert_attention_mask`` (``anti_...``).
        """
        if self.trio is None:
            raise ValueError("tokenize needs tokenizers: give from_models a tokenizer")
        single = isinstance(prompts, str | Mapping) or not prompts or _is_one(prompts)
        each = [self.trio.tokenize(prompt) for prompt in ([prompts] if single else prompts)]
        pad = self.trio.tokenizer.pad_token_id or 0
        inputs: dict[str, Tensor] = {}
        for role in ROLES:
            rows = [ids[role] for ids in each]
            if role == "base":
                inputs["input_ids"], inputs["attention_mask"] = left_padded(rows, pad)
            elif rows != [ids["base"] for ids in each]:
                token_ids, mask = left_padded(rows, pad)
                inputs |= {f"{role}_input_ids": token_ids, f"{role}_attention_mask": mask}
        return BatchEncoding(inputs).to(self.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
        alpha: float | Tensor | None = None,
        expert_input_ids: Tensor | None = None,
        expert_attention_mask: Tensor | None = None,
        anti_input_ids: Tensor | None = None,
        anti_attention_mask: Tensor | None = None,
        prompt_length: int | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Combined logits ``base + alpha * (expert - anti)`` of every token, or of the last.

        Args:
            input_ids: int64 [B, q], new tokens.
            attention_mask: int64 [B, T], 1 for tokens and 0 for padding on the left, of all tokens
                so far; None is all tokens.
            position_ids: int64 [B, q]; counted by the mask if None.
            past_key_values: a cache that this model gave, longer by q tokens afterwards. One that
                was filled at the number alpha 0 holds the base's tokens alone.
            use_cache: give a cache back; the configuration's, True at first, if None.
            logits_to_keep: give the logits of so many last tokens; 0 is all of them.
            labels: int64 [B, q]; the loss is that of transformers' causal LMs.
            alpha: a number or a tensor [B]; the configuration's if None.
            expert_input_ids, expert_attention_mask, anti_input_ids, anti_attention_mask: int64
                [B, P], a role's own prompt in place of the base's, padded on the left.
            prompt_length: how many of the first ``input_ids`` are the base's prompt, where more
                follow it (drafts); all if None.
            cache: ``past_key_values`` by the name that later versions of transformers give it.

        Returns:
            Logits fp32 [B, q, vocab_size]; differentiable while torch records gradients.
        """
        refuse("forward", kwargs, known=("num_items_in_batch",))
        if input_ids is None:
            raise ValueError("input_ids must be a tensor [B, q], got None")
        rows = input_ids.shape[0]
        strength = checked_alpha(self.alpha if alpha is None else alpha, rows)
        own = {
            "expert_input_ids": expert_input_ids,
            "expert_attention_mask": expert_attention_mask,
            "anti_input_ids": anti_input_ids,
            "anti_attention_mask": anti_attention_mask,
        }
        cache = checked_cache(past_key_values if cache is None else cache)
        if cache is None and (self._keeps_cache() if use_cache is None else use_cache):
            cache = RoleCaches.make(self.models, cache_maker("dynamic", 0))
        roles = role_logits(
            {role: self.models[role] for role in roles_to_run(cache, strength)},
            input_ids,
            attention_mask,
            position_ids,
            cache,
            logits_to_keep,
            prompts_of(own, rows),
            prompt_length,
        )
        logits = _combined(roles, strength, self.config.vocab_size)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        named: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **named)

    def _keeps_cache(self) -> bool:
        # Layers that are run anew for their gradients leave nothing in a cache.
        anew = self.training and self.is_activation_checkpointing
        return bool(self.config.use_cache) and not anew


def _is_one(prompts: Any) -> bool:
    """Whether a list is one prompt: token ids, or chat messages."""
    first = prompts[0]
    return isinstance(first, int) or (isinstance(first, Mapping) and "content" in first)


def _combined(roles: Mapping[str, Tensor], alpha: float | Tensor, vocab_size: int) -> Tensor:
    """Combined logits, fp32 [B, q, vocab_size], of each role's [B, q, V_role].

    One fused pass where no gradient is wanted; else torch's own operators, which can be
    differentiated (also by alpha).
    """
    tensors = [*roles.values(), *([alpha] if isinstance(alpha, Tensor) else [])]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        base, *pair = (x[..., :vocab_size].float() for x in roles.values())
        if not pair:
            return base
        each = alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha
        return base + each * (pair[0] - pair[1])
    rows, width = roles["base"].shape[:2]
    flat = {role: x.flatten(0, 1) for role, x in roles.items()}
    if isinstance(alpha, Tensor):
        alpha = alpha.to(flat["base"].device, torch.float32)
        alpha = alpha.repeat_interleave(width) if width > 1 else alpha
    x = ops.combine(
        flat["base"], flat.get("expert"), flat.get("anti"), alpha, vocab_size=vocab_size
    )
    return x.view(rows, width, vocab_size)


AutoModelForCausalLM.register(ProxyTunedConfig, ProxyTunedForCausalLM)
