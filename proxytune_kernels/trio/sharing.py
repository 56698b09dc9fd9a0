"""Copies a model's modules without copying its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any


def sharing_copy(model: Any) -> Any:
    """A copy of a model's modules and configuration that holds the same parameters and buffers.

    What accelerate offloaded stays where it lies, once for both, and the copy's hooks bring it into
    the copy.
    """
    return copy.deepcopy(model, {id(held): held for held in _held(model)})


def _held(model: Any) -> Iterator[Any]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for part in getattr(hook, "hooks", [hook]):
            for name in ("weights_map", "tied_params_map"):
                held = getattr(part, name, None)
                if held is not None:
                    yield held
