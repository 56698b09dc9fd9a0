"""One model over rows of a slot cache: prompts into rows, or new tokens behind what they hold."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from proxytune_kernels.decoder.attention import ATTENTION_NAME
from proxytune_kernels.decoder.cache import CacheStep, SlotCache
from proxytune_kernels.decoder.compiled import CompiledStep
from proxytune_kernels.decoder.slim import slim
from proxytune_kernels.trio.adapters import copy_modules

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_model(role: str, model: Module) -> None:
    """Refuse a model whose layers a slot cache cannot serve.

    Raises:
        ValueError: names the role, the model and what it lacks.
    """
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


def sharing_copy(model: Module) -> Any:
    """A copy of a model's modules and configuration that shares every weight, with our attention.

    The attention implementation is read from the configuration that a model's layers share. Set on
    the caller's own model it would change what that model does outside the decoder.
    """
    twin = copy_modules(model).eval()
    twin.set_attn_implementation(ATTENTION_NAME)
    return twin


class Member:
    """A model, and the rows of a slot cache that are its own: every ``stride``-th from ``first``.

    Args:
        model: from :func:`sharing_copy`; it is changed.
        cache: its keys and values; other members may have other rows of it.
        first, stride: slot s of this member is row first + s * stride.
        rows_per_slot: 2 for expert and anti as one batch (see
            :func:`~proxytune_kernels.decoder.pair.shared.adapted_pair`), whose rows alternate.
        compile: run forwards of one token a row through torch.compile.
    """

    def __init__(
        self,
        model: Any,
        cache: SlotCache,
        *,
        first: int = 0,
        stride: int = 1,
        rows_per_slot: int = 1,
        compile: bool = False,
    ) -> None:
        if not compile:
            slim(model)
        self.model = model
        self.cache = cache
        self._first, self._stride, self._rows_per_slot = first, stride, rows_per_slot
        accepted = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        self._token_ids = torch.zeros((cache.rows, 1), dtype=torch.int64, device=cache.device)
        self._compiled = CompiledStep(self._last, _windows(model.config)) if compile else None

    def over(self, cache: SlotCache) -> Member:
        """The same model over rows of another cache, laid out alike."""
        other = copy.copy(self)
        other.cache = cache
        other._token_ids = self._token_ids.new_zeros((cache.rows, 1))
        return other

    def rows(self, slots: int) -> range:
        """The rows of the first ``slots`` slots."""
        end = self._first + slots * self._rows_per_slot * self._stride
        return range(self._first, end, self._stride)

    def forward(self, token_ids: Tensor, offset: int = 0, length: int | None = None) -> Tensor:
        """Run q new tokens in each of the first slots; the lengths stay.

        Args:
            token_ids: int64 [B, q], for the first B slots; the same for all rows of a slot.
            offset: how many tokens behind a row's length they go.
            length: keys to attend over; the longest row's unless told.

        Returns:
            Logits [B, q, V], or [2 B, q, V] where a slot has two rows.
        """
        rows = self.rows(token_ids.shape[0])
        width = token_ids.shape[1]
        if self._rows_per_slot > 1:
            token_ids = token_ids.repeat_interleave(self._rows_per_slot, 0)
        if self._compiled is not None and width == 1 and length is None:
            step = self.cache.step(rows, width, offset, indexed=True)
            # Always the same tensor: a graph is compiled for kinds of tensors, too.
            inputs = self._token_ids[: token_ids.shape[0]].copy_(token_ids)
            return self._compiled(inputs, step)[:, None]
        step = self.cache.step(rows, width, offset, length=length)
        return self._run(token_ids, step, 0 if width > 1 else 1)

    def prefill(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Run whole prompts into empty slots; logits [B, V] after their last tokens.

        Where a slot has two rows both get its prompt, and B is twice the number of slots.
        """
        each = range(self._rows_per_slot)
        step_of_slot = self._rows_per_slot * self._stride
        rows = [self._first + s * step_of_slot + i * self._stride for s in slots for i in each]
        prompts = [prompt for prompt in token_ids for _ in each]
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        step = self.cache.fresh_step(rows, width)
        # Of each row the logits after the last token of any: of rows x lengths the diagonal counts.
        ends = sorted(set(lengths))
        device = self.cache.device
        keep = 1 if len(ends) == 1 else torch.tensor(ends, device=device) - 1
        logits = self._run(torch.tensor(padded, device=device), step, keep)
        for row, length in zip(rows, lengths, strict=True):
            self.cache.set_length(row, length)
        if len(ends) == 1:
            return logits[:, 0]
        place = torch.tensor([ends.index(n) for n in lengths], device=logits.device)
        return logits[torch.arange(len(rows), device=logits.device), place]

    def extend(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        """Run a part of a prompt behind what a slot holds; logits [1 or 2, V] after its end."""
        start = self._first + slot * self._rows_per_slot * self._stride
        rows = range(start, start + self._rows_per_slot * self._stride, self._stride)
        inputs = torch.tensor([token_ids] * len(rows), device=self.cache.device)
        logits = self._run(inputs, self.cache.step(rows, len(token_ids)), 1)
        for row in rows:
            self.cache.set_length(row, self.cache.lengths[row] + len(token_ids))
        return logits[:, 0]

    def warm_up(self) -> None:
        """Compile all there is to compile; the slots must be empty, and are again."""
        if self._compiled is None:
            return
        # The layers' memory is taken before, so that no graph is made for its being absent.
        self.prefill([0], [[0]])
        slots = len(range(self._first, self.cache.rows, self._stride * self._rows_per_slot))
        several = self._rows_per_slot > 1
        for lengths in self._compiled.warm_up_lengths(slots, self.cache.max_seq_len, several):
            rows = self.rows(len(lengths))
            for row in rows:
                self.cache.set_length(row, lengths[0])
            # The rows differ where there are several.
            self.cache.set_length(rows[-1], lengths[-1] if not several else lengths[-1] - 1)
            self.forward(self._token_ids[: len(lengths)])
            for row in rows:
                self.cache.release(row)

    def _last(self, token_ids: Tensor, step: CacheStep) -> Tensor:
        return self._run(token_ids, step, 1)[:, 0]

    def _run(self, token_ids: Tensor, step: CacheStep, keep: int | Tensor) -> Tensor:
        """Logits [B, n, V] of the tokens to keep: the last ``keep``, 0 for all, or by index."""
        keywords = {"logits_to_keep": keep} if self._keeps_logits else {}
        output = self.model(
            input_ids=token_ids,
            position_ids=step.position_ids,
            past_key_values=step,
            use_cache=True,
            cache_step=step,
            **keywords,
        )
        logits: Tensor = output.logits
        if not self._keeps_logits and not (isinstance(keep, int) and keep == 0):
            logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        # The ops take fp32 and narrower.
        return logits.float() if logits.dtype == torch.float64 else logits


def _windows(config: Any) -> list[int | None]:
    """The attention windows of a model's layers, each once; None is full attention."""
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None) or ["sliding_attention"]
    return list({window if kind == "sliding_attention" else None: None for kind in types})
