"""What a caller gives the model: each error names the argument, got and wanted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.models.utils import resolve_max_length

from proxytune_kernels.decoder.arguments import size
from proxytune_kernels.trio import Trio, load_trio

_log = logging.getLogger(__name__)

_LM_EVAL_DEVICE = "cuda:0"
"""What lm_eval's command line passes where it is given no device."""


def open_trio(trio: Any, device: str | None, loading: Mapping[str, Any]) -> Trio:
    """The trio itself, or loaded; with one prompt for all roles."""
    if isinstance(trio, Trio):
        if loading:
            raise ValueError(f"{next(iter(loading))} must not be given with a Trio")
        opened = trio
    else:
        if device == _LM_EVAL_DEVICE and not torch.cuda.is_available():
            _log.warning(
                "device is the CPU: torch has no CUDA device here, and cuda:0 is what "
                "lm_eval asks for where --device is not given"
            )
            device = "cpu"
        opened = load_trio(trio, device=device, **loading)
    chat = [role for role, style in opened.prompts.items() if style == "chat"]
    if chat:
        raise ValueError(
            f"prompts of {', '.join(chat)} must be 'plain', got 'chat': lm_eval gives one context "
            "for all roles (--apply-chat-template makes it a chat for all of them)"
        )
    return opened


def positive(name: str, value: Any) -> int:
    """A count of at least 1, perhaps written out."""
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    return size(name, value)


def shortest_context(trio: Trio, value: int | None) -> int:
    """``max_length``: as asked for, or the shortest context of the roles."""
    contexts: dict[str, int] = {
        role: resolve_max_length(model.config.get_text_config(decoder=True), trio.tokenizer)
        for role, model in trio.models.items()
    }
    shortest = min(contexts, key=contexts.__getitem__)
    if value is None:
        return contexts[shortest]
    if positive("max_length", value) > contexts[shortest]:
        raise ValueError(
            f"max_length must be at most {contexts[shortest]}, the context of {shortest}, "
            f"got {value}"
        )
    return value
