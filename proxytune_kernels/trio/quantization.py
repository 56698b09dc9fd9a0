"""Weight-only quantisation of a causal LM by torchao, in place.

The weights of the linear layers become int8 or int4 with scales; activations, the embedding and the
output layer stay as they are. The output layer stays because an error there goes into the logits
undamped, because it is mostly tied to the embedding, and because ``sample_hidden`` takes its plain
weights. What this costs and gains was measured: docs/loading.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear

QUANTIZATIONS = ("int8", "int4")
# Weights that share a scale in int4; the smallest that torchao takes, and the closest.
GROUP_SIZE = 32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What torchao calls its tensors.
_NAMES = {"Int8Tensor": "int8", "Int4OpaqueTensor": "int4", "Int4TilePackedTo4dTensor": "int4"}


class QuantizationError(ValueError):
    """A model that cannot be quantised as asked; says why."""


def quantize(model: Any, quantization: str, *, device: str | torch.device | None = None) -> Any:
    """Quantise the weights of a model's linear layers but the output layer, in place.

    Args:
        model: a transformers causal LM, weights of float32, bfloat16 or float16.
        quantization: ``"int8"``, symmetric with an fp32 scale per row of a weight; or ``"int4"``,
            asymmetric with a scale and a zero point for every 32 weights of a row. int4 takes
            layers whose inputs are a multiple of 32 and whose outputs are a multiple of 16, on a
            CPU (a prototype of torchao's) or, in bfloat16, on CUDA of compute capability 8.0 and
            later; what is packed for one does not run on the other.
        device: where the model goes, a layer at a time as it is quantised, so that the plain
            weights need not fit there; None leaves it where it is.

    Returns:
        The model.

    Raises:
        QuantizationError: torchao is not installed, or can't do that to this model; the model is
            left as it was.

    Example:
        >>> import proxytune_kernels as ptk
        >>> trio = ptk.load_trio("shipped")
        >>> ptk.quantize(trio.base, "int8") is trio.base
        True

    Source: torchao, ``quantize_`` with ``Int8WeightOnlyConfig`` and ``Int4WeightOnlyConfig``.
    """
    check_quantization("quantization", quantization)
    layers = _layers(model)
    target = torch.device(device) if device is not None else None
    _check_layers(layers)
    if quantization == "int4":
        _check_int4(layers, target)
    first = next(iter(layers.values()))
    try:
        from torchao.quantization import quantize_

        config = _config(quantization, target or first.weight.device)
    except ImportError as error:
        raise QuantizationError(
            f"{quantization} needs torchao ({error}): pip install 'proxytune_kernels[quant]'"
        ) from error
    chosen = {id(layer) for layer in layers.values()}
    quantize_(model, config, filter_fn=lambda module, _: id(module) in chosen, device=target)
    return model


def check_quantization(name: str, quantization: Any) -> None:
    """Check that an argument called ``name`` is one of :data:`QUANTIZATIONS`."""
    if quantization not in QUANTIZATIONS:
        raise QuantizationError(
            f"{name} must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}"
        )


def quantization_of(model: Any) -> str | None:
    """How a model's weights are quantised, torchao's name where we have none; None if not."""
    kinds = {type(p) for p in model.parameters() if type(p).__module__.startswith("torchao")}
    names = sorted({_NAMES.get(kind.__name__, kind.__name__) for kind in kinds})
    return ", ".join(names) or None


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters, packed and scales included, each tensor once."""
    return sum(
        plain.numel() * plain.element_size()
        for parameter in model.parameters()
        for plain in plain_tensors(parameter)
    )


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """The tensors that hold a tensor's values: itself, or what a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def _layers(model: Any) -> dict[str, Linear]:
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Linear) and module is not head
    }


def _check_layers(layers: dict[str, Linear]) -> None:
    if not layers:
        raise QuantizationError("model must have linear layers besides its output layer, got none")
    for path, layer in layers.items():
        weight = layer.weight
        if ".lora_" in path:
            raise QuantizationError(
                f"model must be quantised before an adapter is added, got {path}"
            )
        if type(weight).__module__.startswith("torchao"):
            raise QuantizationError(
                f"model must have plain weights, got {type(weight).__name__} in {path}"
            )
        if weight.device.type == "meta":
            raise QuantizationError(f"model must be in memory, got {path} offloaded")
        if weight.dtype not in _DTYPES:
            raise QuantizationError(
                f"model must have weights of float32, bfloat16 or float16, got {_dtype(weight)} "
                f"in {path}"
            )


def _check_int4(layers: dict[str, Linear], target: torch.device | None) -> None:
    for path, layer in layers.items():
        weight = layer.weight
        rows, columns = weight.shape
        if columns % GROUP_SIZE or rows % 16:
            raise QuantizationError(
                f"int4 needs layers with inputs a multiple of {GROUP_SIZE} and outputs a multiple "
                f"of 16, got {path} with {columns} inputs and {rows} outputs"
            )
        device = target or weight.device
        if device.type not in ("cpu", "cuda"):
            raise QuantizationError(f"int4 runs on cpu and cuda, got {path} on {device}")
        if device.type == "cuda":
            _check_int4_cuda(path, weight, device)
    kinds = {(target or layer.weight.device).type for layer in layers.values()}
    if len(kinds) > 1:
        raise QuantizationError(
            f"int4 is packed for one kind of device, got a model on {' and '.join(sorted(kinds))}"
        )


def _check_int4_cuda(path: str, weight: Tensor, device: torch.device) -> None:
    if weight.dtype != torch.bfloat16:
        raise QuantizationError(
            f"int4 needs bfloat16 weights on cuda, got {_dtype(weight)} in {path}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise QuantizationError(
            f"int4 needs compute capability 8.0 or later, got {'.'.join(map(str, capability))}"
        )


def _config(quantization: str, device: torch.device) -> Any:
    # torchao would otherwise change inductor's settings for the whole process.
    options: dict[str, Any] = {"set_inductor_config": False}
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig(**options)
    options["group_size"] = GROUP_SIZE
    if device.type == "cuda":
        from torchao.quantization import Int4WeightOnlyConfig
        from torchao.quantization.quantize_.workflows import Int4PackingFormat

        # Of the other packings, one needs the package mslk, one a device that is not CUDA's.
        packing = Int4PackingFormat.TILE_PACKED_TO_4D
        return Int4WeightOnlyConfig(int4_packing_format=packing, **options)
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(**options)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
