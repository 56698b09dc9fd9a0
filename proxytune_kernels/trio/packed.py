"""Layers whose weights are int8 or int4, for packed products on a CPU.

A step of decoding reads every weight once, so what it takes is bytes. The packed products read
int8 and int4 as they lie and convert in registers; sums are in fp32, rounded once.

int8: w = q * s, q in [-127, 127], a scale s for :data:`INT8_GROUP_SIZE` weights of a row.
int4: w = q * s + z, q in [-8, 7], a scale and a zero for :data:`GROUP_SIZE` weights of a row.

Scales and zeros have the activations' dtype, and are rounded to it before q is chosen, so that a
layer multiplies by exactly the weights above. Of the exact y = w x a packed product is within
u |y| + (n + 2) 2^-24 sum |w_i x_i| for n features in, u half of the dtype's spacing at 1 (2^-9 in
bf16); a bias is added behind it and rounded once more.

int8 is multiplied by vectors of our own (csrc/cpu/heads.h), int4 by torch's packed product. Where
the processor has AMX, both are in bf16 by tiles (csrc/cpu/amx.h), which read a weight once for 32
rows or more. Numbers below 2^-126 count as zero there. For int4 they sum q x and x by themselves,
so w_i in the bound is |q s| + |z|, and an infinite x gives NaN.

Up to :data:`PACKED_ROWS` rows the product is packed, and the bits of a row do not depend on the
other rows. For more rows it may be faster to write the weights out in the activations' dtype, a
part of them at a time, for a plain product: that rounds each weight once more. Which is faster here
is measured when a number of rows is first seen, in powers of two, once in a process for layers of
one shape. Without the CPU extension int8 is always written out.

Source: aten/src/ATen/native/cpu/int4mm_kernel.cpp.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module, Parameter
from torch.nn.functional import embedding

GROUP_SIZE = 32
"""Weights that share a scale in int4."""
INT8_GROUP_SIZE = 128
"""Weights that share a scale in int8; a row's last group may have fewer."""
OUTPUTS = 16
"""An int4 layer's outputs are a multiple of this."""
PACKED_ROWS = 16
"""Rows up to which a product is packed whatever is faster."""
_BLOCK = 64
"""Rows of an int4 weight that are packed together."""
_CHUNK = 1 << 21
"""Weights that are written out at a time: few enough for a cache, many enough for a product."""
_FITS = 4
"""Scales that int4 tries for a group. Of the squared error of the first, the range's, the others
leave 0.86 (weights of a normal distribution) and 0.87 (Student's t, 5 degrees of freedom)."""
_PART = 1 << 18
"""Weights that are quantised at a time, so that fp32 copies stay in a cache."""

_ways: dict[tuple[Any, ...], str] = {}
"""(class, outputs, inputs, ways, dtype, rows) -> the faster way."""


