"""How expert and anti-expert run: apart, or as one batch of two rows a slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxytune_kernels.decoder.adapted import adapted_pair, is_adapted
from proxytune_kernels.decoder.member import sharing_copy

PAIR = ("expert", "anti")
PAIR_MODES = ("shared", "batched", "separate")
"""``"shared"``: the anti's weights once, and a LoRA adapter on the expert's rows. ``"batched"``:
both models' weights stacked, one batched product a layer. ``"separate"``: a forward each."""

Trees = dict[tuple[str, ...], Any]


def pair_models(models: Mapping[str, Any], mode: str | None) -> tuple[str | None, Trees]:
    """The modules that run expert and anti, by the roles they run.

    Args:
        models: role -> causal LM; without the pair there is nothing to run.
        mode: one of :data:`PAIR_MODES`; None is ``"shared"`` where the expert is the anti plus an
            adapter, else ``"separate"``.

    Returns:
        The mode (None without a pair) and copies of the models' modules that share their weights.

    Raises:
        ValueError: an unknown mode, or a pair that can't run so; says why.
    """
    if mode is not None and mode not in PAIR_MODES:
        raise ValueError(f"pair must be one of {', '.join(PAIR_MODES)} or None, got {mode!r}")
    if "expert" not in models:
        if mode is not None:
            raise ValueError(f"pair must be None where the base runs alone, got {mode!r}")
        return None, {}
    expert, anti = models["expert"], models["anti"]
    adapted = is_adapted(expert)
    mode = mode or ("shared" if adapted else "separate")
    if mode == "batched":
        from proxytune_kernels.decoder.stacked import stacked_pair

        return mode, {
            PAIR: stacked_pair(sharing_copy(expert), sharing_copy(anti)),
            ("expert",): sharing_copy(expert),
            ("anti",): sharing_copy(anti),
        }
    if mode == "separate" and not adapted:
        return mode, {("expert",): sharing_copy(expert), ("anti",): sharing_copy(anti)}
    if not adapted:
        raise ValueError(
            "pair='shared' takes an expert that is the anti with a LoRA adapter, not merged "
            f"(load_trio(merge_adapter=False)), got {type(expert).__name__} without one"
        )
    both, alone = adapted_pair(sharing_copy(expert), sharing_copy(anti))
    trees: Trees = {("expert",): alone, ("anti",): sharing_copy(anti)}
    return mode, trees if mode == "separate" else {PAIR: both, **trees}
