"""Opens one role's model and tokenizer, from safetensors, GGUF or a LoRA adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_ADAPTER_FILE = "adapter_config.json"


class LoadError(ValueError):
    """A model or tokenizer cannot be opened."""


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


def load_model(
    role: str,
    reference: str,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device,
    gguf_file: str | None,
    trust_remote_code: bool,
) -> Any:
    """A transformers causal LM in evaluation mode.

    Args:
        role: base, expert or anti, for messages.
        reference: a directory or hub name. A directory with a LoRA adapter (PEFT) is merged into
            the model it names, a path relative to the adapter's directory or a hub name.
        dtype: of the weights; "auto" is the checkpoint's.
        device: where the weights go.
        gguf_file: name of a GGUF file in the directory, unpacked to ``dtype``.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        LoadError: names the role, the reference and the reason.
    """
    adapter = Path(reference) / _ADAPTER_FILE
    if adapter.is_file():
        model = _load_adapted(role, adapter, dtype, trust_remote_code)
    else:
        model = _load_checkpoint(role, reference, dtype, gguf_file, trust_remote_code)
    return model.to(device).eval()


def _load_checkpoint(
    role: str,
    reference: str,
    dtype: str | torch.dtype,
    gguf_file: str | None,
    trust_remote_code: bool,
) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if gguf_file is None:
        # Pickled weights run code when they are opened.
        options["use_safetensors"] = True
    else:
        options |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    try:
        return AutoModelForCausalLM.from_pretrained(reference, **options)
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(role, "a causal LM", reference, error) from error


def _load_adapted(
    role: str, adapter: Path, dtype: str | torch.dtype, trust_remote_code: bool
) -> Any:
    if not (adapter.parent / "adapter_model.safetensors").is_file():
        raise LoadError(
            f"{role} must have its adapter's weights in adapter_model.safetensors, "
            f"got {adapter.parent} without it"
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise LoadError(
            f"{role} is a LoRA adapter, which needs peft: pip install 'proxytune-kernels[lora]'"
        ) from error
    named = json.loads(adapter.read_text())["base_model_name_or_path"]
    model = _load_checkpoint(role, resolve(named, adapter.parent), dtype, None, trust_remote_code)
    return PeftModel.from_pretrained(model, adapter.parent).merge_and_unload()


def load_tokenizer(
    name: str, reference: str, *, gguf_file: str | None, trust_remote_code: bool
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
