"""How expert and anti-expert run: apart, or as one batch of two rows a slot."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from proxytune_kernels.decoder.model import with_slot_attention
from proxytune_kernels.decoder.pair.batched import batched_pair
from proxytune_kernels.decoder.pair.shared import PairError, has_lora, shared_pair
from proxytune_kernels.trio.llama_cpp import LlamaModel
from proxytune_kernels.trio.roles import PAIR

PAIR_MODES = ("shared", "batched", "separate")
"""``"shared"``: the anti's weights once, and a LoRA adapter on the expert's rows. ``"batched"``:
both models' weights stacked, one batched product a layer. ``"separate"``: a forward each."""

_MAX_BATCHED = 2**24
"""Parameters up to which one batched product a layer is chosen on a CPU. Measured on one core of an
AVX-512 Xeon, four layers, two forwards over a batched one: 1.8 (0.7 M, fp32, one row), 1.36 (5 M),
1.19 (17 M), 1.08 (35 M); 1.6, 1.46, 1.17, 1.07 in bf16; at eight rows 1.05 to 1.57."""

Trees = dict[tuple[str, ...], Any]


def pair_models(
    models: Mapping[str, Any], mode: str | None, *, may_batch: bool = True
) -> tuple[str | None, Trees]:
    """The modules that run expert and anti, by the roles they run.

    Args:
        models: role -> causal LM; without the pair there is nothing to run.
        mode: one of :data:`PAIR_MODES`; None is ``"shared"`` where the expert is the anti plus an
            adapter, else ``"batched"`` for small models on a CPU, else ``"separate"``.
        may_batch: whether None may be ``"batched"``.

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
    elsewhere = [role for role in PAIR if isinstance(models[role], LlamaModel)]
    if elsewhere and mode not in (None, "separate"):
        raise ValueError(
            f"pair must be 'separate' where llama.cpp runs {elsewhere[0]}, got {mode!r}"
        )
    expert, anti = (with_slot_attention(models[role]) for role in PAIR)
    apart: Trees = {("expert",): expert, ("anti",): anti}
    lora = has_lora(expert)
    if mode == "batched":
        return mode, {PAIR: batched_pair(expert, anti), **apart}
    if mode is None and not lora:
        if may_batch and not elsewhere and _is_small(expert) and _is_small(anti):
            # Models of two shapes, or with layers that can't be batched, are no pair.
            with suppress(PairError):
                return "batched", {PAIR: batched_pair(expert, anti), **apart}
        mode = "separate"
    mode = mode or "shared"
    if mode == "separate" and not lora:
        return mode, apart
    if not lora:
        raise ValueError(
            "pair='shared' takes an expert that is the anti with a LoRA adapter, not merged "
            f"(load_trio(merge_adapter=False)), got {type(expert).__name__} without one"
        )
    both, alone = shared_pair(expert, anti)
    apart["expert",] = alone
    return mode, apart if mode == "separate" else {PAIR: both, **apart}


def _is_small(model: Any) -> bool:
    tensors = list(model.parameters())
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    return on_cpu and sum(tensor.numel() for tensor in tensors) <= _MAX_BATCHED