class PackedLinear(Linear):
    """A linear layer over a packed weight."""

    scales: Parameter
    ways: tuple[str, ...]
    """Names in ``_WAYS`` that run here; few rows take the first."""
    has_tiles = False
    """Whether AMX multiplies where activations are bf16."""
    tiled_outputs = 1
    """Outputs in tiles are a multiple of this; inputs are one of 64."""

    def forward(self, input: Tensor) -> Tensor:
        """Result [..., out] for input [..., in]."""
        rows = input.reshape(-1, self.in_features).contiguous()
        # A compiled forward is of few tokens.
        few = torch.compiler.is_compiling() or rows.shape[0] <= PACKED_ROWS
        result = _WAYS[self.ways[0] if few else self._way(rows)](self, rows)
        bias = self._parameters["bias"]
        if bias is not None:
            result += bias
        return result.view(*input.shape[:-1], self.out_features)

    def written_out(self, first: int, last: int) -> Tensor:
        """Weights of the outputs first to last, a multiple of 64, as [in, outputs]."""
        raise NotImplementedError

    def _packed(self, rows: Tensor) -> Tensor:
        weight, scales = self._parameters["weight"], self._parameters["scales"]
        if self.has_tiles and rows.dtype == torch.bfloat16:
            return torch.ops.proxytune.packed_linear(rows, weight, scales)
        return self._without_tiles(rows, weight, scales)

    @staticmethod
    def _without_tiles(rows: Tensor, weight: Any, scales: Any) -> Tensor:
        raise NotImplementedError

    def _written(self, rows: Tensor) -> Tensor:
        size = max(_CHUNK // self.in_features // _BLOCK, 1) * _BLOCK
        ends = range(0, self.out_features, size)
        return torch.cat([rows @ self.written_out(i, i + size) for i in ends], 1)

    def _way(self, rows: Tensor) -> str:
        if len(self.ways) == 1:
            return self.ways[0]
        bucket = 1 << (rows.shape[0] - 1).bit_length()
        key = (*_kind(self), self.ways, rows.dtype, bucket)
        if key not in _ways:
            _ways[key] = min(self.ways, key=lambda way: _seconds(lambda: _WAYS[way](self, rows)))
        return _ways[key]

    @staticmethod
    def ways_here() -> tuple[str, ...]:
        """:attr:`ways` on this machine."""
        raise NotImplementedError


class Int8Linear(PackedLinear):
    """Weight int8 [out, in], scales [out, in / group]."""

    @staticmethod
    def _without_tiles(rows: Tensor, weight: Any, scales: Any) -> Tensor:
        return torch.ops.proxytune.packed_linear(rows.float(), weight, scales).to(rows.dtype)

    def written_out(self, first: int, last: int) -> Tensor:
        """Weights of the outputs first to last as [in, outputs]."""
        return _scaled(self.weight[first:last], self.scales[first:last]).T

    @staticmethod
    def ways_here() -> tuple[str, ...]:
        """Without the extension there is no packed product."""
        return tuple(_WAYS) if _extension() else ("written out",)


class Int4Linear(PackedLinear):
    """Weight uint8 [out, in / 2] as torch packs it, scales and zeros [in / group, out, 2]."""

    tiled_outputs = _BLOCK

    @staticmethod
    def _without_tiles(rows: Tensor, weight: Any, scales: Any) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(rows, weight, GROUP_SIZE, scales)

    def written_out(self, first: int, last: int) -> Tensor:
        """Weights of the outputs first to last, a multiple of 64, as [in, outputs]."""
        scales, zeros = self.scales[:, None, first:last].unbind(-1)
        scales, zeros = scales.contiguous(), zeros.contiguous()
        steps = _unpacked(self.weight[first:last], scales.dtype)
        groups = steps.unflatten(0, (-1, GROUP_SIZE))
        torch.addcmul(zeros, groups, scales, out=groups)
        return steps

    @staticmethod
    def ways_here() -> tuple[str, ...]:
        """Written out only where torch packs as :func:`_unpacked` knows: by its AVX-512 kernel."""
        return tuple(_WAYS) if _knows_packing() else ("packed",)


class Int8Embedding(Embedding):
    """An embedding that shares the int8 weight and the scales of the output layer."""

    scales: Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Result [..., in] for ids int64 [...]."""
        return _scaled(embedding(input, self.weight), self.scales[input])


_WAYS: dict[str, Callable[[PackedLinear, Tensor], Tensor]] = {
    "packed": lambda layer, rows: layer._packed(rows),
    "written out": lambda layer, rows: layer._written(rows),
}


def pack(layer: Linear, quantization: str, weight: Tensor) -> Parameter:
    """Let a linear layer on the CPU multiply by a packed weight.

    Args:
        layer: is changed, but for its weight.
        quantization: ``"int8"`` or ``"int4"``.
        weight: [out, in], fp32, bf16 or fp16; for int4 ``in`` is a multiple of :data:`GROUP_SIZE`
            and ``out`` one of :data:`OUTPUTS`.

    Returns:
        The weight that the layer must get.
    """
    kind, quantized = _KINDS[quantization]
    rows = max(_PART // weight.shape[1] // _BLOCK, 1) * _BLOCK
    values, scales = zip(*map(quantized, weight.detach().split(rows)), strict=True)
    layer.__class__ = kind
    assert isinstance(layer, PackedLinear)
    _call(layer)
    layer.ways = kind.ways_here()
    whole = layer.in_features % 64 == 0 == layer.out_features % kind.tiled_outputs
    # What can't be written out is not packed as our code knows it.
    layer.has_tiles = whole and "written out" in layer.ways and _has_amx()
    # Of int8 and int4 the last but one dimension is the outputs'.
    layer.register_parameter("scales", Parameter(torch.cat(scales, -2), requires_grad=False))
    return Parameter(torch.cat(values), requires_grad=False)


def _has_amx() -> bool:
    extension = _extension()
    return extension is not None and bool(extension.has_amx())


@cache
def _extension() -> Any:
    try:
        from proxytune_kernels import _cpu
    except ImportError:  # not built, or does not load: ptk.backends() says which
        return None
    return _cpu


def share(table: Embedding, head: PackedLinear) -> None:
    """Let an embedding look up the int8 weight of the output layer that it is tied to."""
    kind = type(table)
    # Gemma's embedding scales what nn.Embedding gives.
    table.__class__ = (
        Int8Embedding if kind is Embedding else type(kind.__name__, (kind, Int8Embedding), {})
    )
    _call(table)
    table.weight = head.weight
    table.register_parameter("scales", head.scales)


def _call(layer: Module) -> None:
    """Where accelerate has put a forward of its own, let it call that of the layer's class."""
    if "_old_forward" in vars(layer):
        layer._old_forward = type(layer).forward.__get__(layer)


def packed_layers(model: Module) -> Iterator[PackedLinear]:
    """The layers of a model that :func:`pack` has changed."""
    return (module for module in model.modules() if isinstance(module, PackedLinear))


def products(model: Module) -> dict[str, dict[int, str]]:
    """What multiplies more than :data:`PACKED_ROWS` rows: by layer, rows up to -> the way."""
    found: dict[str, dict[int, str]] = {}
    for kind in dict.fromkeys(map(_kind, packed_layers(model))):
        name = f"{kind[0].__name__} {kind[1]} x {kind[2]}"
        found[name] = {key[-1]: way for key, way in _ways.items() if key[:3] == kind}
    return found


def _kind(layer: PackedLinear) -> tuple[Any, ...]:
    # The decoder calls its copies' layers by classes of its own.
    base = Int4Linear if isinstance(layer, Int4Linear) else Int8Linear
    return base, layer.out_features, layer.in_features


def _seconds(call: Callable[[], Any]) -> float:
    """The shorter of two calls."""
    found = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values int8 [out, in] and scales [out, in / group]."""
    count = weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -count % INT8_GROUP_SIZE))
    groups = padded.unflatten(1, (-1, INT8_GROUP_SIZE))
    largest = groups.abs().amax(-1)
    scales = (largest / 127).to(weight.dtype)
    # A subnormal one of fp16 may be so much too small that the largest weight is out of reach.
    larger = scales.nextafter(torch.full_like(scales, torch.inf))
    scales = torch.where(scales.float() * 127.5 < largest, larger, scales)
    scales[scales == 0] = 1
    values = (groups / scales.float()[..., None]).round_().clamp_(-127, 127)
    return values.flatten(1)[:, :count].to(torch.int8), scales


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    """Weights [..., in] of int8 values [..., in] and scales [..., in / group]."""
    weights = values.to(scales.dtype)
    groups = weights.shape[-1] // INT8_GROUP_SIZE
    whole = groups * INT8_GROUP_SIZE
    of_groups = weights[..., :whole].unflatten(-1, (groups, INT8_GROUP_SIZE))
    of_groups.mul_(scales[..., :groups, None])
    weights[..., whole:].mul_(scales[..., groups:])
    return weights


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed values uint8 [out, in / 2], scales and zeros [in / group, out, 2].

    A group's range gives a scale and a zero, and those the steps q. Scale and zero are then fitted
    to the steps by least squares, which gives other steps, and so on; the least error counts.
    """
    groups = weight.float().unflatten(1, (-1, GROUP_SIZE))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    average = groups.mean(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (low + high + scale) / 2
    best: list[Tensor] = []
    for _ in range(_FITS):
        scale, zero = (t.to(weight.dtype).float() for t in (scale, zero))
        steps = _steps(groups, scale, zero)
        error = torch.addcmul(zero, steps, scale).sub_(groups).square_().sum(-1, keepdim=True)
        found = [error, scale, zero]
        better = error < best[0] if best else torch.ones_like(error, dtype=torch.bool)
        best = [torch.where(better, n, o) for n, o in zip(found, best or found, strict=True)]
        middle = steps.mean(-1, keepdim=True)
        steps -= middle
        spread = steps.square().sum(-1, keepdim=True).clamp_min_(1e-12)
        scale = steps.mul_(groups).sum(-1, keepdim=True) / spread
        zero = average - scale * middle
    _, scale, zero = best
    steps = _steps(groups, scale, zero).flatten(1)
    packed = torch._convert_weight_to_int4pack_for_cpu(steps.int() + 8, 1)
    both = torch.cat((scale, zero), -1).transpose(0, 1).to(weight.dtype)
    return packed, both.contiguous()


def _steps(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest of 16 steps."""
    return ((groups - zero) / torch.where(scale == 0, 1, scale)).round_().clamp_(-8, 7)


_KINDS: dict[str, tuple[type[PackedLinear], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "int8": (Int8Linear, _int8),
    "int4": (Int4Linear, _int4),
}


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Steps q [in, out] of a packed weight uint8 [out, in / 2].

    64 outputs lie together, for each input 32 bytes: output i low and i + 32 high. Outputs that are
    left over lie in pairs, 2 i low and 2 i + 1 high.
    """
    outputs, inputs = packed.shape[0], 2 * packed.shape[1]
    whole = outputs // _BLOCK * _BLOCK
    steps = torch.empty(inputs, outputs, dtype=dtype)
    words = packed[:whole].view(torch.int32)
    blocks = steps[:, :whole].unflatten(1, (-1, 2, _BLOCK // 2))
    for i, shifted in enumerate((words, words >> 4)):
        half = (shifted & 0x0F0F0F0F).view(torch.int8).sub_(8).view(-1, inputs, _BLOCK // 2)
        blocks[:, :, i] = half.transpose(0, 1)
    rest = packed[whole:].reshape(inputs, -1).view(torch.int8)
    steps[:, whole::2] = (rest & 15) - 8
    steps[:, whole + 1 :: 2] = (rest >> 4 & 15) - 8
    return steps


@cache
def _knows_packing() -> bool:
    steps = (torch.arange(176 * 32, dtype=torch.int32) * 7 % 16).view(176, 32)
    packed = torch._convert_weight_to_int4pack_for_cpu(steps, 1)
    return torch.equal(_unpacked(packed, torch.int32).T, steps - 8)
