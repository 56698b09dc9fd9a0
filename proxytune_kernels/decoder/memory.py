"""Memory, planned before the first token: what keys and values take, and how many slots fit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from proxytune_kernels.decoder.cache import Layer, Part, row_capacity
from proxytune_kernels.decoder.check import first_layers, kinds_of_layers, ordinary_ids
from proxytune_kernels.decoder.model import Forward, input_device
from proxytune_kernels.decoder.remote import TEXT_LAYER
from proxytune_kernels.decoder.states import is_recurrent
from proxytune_kernels.trio.llama_cpp import LlamaModel
from proxytune_kernels.trio.quantization import plain_tensors
from proxytune_kernels.trio.remote import RemoteModel

_SHARE = 0.9
"""Of what is free, keys and values may take this much; activations, logits and captured steps need
the rest."""
_MOST_SLOTS, _FEWER_SLOTS = 256, 16
"""``max_batch_size=None`` takes no more, on CUDA and elsewhere: steps of more rows take longer."""


def layers_of(model: Any) -> list[Layer] | None:
    """The keys and values of each layer of a causal LM; None where that can't be told.

    It can't where layers are recurrent, which may have none: they are taken as they are written. Of
    a GGUF file all layers count as its first, and keys and values as fp16, as llama.cpp holds them.
    """
    if isinstance(model, RemoteModel):
        return [TEXT_LAYER]
    if isinstance(model, LlamaModel):
        heads, *sizes = model.head_sizes()
        key, value = (Part(heads, size, torch.float16, model.device) for size in sizes)
        return [(key, value)] * model.config.num_hidden_layers
    written = None if is_recurrent(model) else _written(model)
    if written is None or any(getattr(layer, "values", None) is None for layer in written):
        return None
    return [(Part.of(layer.keys), Part.of(layer.values)) for layer in written]


def _written(model: Any) -> list[Any] | None:
    """Each layer of a cache of transformers after one token; None where that can't be told.

    Of layers that are alike the token runs through the first alone.
    """
    depth, kinds = kinds_of_layers(model)
    if depth is None and any(p.device.type == "meta" for p in model.parameters()):
        return None  # weights that are loaded as they are needed: that would take too long
    from transformers import DynamicCache

    recurrent = is_recurrent(model)
    cache = DynamicCache(config=model.config) if recurrent else DynamicCache()
    short = model if depth is None else first_layers(model, depth)
    device = input_device(model)
    gpus = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(gpus):
            token_ids = torch.tensor([ordinary_ids(model)[:1]], device=device)
            Forward(short)(token_ids, keep=1, cache=cache)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        return None  # what is wrong with it, the check will say
    seen: list[Any] = list(cache.layers)
    if depth is None:
        return seen
    # As many as ran; a model that is being trained, or shares keys, has others.
    right = recurrent or len(seen) == min(depth, len(kinds))
    return [seen[kinds.index(k)] for k in kinds] if right else None


def _recurrent_bytes(model: Any, capacity: int) -> Counter[torch.device]:
    """What a slot of a model with recurrent layers takes: keys and values, and states."""
    found: Counter[torch.device] = Counter()
    for layer in _written(model) or ():
        for x in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if x is not None:
                found[x.device] += Part.of(x).nbytes() * capacity
        for name in ("conv_states", "recurrent_states"):
            for x in getattr(layer, name, {}).values():
                if x is not None:
                    found[x.device] += x.nbytes
    return found


def slots(
    models: Mapping[str, Any],
    layers: Mapping[str, Sequence[Layer]],
    wanted: int | None,
    max_seq_len: int,
    slack: int,
    copied: Sequence[Any] = (),
) -> int:
    """How many slots there are: as many as wanted, or, for None, as many as fit.

    Args:
        models: role -> causal LM, in place.
        layers: of each role, see :func:`layers_of`.
        wanted: ``max_batch_size``.
        max_seq_len, slack: tokens of a row, as :class:`~proxytune_kernels.decoder.cache.SlotCache`
            takes them.
        copied: models whose weights the decoder is going to hold once more.

    Raises:
        ValueError: they don't fit; with the bytes of weights, of the cache and of what is free.
    """
    each: Counter[torch.device] = Counter()
    for part in (part for role in layers.values() for layer in role for part in layer):
        each[part.device] += part.nbytes() * row_capacity(max_seq_len, slack)
    for model in filter(is_recurrent, models.values()):
        each += _recurrent_bytes(model, row_capacity(max_seq_len, slack))
    fit = wanted
    if fit is None:
        fit = _MOST_SLOTS if input_device(models["base"]).type == "cuda" else _FEWER_SLOTS
    weights = _bytes(list(models.values()))
    more = _bytes(copied)
    for device, one in each.items():
        free = free_bytes(device)
        if free is None or one == 0:
            continue
        room = max(0, int(_SHARE * (free - more)))
        most = room // one
        if most >= (wanted or 1):
            fit = min(fit, most)
            continue
        count = wanted or 1
        what = (
            f"keys and values of {count} slot{'s' * (count > 1)} of {max_seq_len} tokens take "
            f"{_gb(count * one)} on {device}, beside {_gb(weights)} of weights; of the {_gb(free)} "
            f"that are free there they may take {_gb(room)}"
        )
        if most:
            raise ValueError(
                f"max_batch_size must be at most {most}, got {wanted}: {what} "
                f"(None takes what fits; a shorter max_seq_len lets more fit)"
            )
        raise ValueError(
            f"max_seq_len must be so short that a slot fits, got {max_seq_len}: {what}"
        )
    return fit


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be taken on a device; None where that can't be told."""
    if device.type == "cuda":
        # What torch keeps of memory that was given back can be taken, too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return _free_memory() if device.type == "cpu" else None


def _free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that processes may still take, as the system or its container says."""
    found = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")]
    except (OSError, ValueError):
        pass
    if not found and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
        stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
        # Pages of files are given back where there is need.
        found.append(max(0, limit - used + int(stat.get("file", 0))))
    except (OSError, ValueError):
        pass  # no container, or one without a limit ("max")
    return min(found, default=None)


def _bytes(models: Sequence[Any]) -> int:
    """Bytes of the models' weights; those that are shared count once."""
    found = {
        id(plain): plain.numel() * plain.element_size()
        for model in models
        for parameter in model.parameters()
        for plain in plain_tensors(parameter)
        if plain.device.type != "meta"
    }
    return sum(found.values())


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
