"""Transformers' own caches, one per role, that move together: the cache that every model can use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

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

    A role may have read another prompt than the base, so its cache may be longer or shorter. Its
    face to ``generate()`` is the base's.

    Args:
        caches: role -> cache, the base's first.
    """

    def __init__(self, caches: Mapping[str, Cache]) -> None:
        self.caches = dict(caches)
        # The layers are those of the caches: cropping, reordering and the like reach all of them.
        super().__init__(layers=[layer for cache in caches.values() for layer in cache.layers])
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
        self.masks = {}
