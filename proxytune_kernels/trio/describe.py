"""What a loaded model is, as plain values for printing or JSON."""

from __future__ import annotations

from typing import Any

from proxytune_kernels.trio.adapters import adapter_parameters
from proxytune_kernels.trio.quantization import quantization_of, weight_bytes


def model_info(model: Any) -> dict[str, Any]:
    """Describe a causal LM.

    Returns:
        ``model`` (its class), ``name``, ``parameters``, ``dtype`` (of the embedding), ``device``
        (several, comma-separated, where they are several), ``logits`` (the output layer's width),
        ``quantized`` (``"int8"``, ``"int4"`` or None), ``adapter_parameters`` (those of LoRA layers
        that stand beside the weights), ``bytes`` (of all weights, packed ones as they are packed).
    """
    embedding = model.get_input_embeddings().weight
    return {
        "model": type(model).__name__,
        "name": model.config._name_or_path,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "device": ", ".join(_places(model)),
        "logits": model.get_output_embeddings().weight.shape[0],
        "quantized": quantization_of(model),
        "adapter_parameters": sum(p.numel() for p in adapter_parameters(model)),
        "bytes": weight_bytes(model),
    }


def _places(model: Any) -> list[str]:
    """The devices that a model's weights are on, and where those lie that are brought there."""
    devices = dict.fromkeys(str(p.device) for p in model.parameters() if p.device.type != "meta")
    if any(p.device.type == "meta" for p in model.parameters()):
        # Among devices that compute, the CPU only keeps weights for them, as the disk does.
        kept = ("disk",) if list(devices) == ["cpu"] else ("cpu", "disk")
        places = dict.fromkeys(place for place in model.hf_device_map.values() if place in kept)
        devices |= dict.fromkeys(f"offloaded to {place}" for place in places)
    return list(devices)
