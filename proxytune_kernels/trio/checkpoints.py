"""Opens a model or a tokenizer from a directory or hub name, in safetensors or GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
# What accelerate spreads over all devices by itself.
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


class LoadError(ValueError):
    """A model or tokenizer cannot be opened."""


@dataclass(frozen=True)
class LoadOptions:
    """How one role's model is opened.

    Args:
        dtype: of the weights; "auto" is the checkpoint's.
        device: where the weights go; None where ``device_map`` says.
        device_map: what transformers' ``from_pretrained`` takes, or None.
        quantize: ``"int8"``, ``"int4"`` or None.
        gguf_file: name of a GGUF file in the directory, unpacked to ``dtype``.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """

    dtype: str | torch.dtype = "auto"
    device: str | torch.device | None = "cpu"
    device_map: Any = None
    quantize: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False


def resolve(reference: str | Path, directory: Path | None) -> str:
    """A path inside ``directory`` if there is one of that name, else the reference as it is."""
    if directory is not None and (directory / reference).exists():
        return str(directory / reference)
    return str(reference)


def check_dtype(role: str, dtype: Any) -> str | torch.dtype:
    """Check a dtype: "auto", a floating-point dtype of torch, or its name."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype of {role} must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return name if name == "auto" else getattr(torch, name)


def check_device_map(role: str, device_map: Any) -> Any:
    """Check a device map: a way to spread the layers, a device, or a mapping of modules to them."""
    if find_spec("accelerate") is None:
        raise LoadError(f"device_map of {role} needs accelerate: pip install accelerate")
    if isinstance(device_map, str) and device_map in _SPREADS:
        return device_map
    mapped = isinstance(device_map, Mapping)
    for place in device_map.values() if mapped else [device_map]:
        if mapped and place == "disk":
            continue
        reason = device_unusable(place)
        if reason is not None:
            raise ValueError(
                f"device_map of {role} must be one of {', '.join(_SPREADS)}, a device, or a "
                f"mapping from module names to devices or 'disk', got {device_map!r}: {reason}"
            )
    return device_map


def device_unusable(device: Any) -> str | None:
    """Why torch can't use a device here; None where it can."""
    try:
        torch.empty(0, device=device)
    # torch built without CUDA answers with an AssertionError.
    except (RuntimeError, TypeError, AssertionError) as error:
        return str(error).split("\n")[0]
    return None


def open_checkpoint(role: str, reference: str, options: LoadOptions) -> Any:
    """A transformers causal LM as its checkpoint has it, placed by its device map if there is one.

    Args:
        role: base, expert or anti, for messages.
        reference: a directory or hub name.
        options: of these, all but ``device`` and ``quantize``.

    Raises:
        LoadError: names the role, the reference and the reason.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    named: dict[str, Any] = {
        "dtype": options.dtype,
        "trust_remote_code": options.trust_remote_code,
    }
    if options.device_map is not None:
        named["device_map"] = options.device_map
    if options.gguf_file is None:
        # Pickled weights run code when they are opened.
        named["use_safetensors"] = True
    else:
        named |= {
            "gguf_file": options.gguf_file,
            "quantization_config": GgufConfig(dequantize=True),
        }
    try:
        return AutoModelForCausalLM.from_pretrained(reference, **named)
    except (OSError, ValueError, KeyError) as error:
        placed = " that its device_map can place" if options.device_map is not None else ""
        raise _load_error(role, f"a causal LM{placed}", reference, error) from error


def load_tokenizer(
    name: str, reference: str, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A tokenizer from a directory or hub name; ``name`` says whose in messages."""
    from transformers import AutoTokenizer

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoTokenizer.from_pretrained(
            reference, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(name, "a tokenizer", reference, error) from error


def _load_error(name: str, what: str, reference: str, error: Exception) -> LoadError:
    reason = " ".join(str(error).split())
    return LoadError(
        f"{name} must be {what} (a directory or hub name), got {reference!r}: {reason}"
    )
