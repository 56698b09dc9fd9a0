"""Weight-only quantisation of a causal LM, in place.

The weights of the linear layers become int8 or int4 with scales; activations and norms stay as they
are. On a CPU packed products multiply by them; there the output layer becomes int8 with
either, and so does an embedding that is tied to it, as one tensor. On CUDA torchao quantises, and
both stay plain. What this costs and gains was measured: docs/loading.md.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Parameter
from torch.nn.modules.module import register_module_parameter_registration_hook

from proxytune_kernels.trio.packed import (
    GROUP_SIZE,
    OUTPUTS,
    Int4Linear,
    PackedLinear,
    pack,
    packed_layers,
    share,
)

QUANTIZATIONS = ("int8", "int4")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What torchao calls its tensors.
_NAMES = {"Int8Tensor": "int8", "Int4TilePackedTo4dTensor": "int4"}


class QuantizationError(ValueError):
    """A model that cannot be quantised as asked; says why."""


def quantize(model: Any, quantization: str, *, device: str | torch.device | None = None) -> Any:
    """Quantise the weights of a model's linear layers, in place.

    Args:
        model: a transformers causal LM, weights of float32, bfloat16 or float16.
        quantization: ``"int8"``, symmetric with a scale for every 128 weights of a row, on CUDA
            for a row; or ``"int4"``, with a scale and a zero point for every 32 of them. int4 takes
            layers whose inputs are a multiple of 32 and whose outputs are a multiple of 16, on a
            CPU or, in bfloat16, on CUDA of compute capability 8.0 and later. On a CPU the output
            layer becomes int8 with both, and an embedding that is tied to it; on other devices,
            where torchao quantises, they stay plain. What is packed for one device does not run on
            another.
        device: where the model goes, a layer at a time as it is quantised, so that the plain
            weights need not fit there; None leaves it where it is.

    Returns:
        The model.

    Raises:
        QuantizationError: torchao is wanted and not installed, or this model can't be quantised so;
            the model is left as it was.

    Example:
        >>> import proxytune_kernels as ptk
        >>> trio = ptk.load_trio("shipped")
        >>> ptk.quantize(trio.base, "int8") is trio.base
        True

    Source: :mod:`proxytune_kernels.trio.packed`; torch's ``_weight_int4pack_mm_for_cpu``; torchao's
    ``quantize_`` with ``Int8WeightOnlyConfig`` and ``Int4WeightOnlyConfig``.
    """
    check_quantization("quantization", quantization)
    for path, layer in _layers(model).items():
        if isinstance(layer, PackedLinear):
            raise QuantizationError(
                f"model must have plain weights, got {type(layer).__name__} in {path}"
            )
    return finish(model, quantization, device=device)


def finish(model: Any, quantization: str, *, device: str | torch.device | None = None) -> Any:
    """As :func:`quantize`, for a model of which :func:`packed_as_loaded` has done a part."""
    layers = {p: m for p, m in _layers(model).items() if not isinstance(m, PackedLinear)}
    target = torch.device(device) if device is not None else None
    if next(packed_layers(model), None) is None:
        _check_layers(layers)
    if quantization == "int4":
        _check_int4(layers, target)
    if all((target or layer.weight.device).type == "cpu" for layer in layers.values()):
        for layer in layers.values():
            layer.to(target)
            layer.weight = pack(layer, quantization, layer.weight)
        model.to(target)
        _pack_head(model)
        return model
    try:
        from torchao.quantization import quantize_

        config = _config(quantization)
    except ImportError as error:
        raise QuantizationError(
            f"{quantization} needs torchao ({error}): pip install 'proxytune_kernels[quant]'"
        ) from error
    chosen = {id(layer) for layer in layers.values()}
    quantize_(model, config, filter_fn=lambda module, _: id(module) in chosen, device=target)
    return model


@contextmanager
def packed_as_loaded(quantization: str, vocab_size: int | None) -> Iterator[None]:
    """Quantise linear layers on the CPU as a loader gives them their weights, one by one.

    :func:`finish` does those that are left: what has ``vocab_size`` outputs, as the output layer
    has, and what can't be quantised, which it refuses.
    """
    thread = threading.get_ident()

    def packed(module: Any, name: str, weight: Any) -> Parameter | None:
        if thread != threading.get_ident() or type(module) is not Linear or name != "weight":
            return None
        fits = quantization == "int8" or not _misfit(*weight.shape)
        if weight.device.type != "cpu" or not module.weight.is_meta or weight.dtype not in _DTYPES:
            return None
        if not fits or weight.shape[0] == vocab_size:
            return None
        parameter = pack(module, quantization, weight)
        # transformers keeps in a weight whether it came from the checkpoint.
        vars(parameter).update(vars(weight))
        return parameter

    # Else transformers reads ahead, as many plain weights as there are.
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    handle = register_module_parameter_registration_hook(packed)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def check_quantization(name: str, quantization: Any) -> None:
    """Check that an argument called ``name`` is one of :data:`QUANTIZATIONS`."""
    if quantization not in QUANTIZATIONS:
        raise QuantizationError(
            f"{name} must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}"
        )


def quantization_of(model: Any) -> str | None:
    """How a model's weights are quantised, torchao's name where we have none; None if not."""
    kinds = {type(p) for p in model.parameters() if type(p).__module__.startswith("torchao")}
    names = {_NAMES.get(kind.__name__, kind.__name__) for kind in kinds}
    ours = {isinstance(layer, Int4Linear) for layer in packed_layers(model)}
    # Beside int4 the output layer is int8.
    names |= {"int4" if True in ours else "int8"} if ours else set()
    return ", ".join(sorted(names)) or None


def weight_count(model: Any) -> int:
    """Weights of a model, without the scales of those that are packed on a CPU."""
    layers = list(packed_layers(model))
    scales = {id(layer.scales): layer.scales.numel() for layer in layers}
    # A byte holds two.
    more = {id(m.weight): m.weight.numel() for m in layers if isinstance(m, Int4Linear)}
    return sum(p.numel() for p in model.parameters()) + sum(more.values()) - sum(scales.values())


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


def _pack_head(model: Any) -> None:
    """Make the output layer int8, and an embedding that is tied to it."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, Linear) or head.weight.device.type != "cpu":
        return
    tied = isinstance(table, Embedding) and table.weight is head.weight
    head.weight = pack(head, "int8", head.weight)
    if tied:
        assert isinstance(head, PackedLinear)
        share(table, head)


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
        if _misfit(rows, columns):
            raise QuantizationError(
                f"int4 needs layers with inputs a multiple of {GROUP_SIZE} and outputs a multiple "
                f"of {OUTPUTS}, got {path} with {columns} inputs and {rows} outputs"
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


def _misfit(rows: int, columns: int) -> bool:
    return bool(columns % GROUP_SIZE or rows % OUTPUTS)


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


def _config(quantization: str) -> Any:
    # torchao would otherwise change inductor's settings for the whole process.
    options: dict[str, Any] = {"set_inductor_config": False}
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig(**options)
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    # Of the other packings, one needs the package mslk, one a device that is not CUDA's.
    options |= {
        "group_size": GROUP_SIZE,
        "int4_packing_format": Int4PackingFormat.TILE_PACKED_TO_4D,
    }
    return Int4WeightOnlyConfig(**options)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
