"""Runs the models of a trio: a prompt into a slot, or one more token for each slot."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from proxytune_kernels.decoder.attention import ATTENTION_NAME, register_attention
from proxytune_kernels.decoder.cache import CacheStep, SlotCache
from proxytune_kernels.decoder.compiled import CompiledStep
from proxytune_kernels.decoder.slim import slim

_LAYER_TYPES = {"full_attention", "sliding_attention"}


class RoleRunner:
    """One model with its slot cache.

    Args:
        role: the model's role, for messages.
        model: a transformers causal LM. It is not changed: the runner works on a copy of its
            modules that shares every weight and has its own configuration.
        max_batch_size: number of slots.
        max_seq_len: tokens a slot can hold.
        compile: run decoding steps through torch.compile.

    Raises:
        ValueError: the model has layers that a slot cache cannot serve.
    """

    def __init__(
        self,
        role: str,
        model: Module,
        max_batch_size: int,
        max_seq_len: int,
        *,
        compile: bool = False,
    ) -> None:
        _check_model(role, model)
        self.role = role
        self.device = next(model.parameters()).device
        self.model = _sharing_copy(model)
        if not compile:
            slim(self.model)
        self.cache = SlotCache(max_batch_size, max_seq_len, self.device)
        # Always the same tensor, for graphs that are compiled or captured around it.
        self._token_ids = torch.zeros((max_batch_size, 1), dtype=torch.int64, device=self.device)
        accepted = inspect.signature(model.forward).parameters
        self._keywords = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._compiled = CompiledStep(self._forward, _windows(model.config)) if compile else None

    def prefill(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Run equally long prompts into empty slots; logits [B, V] after their last tokens."""
        step = self.cache.prefill_step(slots, len(token_ids[0]))
        return self._forward(torch.tensor(token_ids, device=self.device), step)

    def decode(self, token_ids: Tensor) -> Tensor:
        """Run one token in each of the first slots, token_ids int64 [B, 1]; logits [B, V]."""
        rows = token_ids.shape[0]
        inputs = self._token_ids[:rows].copy_(token_ids)
        forward = self._forward if self._compiled is None else self._compiled
        return forward(inputs, self.cache.decode_step(rows))

    def warm_up(self) -> None:
        """Compile all there is to compile; the slots must be empty, and are again."""
        if self._compiled is None:
            return
        self.prefill([0], [[0]])
        sizes = (self.cache.max_batch_size, self.cache.max_seq_len)
        for lengths in self._compiled.warm_up_lengths(*sizes):
            for slot, length in enumerate(lengths):
                # The forward's cost depends on the lengths; what the slots hold doesn't matter.
                self.cache.prefill_step([slot], length)
            self.decode(self._token_ids[: len(lengths)])
            for slot in range(len(lengths)):
                self.cache.release(slot)

    def _forward(self, token_ids: Tensor, step: CacheStep) -> Tensor:
        output = self.model(
            input_ids=token_ids,
            position_ids=step.position_ids,
            past_key_values=step,
            use_cache=True,
            cache_step=step,
            **self._keywords,
        )
        logits: Tensor = output.logits[:, -1]
        # The ops take fp32 and narrower.
        return logits.float() if logits.dtype == torch.float64 else logits


class Runner:
    """All roles' models in step; every role has its own cache and its own lengths.

    Args:
        models: role -> causal LM, in the order base, expert, anti; or base alone.
        max_batch_size: number of slots.
        max_seq_len: tokens a slot can hold, for each role.
        compile: run decoding steps through torch.compile.
    """

    def __init__(
        self,
        models: Mapping[str, Module],
        max_batch_size: int,
        max_seq_len: int,
        *,
        compile: bool = False,
    ) -> None:
        register_attention()
        self.roles = {
            role: RoleRunner(role, model, max_batch_size, max_seq_len, compile=compile)
            for role, model in models.items()
        }
        self.device = self.roles["base"].device

    @torch.inference_mode()
    def prefill(
        self, slots: Sequence[int], prompts: Mapping[str, Sequence[Sequence[int]]]
    ) -> list[Tensor]:
        """Run prompts into empty slots; per role the logits [B, V] for the first output tokens.

        Args:
            slots: B empty slots.
            prompts: per role B prompts of one length; the lengths of two roles may differ.
        """
        logits = (runner.prefill(slots, prompts[role]) for role, runner in self.roles.items())
        return [x.to(self.device) for x in logits]

    @torch.inference_mode()
    def decode(self, token_ids: Tensor) -> list[Tensor]:
        """Run one token int64 [B, 1] in each of the first B slots; per role the logits [B, V]."""
        logits = (runner.decode(token_ids) for runner in self.roles.values())
        return [x.to(self.device) for x in logits]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile all there is to compile; the slots must be empty, and are again."""
        for runner in self.roles.values():
            runner.warm_up()

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Move a slot's content to an empty slot."""
        for runner in self.roles.values():
            runner.cache.move(source, target)

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Empty a slot."""
        for runner in self.roles.values():
            runner.cache.release(slot)

    def cache_bytes(self) -> int:
        """Bytes reserved for keys and values."""
        return sum(runner.cache.nbytes() for runner in self.roles.values())


def _windows(config: Any) -> list[int | None]:
    """The attention windows of a model's layers, each once; None is full attention."""
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None) or ["sliding_attention"]
    return list({window if kind == "sliding_attention" else None: None for kind in types})


def _sharing_copy(model: Module) -> Any:
    # The attention implementation is read from the configuration that a model's layers share. Set
    # on the caller's own model it would change what that model does outside the decoder.
    tensors = (*model.parameters(), *model.buffers())
    twin: Any = copy.deepcopy(model, {id(t): t for t in tensors}).eval()
    twin.set_attn_implementation(ATTENTION_NAME)
    return twin


def _check_model(role: str, model: Module) -> None:
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{role} must be a model whose attention transformers can exchange, got {name}, "
            f"which does not support that"
        )
    config: Any = model.config
    types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if not types <= _LAYER_TYPES:
        raise ValueError(
            f"{role} must have layers of {' and '.join(sorted(_LAYER_TYPES))} only, "
            f"got {name} with {', '.join(sorted(types - _LAYER_TYPES))}"
        )
