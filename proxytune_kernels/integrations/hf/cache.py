"""Transformers' own caches, one per role, and forwards of the unchanged models over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, StaticCache

from proxytune_kernels.decoder.cache import cache_keyword
from proxytune_kernels.decoder.model import Forward, input_device
from proxytune_kernels.integrations.hf.inputs import Prompts, positions, prompt_columns
from proxytune_kernels.trio.roles import ROLES

CACHE = cache_keyword(GenerationMixin.prepare_inputs_for_generation)
"""How the installed transformers names the cache among the arguments and outputs of a model."""

Maker = Callable[[Any], Cache]
"""A model's configuration -> its empty cache."""


def cache_maker(implementation: str | None, max_length: int) -> Maker:
    """What makes a member's cache for a ``cache_implementation`` of a generation config.

    Args:
        implementation: ``"dynamic"``, ``"offloaded"``, ``"static"`` or ``"offloaded_static"``;
            None is dynamic.
        max_length: tokens that a static cache holds.

    Raises:
        ValueError: another one.
    """
    if implementation in (None, "dynamic", "offloaded"):
        offloading = implementation == "offloaded"
        return lambda config: DynamicCache(config=config, offloading=offloading)
    if implementation in ("static", "offloaded_static"):
        offloading = implementation == "offloaded_static"
        return lambda config: StaticCache(
            config=config, max_cache_len=max_length, offloading=offloading
        )
    raise ValueError(
        "cache_implementation must be one of dynamic, offloaded, static, offloaded_static or None, "
        f"got {implementation!r}"
    )


class RoleCaches(Cache):
    """A transformers cache for each role; what is done to one is done to all.

    A role may have read another prompt than the base, so its cache may be longer or shorter.
    What ``generate()`` sees of it is the base's.

    Args:
        caches: role -> cache, the base's first.
    """

    def __init__(self, caches: Mapping[str, Cache]) -> None:
        self.caches = dict(caches)
        # The layers are those of the caches: cropping, reordering and the like reach all of them.
        super().__init__(layers=[layer for cache in caches.values() for layer in cache.layers])
        self.roles: tuple[str, ...] = ()
        """The roles whose tokens it holds; none while it is empty."""
        self.masks: dict[str, Tensor] = {}
        """Role -> int64 [B, columns], 1 for a token and 0 for padding, of roles that have read a
        prompt of their own; others share the base's, which ``generate()`` keeps."""

    @classmethod
    def make(cls, models: Mapping[str, Any], maker: Maker) -> RoleCaches:
        """Empty caches for these models."""
        return cls({role: maker(model.config) for role, model in models.items()})

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: each model writes into its own cache."""
        raise TypeError("RoleCaches holds a cache per role: write into one of .caches")

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of every role; the number is negative or 0."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.masks = {role: mask[:, :tokens_to_remove] for role, mask in self.masks.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let row i of every role be what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        self.masks = {r: mask[beam_idx.to(mask.device)] for r, mask in self.masks.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self.masks = {r: mask.repeat_interleave(repeats, 0) for r, mask in self.masks.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self.masks = {r: mask[indices.to(mask.device)] for r, mask in self.masks.items()}

    def reset(self) -> None:
        """Empty the caches."""
        super().reset()
        self.roles, self.masks = (), {}


def checked_cache(cache: Any) -> RoleCaches | None:
    """A cache that a call hands in; ValueError unless it is one of this model, or None."""
    if cache is None or isinstance(cache, RoleCaches):
        return cache
    raise ValueError(
        f"{CACHE} must be a cache that this model gave back, which has the tokens of all roles, or "
        f"None to begin one, got {type(cache).__name__}"
    )


def roles_to_run(cache: RoleCaches | None, alpha: float | Tensor) -> tuple[str, ...]:
    """Which roles a forward runs: all, or the base alone where nothing is steered.

    A cache goes on with the roles that it was filled with, so that it holds the same tokens of all.

    Args:
        alpha: a number or a tensor [B], which may be of zeros and runs all.

    Raises:
        ValueError: alpha steers, and the cache has the base's tokens alone.
    """
    rests = not isinstance(alpha, Tensor) and alpha == 0
    held = () if cache is None else cache.roles
    if held and held != ROLES and not rests:
        raise ValueError(
            "past_key_values must hold the tokens of expert and anti to steer, got a cache filled "
            "at alpha 0, where they rest: fill one with alpha as a tensor of zeros"
        )
    return held or (ROLES[:1] if rests else ROLES)


def role_logits(
    models: Mapping[str, Any],
    input_ids: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    caches: RoleCaches | None,
    keep: int,
    own: Prompts,
    prompt_length: int | None,
) -> dict[str, Tensor]:
    """Run models as they are, one after another, over transformers' caches.

    Arguments as in :meth:`ProxyTunedForCausalLM.forward`; a mask by role is as that role's layers
    take it.

    Returns:
        Role -> logits [B, q, V_role] of the last q tokens, on the base's device.
    """
    length = prompt_columns(prompt_length, caches, input_ids)
    seen = {r: 0 if caches is None else caches.caches[r].get_seq_length() for r in models}
    # Prompts that are behind say nothing any more; calls go on to carry them.
    own = {r: prompt for r, prompt in own.items() if seen[r] < prompt[0].shape[1]}
    found = {}
    for role, model in models.items():
        cache = None if caches is None else caches.caches[role]
        ids, place = input_ids, position_ids
        mask = attention_mask[role] if isinstance(attention_mask, dict) else attention_mask
        if role in own or (caches is not None and role in caches.masks):
            ids, mask = _own_inputs(
                role, input_ids, attention_mask, caches, own, seen[role], length
            )
            place = None
        if place is None and isinstance(mask, Tensor) and mask.dim() == 2:
            place = positions(mask)[:, -ids.shape[1] :]
        found[role] = _run(model, ids, mask, place, cache, keep)
    if caches is not None and not caches.roles:
        caches.roles = tuple(models)
    if own:
        # Prompts of several lengths have their last logits in common.
        shared = min(input_ids.shape[1] - length + 1, *(x.shape[1] for x in found.values()))
        found = {role: logits[:, -shared:] for role, logits in found.items()}
    device = found["base"].device
    return {role: logits.to(device) for role, logits in found.items()}


def _own_inputs(
    role: str,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    caches: RoleCaches | None,
    own: Prompts,
    seen: int,
    length: int,
) -> tuple[Tensor, Tensor]:
    """A role's new tokens and its mask over all tokens, where it reads another prompt."""
    if role in own:
        prompt, mask = own[role]
        drafts = input_ids[:, length:]
        ids = torch.cat([prompt[:, seen:], drafts], 1)
        mask = torch.cat([mask, torch.ones_like(drafts)], 1)
    else:
        assert caches is not None
        ids, width = input_ids, input_ids.shape[1]
        new = torch.ones_like(ids) if attention_mask is None else attention_mask[:, -width:]
        mask = torch.cat([caches.masks[role], new.to(caches.masks[role])], 1)
    if caches is not None:
        caches.masks[role] = mask
    return ids, mask


def _run(
    model: Any, input_ids: Tensor, mask: Any, place: Tensor | None, cache: Any, keep: int
) -> Tensor:
    device = input_device(model)
    return Forward(model)(
        input_ids.to(device),
        keep=keep,
        cache=cache,
        attention_mask=mask.to(device) if isinstance(mask, Tensor) else mask,
        position_ids=None if place is None else place.to(device),
    )
