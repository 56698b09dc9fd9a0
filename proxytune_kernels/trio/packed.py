"""Layers whose weights are int8 or int4, for torch's packed products on a CPU.

A step of decoding reads every weight once, so what it takes is bytes. The packed products read
int8 and int4 as they lie and convert in registers; sums are in fp32, rounded once.

int8: w = q * s * c, q in [-127, 127], a scale s for a row of the weight. c is 1, except in layers
some of whose columns are much larger than most: there it is a power of two for each column, and
activations are multiplied by it, which rounds nothing.
int4: w = q * s + z, q in [-8, 7], a scale and a zero for :data:`GROUP_SIZE` weights of a row.

Scales and zeros have the activations' dtype, and are rounded to it before q is chosen, so that a
layer multiplies by exactly the weights above. Of the exact y = w x a packed product is within
u |y| + (n + 2) 2^-24 sum |w_i x_i| for n features in, u half of the dtype's spacing at 1 (2^-9 in
bf16); a bias is added behind it and rounded once more.

Where the processor has AMX, the packed product in bf16 is ``torch.ops.proxytune.tiled_linear``
(csrc/cpu/amx.h), which reads a weight once for 32 rows or more. Numbers below 2^-126 count as zero
there. For int4 it sums q x and x by themselves, so w_i in the bound is |q s| + |z|, and an infinite
x gives NaN.

Up to :data:`PACKED_ROWS` rows the product is packed, and the bits of a row do not depend on the
other rows. For more rows it may be faster to write the weights out in the activations' dtype, a
part of them at a time, for a plain product: that rounds once more, int8 the product, int4 (and int8
in fp16) each weight. Which is faster here is measured when a number of rows is first seen, in
powers of two, once in a process for layers of one shape.

Source: aten/src/ATen/native/cpu/int8mm_kernel.cpp and int4mm_kernel.cpp.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module, Parameter
from torch.nn.functional import embedding

GROUP_SIZE = 32
"""Weights that share a scale in int4."""
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
"""(class, outputs, inputs, dtype, rows) -> the faster way."""


class PackedLinear(Linear):
    """A linear layer over a packed weight."""

    scales: Parameter
    columns: Tensor | None
    """Factors [in] of the activations."""
    has_tiles = False
    """Whether AMX multiplies where activations are bf16."""
    tiled_outputs = 1
    """Outputs in tiles are a multiple of this; inputs are one of 64."""

    def forward(self, input: Tensor) -> Tensor:
        """Result [..., out] for input [..., in]."""
        rows = input.reshape(-1, self.in_features)
        columns = self._buffers["columns"]
        rows = rows.contiguous() if columns is None else rows * columns
        # A compiled forward is of few tokens.
        if torch.compiler.is_compiling() or rows.shape[0] <= PACKED_ROWS:
            result = self._packed(rows)
        else:
            result = _WAYS[self._way(rows)](self, rows)
        bias = self._parameters["bias"]
        if bias is not None:
            result += bias
        return result.view(*input.shape[:-1], self.out_features)

    def written_out(self, first: int, last: int) -> Tensor:
        """Weights of the outputs first to last, a multiple of 64, as [in, outputs], without c."""
        raise NotImplementedError

    def _packed(self, rows: Tensor) -> Tensor:
        weight, scales = self._parameters["weight"], self._parameters["scales"]
        if self.has_tiles and rows.dtype == torch.bfloat16:
            return torch.ops.proxytune.tiled_linear(rows, weight, scales)
        return self._by_torch(rows, weight, scales)

    @staticmethod
    def _by_torch(rows: Tensor, weight: Any, scales: Any) -> Tensor:
        raise NotImplementedError

    def _written(self, rows: Tensor) -> Tensor:
        size = max(_CHUNK // self.in_features // _BLOCK, 1) * _BLOCK
        ends = range(0, self.out_features, size)
        return torch.cat([self._part(rows, i, i + size) for i in ends], 1)

    def _part(self, rows: Tensor, first: int, last: int) -> Tensor:
        return rows @ self.written_out(first, last)

    def _way(self, rows: Tensor) -> str:
        bucket = 1 << (rows.shape[0] - 1).bit_length()
        key = (*_kind(self), rows.dtype, bucket)
        if key not in _ways:
            ways = _WAYS if self.is_known() else ["packed"]
            _ways[key] = min(ways, key=lambda way: _seconds(lambda: _WAYS[way](self, rows)))
        return _ways[key]

    @staticmethod
    def is_known() -> bool:
        """Whether weights lie here as our own code takes them."""
        return True


class Int8Linear(PackedLinear):
    """Weight int8 [out, in], scales [out]."""

    @staticmethod
    def _by_torch(rows: Tensor, weight: Any, scales: Any) -> Tensor:
        return torch._weight_int8pack_mm(rows, weight, scales)

    def written_out(self, first: int, last: int) -> Tensor:
        """Weights of the outputs first to last as [in, outputs]."""
        scales = self.scales[first:last, None]
        return self.weight[first:last].to(scales.dtype).mul_(scales).T

    def _part(self, rows: Tensor, first: int, last: int) -> Tensor:
        if rows.dtype == torch.float16:  # which 127 times a sum of activations may leave
            return super()._part(rows, first, last)
        return (rows @ self.weight[first:last].to(rows.dtype).T).mul_(self.scales[first:last])


class Int4Linear(PackedLinear):
    """Weight uint8 [out, in / 2] as torch packs it, scales and zeros [in / group, out, 2]."""

    tiled_outputs = _BLOCK

    @staticmethod
    def _by_torch(rows: Tensor, weight: Any, scales: Any) -> Tensor:
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
    def is_known() -> bool:
        """Whether int4 is packed here as :func:`_unpacked` has it: by torch's AVX-512 kernel."""
        return _knows_packing()


