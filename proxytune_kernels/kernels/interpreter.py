"""Corrections to Triton's interpreter, with which it can stand in for a device.

``TRITON_INTERPRET=1`` runs the kernels on CPU tensors in numpy: slowly, but operation by operation
as they are written. Nine things differ from a device:

- ``tl.fma`` rounds twice there; the contract (docs/contracts.md) rounds once.
- Subnormal bf16 becomes 0 in fp32 there; a device keeps it, as the contract does.
- fp32 to bf16 drops bits there; a device rounds to the nearest, ties to even.
- ``tl.maximum`` and ``tl.minimum`` of NaN and a number give NaN there, the number on a device.
- ``tl.dot`` of bf16 multiplies the bit patterns there.
- The truth of ``x != 0.0`` becomes an fp32 number there when it is spread over a block.
- ``constant - tensor`` is a constant there, which no function takes.
- Every call of a jit function patches ``triton.language`` again: once a module and launch will do.
- numpy warns of what the kernels do on purpose (infinity minus infinity, wrapping integers).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_OPERATORS = [
    f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv") for side in ("", "r")
]

_COMPARISON = re.compile(r"create_[fi]cmp")


def _fused_multiply_add(x: Any, y: Any, z: Any) -> Any:
    """fp32 ``x * y + z``, rounded once: fp64 rounded to odd holds what the last rounding needs."""
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + addend  # the product is exact
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    total = np.asarray(total)
    bits = total.view(np.int64)
    even = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
    away = np.where((lost > 0) == (total > 0), 1, -1)
    return np.where(even, bits + away, bits).view(np.float64).astype(np.float32)


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    if z.data.dtype != np.float32:
        raise TypeError(f"the corrected tl.fma takes fp32, got {z.data.dtype}")
    return interpreter.TensorHandle(_fused_multiply_add(x.data, y.data, z.data), z.dtype.scalar)


def _rounding(convert: Any) -> Any:
    """A conversion between floats in which bf16 to fp32 is a shift, and back rounds."""

    def apply(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return x.view(np.uint16).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(x).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)
        return convert(x, source, target, rounding_mode)

    return apply


def _widening_dot(dot: Any) -> Any:
    """A product of matrices in which bf16 is widened to fp32 first, as exact as a tensor core's."""

    def fp32(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        widened = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(widened, tl.float32)

    def create(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, fp32(a), fp32(b), *rest)

    return create


def _binary(function: Any) -> Any:
    def create(self: Any, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, function)

    return create


def _comparing(compare: Any) -> Any:
    def create(self: Any, lhs: Any, rhs: Any) -> Any:
        return interpreter.TensorHandle(compare(self, lhs, rhs).data, tl.int1)

    return create


_patched: set[int] = set()  # the globals of modules whose functions this launch has called


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    module = id(self.fn.__globals__)
    if module not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(module)
    return self.rewrite()(*args, **kwargs)


def _unwrapping(operator: Any) -> Any:
    """An operator of constants whose result is a tensor where the other operand is one."""

    def apply(self: Any, other: Any) -> Any:
        result = operator(self, other)
        return result.value if isinstance(other, tl.tensor) else result

    return apply


def correct() -> None:
    """Apply the corrections to Triton's interpreter; once is enough."""
    if interpreter.InterpreterBuilder.create_fma is _create_fma:
        return
    interpreter.InterpreterBuilder.create_fma = _create_fma
    interpreter._convert_float = _rounding(interpreter._convert_float)
    interpreter.InterpreterBuilder.create_dot = _widening_dot(
        interpreter.InterpreterBuilder.create_dot
    )
    for name, function in (("maxnumf", np.fmax), ("minnumf", np.fmin)):
        setattr(interpreter.InterpreterBuilder, f"create_{name}", _binary(function))
    for name in filter(_COMPARISON.match, dir(interpreter.InterpreterBuilder)):
        compare = getattr(interpreter.InterpreterBuilder, name)
        setattr(interpreter.InterpreterBuilder, name, _comparing(compare))
    interpreter.InterpretedFunction.__call__ = _call
    for name in _OPERATORS:
        setattr(tl.constexpr, name, _unwrapping(getattr(tl.constexpr, name)))
    launch = interpreter.GridExecutor.__call__

    def quiet(self: Any, *args: Any, **kwargs: Any) -> Any:
        _patched.clear()
        with np.errstate(all="ignore"):
            return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = quiet
