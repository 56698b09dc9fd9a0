"""Weights of linear layers in the order in which a CPU's matrix products read them.

oneDNN multiplies in blocks that fill the registers. ``F.linear`` has the weight in rows, from which
each call gathers the blocks anew; a packed weight lies block by block and is read straight through.
A step of decoding does little but read weights, so it gains what the reading gains. torch's
inductor packs with the same operators where it freezes a graph.

A result is as exact as ``F.linear``'s: sums in fp32, rounded once. Of the exact y = w x + b it is
within 2^-8 |y| + (n + 2) 2^-24 (|b| + sum |w_i x_i|), for n features in. The order of the sums is
oneDNN's own, so the bits may differ.

Only bf16 is packed: in fp32 and fp16 ``F.linear`` multiplies one row straight from the weight.

Source: torch._inductor.fx_passes.mkldnn_fusion.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from proxytune_kernels.trio.quantization import quantization_of

# Absent where torch is built without oneDNN.
_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


class PackingError(ValueError):
    """A model whose weights cannot be packed here."""


class OneDnnLinear(Linear):
    """A linear layer that multiplies with a packed copy of its weight."""

    packed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Result [..., out] for input bf16 [..., in]."""
        return _linear(input, self.packed, self.bias, "none", [], "")  # type: ignore[misc]


def pack_weights(model: Module, packed: dict[int, Tensor] | None = None) -> int:
    """Let a model's linear layers multiply with packed copies of their bf16 weights.

    The copies stand beside the weights, which remain the model's parameters: those bytes are held
    twice. A layer with a ``forward`` of its own (as accelerate puts there) or whose weight is not a
    plain tensor (quantised ones) stays as it is. A packed model cannot be copied with deepcopy.

    Args:
        model: is changed. Pack before :func:`~proxytune_kernels.decoder.model.call_directly`.
        packed: packed weights by the id of their parameter. One dictionary for several models that
            share weights, which must outlive it, makes one copy for all; it is added to.

    Returns:
        Bytes of the new copies.

    Raises:
        PackingError: this CPU or torch cannot multiply packed bf16 weights, or the model has no
            linear layer that can be packed.
    """
    reason = cannot_pack()
    if reason is not None:
        raise PackingError(f"pack_weights: {reason}")
    packed = {} if packed is None else packed
    layers = [m for m in model.modules() if type(m) is Linear and "forward" not in vars(m)]
    kinds = {f"{m.weight.dtype} on {m.weight.device}": None for m in layers}
    layers = [m for m in layers if _is_packable(m.weight)]
    if not layers and quantization_of(model) is None:
        raise PackingError(
            f"pack_weights: model must have linear layers with weights of torch.bfloat16 on cpu, "
            f"got {type(model).__name__} with {', '.join(kinds) or 'no plain linear layer'}"
        )
    bytes_before = _nbytes(packed)
    for layer in layers:
        weight = layer.weight
        if id(weight) not in packed:
            # For one row; the blocks serve more rows as well.
            packed[id(weight)] = _pack(weight.detach(), 1)  # type: ignore[misc]
        layer.packed = packed[id(weight)]
        layer.__class__ = OneDnnLinear
    return _nbytes(packed) - bytes_before


def cannot_pack() -> str | None:
    """Why weights cannot be packed here, as a sentence; None where they can."""
    if _linear is None or not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN (mkldnn), whose packed weights are needed"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no vector instructions that oneDNN needs for bf16 (x86: AVX-512)"
    return None


def _is_packable(weight: Tensor) -> bool:
    plain = type(weight) in (Parameter, Tensor) and weight.device.type == "cpu"
    return plain and weight.dtype == torch.bfloat16


def _nbytes(packed: dict[int, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in packed.values())