class Int8Embedding(Embedding):
    """An embedding that shares the int8 weight and all scales of the output layer."""

    scales: Parameter
    columns: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Result [..., in] for ids int64 [...]."""
        scales = self.scales[input][..., None]
        rows = embedding(input, self.weight).to(scales.dtype) * scales
        return rows if self.columns is None else rows * self.columns


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
    parts = weight.detach().split(rows)
    columns = _columns(parts) if kind is Int8Linear else None
    evened = parts if columns is None else (part / columns for part in parts)
    values, scales = zip(*map(quantized, evened), strict=True)
    layer.__class__ = kind
    assert isinstance(layer, PackedLinear)
    _call(layer)
    of_rows = torch.cat(scales, -2)
    if kind is Int8Linear:
        of_rows = of_rows.flatten()
    whole = layer.in_features % 64 == 0 == layer.out_features % kind.tiled_outputs
    layer.has_tiles = whole and layer.is_known() and _has_amx()
    layer.register_parameter("scales", Parameter(of_rows, requires_grad=False))
    layer.register_buffer("columns", columns)
    return Parameter(torch.cat(values), requires_grad=False)


def _has_amx() -> bool:
    try:
        from proxytune_kernels import _cpu
    except ImportError:  # built without extensions
        return False
    return bool(_cpu.has_amx())


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
    table.register_buffer("columns", head.columns)


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


def _columns(parts: Sequence[Tensor]) -> Tensor | None:
    """Powers of two [in] that leave less than half of a weight's squared error, or None.

    A row's step is that of its largest value, so columns of one size have the least error. Their
    root mean square is a size, and so is the geometric mean of that and the largest value: which
    leaves less differs from layer to layer. The rows' largest values tell the error beforehand.
    """
    if parts[0].dtype == torch.float16:  # whose range activations may leave
        return None
    largest = torch.stack([part.abs().amax(0) for part in parts]).amax(0).float()
    squares = torch.stack([part.float().square().sum(0) for part in parts])
    mean = squares.sum(0) / sum(map(len, parts))
    best, least = None, _error(parts, torch.ones_like(parts[0][0])) / 2
    for sizes in (mean.sqrt(), (largest.square() * mean).pow(0.25)):
        powers = (sizes / sizes.median()).log2_().round_().clamp_(-16, 16)
        columns = torch.exp2(powers).to(parts[0].dtype)
        # NaN, which is not less, where most columns are 0.
        if (error := _error(parts, columns)) < least:
            best, least = columns, error
    return best


def _error(parts: Sequence[Tensor], columns: Tensor) -> float:
    """The squared error of a weight whose columns are divided, but for a factor."""
    steps = (float((part / columns).abs().amax(1).float().square().sum()) for part in parts)
    return sum(steps) * float(columns.float().square().mean())


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values int8 [out, in] and scales [1, out, 1]."""
    weight = weight.contiguous()
    scales = (weight.abs().amax(1, keepdim=True).float() / 127).to(weight.dtype)
    scales[scales == 0] = 1
    values = (weight.float() / scales.float()).round_().clamp_(-127, 127)
    return values.to(torch.int8), scales[None]


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
