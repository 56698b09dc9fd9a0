"""The machine computes what PTX says, and sees what a kernel may not do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

from tests.ptx.device import Device, Race
from tests.ptx.instructions import ELEMENTWISE, NUMBER
from tests.ptx.program import Fault, Memory, Order, Program, Report, Unknown, launch

N = 32
PLAIN = Order()
REGISTERS = {"b16": "rs", "b32": "r", "b64": "rd"}


def kernel(body: str, parameters: int, warps: int = 1) -> Program:
    """A kernel of pointers; ``%rd0`` and on are theirs, moved on by 4 bytes a thread in %rd90.."""
    names = [f"t_param_{i}" for i in range(parameters)]
    head = ",\n".join(f"\t.param .u64 .ptr .global .align 1 {name}" for name in names)
    loads = "\n".join(f"\tld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names))
    at = "\tmov.u32 %r0, %tid.x;\n" + "\n".join(
        f"\tmad.wide.u32 %rd{90 + i}, %r0, 8, %rd{i};" for i in range(parameters)
    )
    return Program(
        f".version 8.4\n.visible .entry t(\n{head}\n)\n.reqntid {32 * warps}\n{{\n{loads}\n{at}\n"
        f"{body}\n\tret;\n}}\n"
    )


def run(
    program: Program, arrays: Sequence[Any], grid: tuple[int, ...] = (1,), order: Order = PLAIN,
    inputs: int = 0, shared: int = 0,
) -> Report:  # fmt: skip
    """On numpy arrays, of which the first ``inputs`` may not be written."""
    memory = [
        Memory(a.ctypes.data, a.ctypes.data + a.nbytes, i >= inputs) for i, a in enumerate(arrays)
    ]
    values = [a.ctypes.data for a in arrays]
    return launch(program, grid, shared, values, sorted(memory), order)


def elementwise(name: str, *sources: Any, result: Any) -> Any:
    """One instruction on 32 lanes at a time; arrays whose sizes are multiples of 32."""
    types = ELEMENTWISE[name]
    lines = []
    for i, t in enumerate((types.result, *types.sources)):
        width = re.sub(r"\D", "", t)
        lines.append((f"%{REGISTERS['b' + width]}{40 + i}", f"b{width}"))
    loads = [f"\tld.global.{w} {r}, [%rd{91 + i}];" for i, (r, w) in enumerate(lines[1:])]
    given = ", ".join(register for register, _ in lines)
    to, width = lines[0]
    body = "\n".join([*loads, f"\t{name} {given};", f"\tst.global.{width} [%rd90], {to};"])
    program = kernel(body, len(lines))
    count = len(sources[0])
    padded = [np.zeros((count, 8 // a.itemsize), a.dtype) for a in sources]
    for wide, a in zip(padded, sources, strict=True):
        wide[:, 0] = a
    out = np.zeros((count, 8 // np.dtype(result).itemsize), result)
    for start in range(0, count, N):
        part = [np.ascontiguousarray(w[start : start + N]) for w in padded]
        got = np.zeros((N, out.shape[1]), result)
        run(program, [got, *part])
        out[start : start + N] = got
    return out[:, 0]


def random_bits(seed: int, dtype: Any, count: int = 256) -> Any:
    return np.frombuffer(np.random.default_rng(seed).bytes(count * np.dtype(dtype).itemsize), dtype)


FLOATS = np.resize(
    np.array([0, -0.0, 1, -1.5, 1e-45, -1e-40, 3e38, -3e38, np.inf, -np.inf, np.nan, 65520, 65519,
              6e-8, 2.98e-8, 2.0**-14, 1.00048828125, 1.00146484375], np.float32),
    64,
)  # fmt: skip
FLOATS = np.concatenate([FLOATS, random_bits(1, np.float32, 960)])


def test_halves():
    """To fp16 and bf16 and back, ties, subnormals and infinities, as torch rounds."""
    numbers = torch.from_numpy(FLOATS.copy())
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        found = elementwise(f"cvt.rn.{name}.f32", FLOATS, result=np.uint16)
        wanted = numbers.to(dtype)
        back = elementwise(f"cvt.f32.{name}", found, result=np.float32)
        np.testing.assert_array_equal(back, wanted.float().numpy())
    every = np.arange(0, 65536, 8, dtype=np.uint16)
    wide = elementwise("cvt.f32.f16", every, result=np.float32)
    np.testing.assert_array_equal(wide, every.view(np.float16).astype(np.float32))


def test_integers():
    a, b = random_bits(2, np.uint32), random_bits(3, np.uint32)
    s, t = a.view(np.int32), b.view(np.int32)
    wide = a.astype(np.uint64) * b
    cases = {
        "add.s32": a + b, "sub.s32": a - b, "mul.lo.s32": a * b, "and.b32": a & b,
        "mul.hi.u32": (wide >> np.uint64(32)).astype(np.uint32),
        "max.s32": np.maximum(s, t).view(np.uint32), "min.u32": np.minimum(a, b),
        "shl.b32": np.where(b % 64 < 32, a << (b % 64 & 31), 0),
        "shr.s32": (s >> np.minimum(b % 64, 31).astype(np.int32)).view(np.uint32),
    }  # fmt: skip
    for name, wanted in cases.items():
        by = b % 64 if name.startswith("sh") else b
        np.testing.assert_array_equal(elementwise(name, a, by, result=np.uint32), wanted, name)
    counts = [int(x).bit_count() for x in a]
    np.testing.assert_array_equal(elementwise("popc.b32", a, result=np.uint32), counts)
    start, length = (b & 31).astype(np.uint32), (b >> 8 & 31).astype(np.uint32)
    fields = [
        (int(x) >> int(k)) & ((1 << int(n)) - 1) for x, k, n in zip(a, start, length, strict=True)
    ]
    np.testing.assert_array_equal(
        elementwise("bfe.u32", a, start, length, result=np.uint32), fields
    )
    np.testing.assert_array_equal(elementwise("mul.wide.u32", a, b, result=np.uint64), wide)


def test_floats():
    a, b = FLOATS[:512], FLOATS[512:]
    with np.errstate(all="ignore"):
        cases = {"add.rn.f32": a + b, "mul.rn.f32": a * b, "div.rn.f32": a / b,
                 "max.f32": np.fmax(a, b), "min.f32": np.fmin(a, b)}  # fmt: skip
        cut = np.trunc(np.clip(np.nan_to_num(a.astype(np.float64)), -(2.0**31), 2.0**31 - 1))
    for name, wanted in cases.items():
        np.testing.assert_array_equal(elementwise(name, a, b, result=np.float32), wanted, name)
    found = elementwise("cvt.rzi.s32.f32", a, result=np.int32)
    np.testing.assert_array_equal(found, cut.astype(np.int32))


def test_approximations_are_off_by_what_is_asked():
    x = (np.arange(N * 8, dtype=np.float32) * 0.37 - 40).reshape(-1, N)
    program = kernel(
        "\tld.global.b32 %r40, [%rd91];\n\tex2.approx.ftz.f32 %r41, %r40;\n"
        "\tst.global.b32 [%rd90], %r41;", 2,
    )  # fmt: skip
    errors = set()
    for part in x:
        given, found = np.zeros((2, N, 2), np.float32)
        given[:, 0] = part
        for ulps in (0, 2):
            run(program, [found, given], order=Order(ulps=ulps, error_seed=5))
            exact = np.exp2(part.astype(np.float64)).astype(np.float32)
            off = found[:, 0].view(np.int32) - exact.view(np.int32)
            assert abs(off).max() <= ulps
            errors |= set(off.tolist())
    assert errors == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize(
    ("body", "said"),
    [("\tst.global.b32 [%rd90+8], %r0;", "store out of bounds"),
     ("\tld.global.b32 %r1, [%rd90+-4];", "load out of bounds"),
     ("\tld.global.b32 %r1, [%rd0+2];", "misaligned access"),
     ("\tld.global.v2.b32 {%r1, %r2}, [%rd0+4];", "misaligned access"),
     ("\tst.global.b32 [%rd1], %r0;", "store to an input"),
     ("\tmov.u32 %r1, 8;\n\tst.shared.b32 [%r1], %r0;", "out of shared memory"),
     ("\tsetp.lt.u32 %p1, %r0, 3;\n\t@%p1 bar.sync 0;", "a barrier in a part of a warp"),
     ("$L:\n\tbra $L;", "too many steps")],
)  # fmt: skip
def test_faults(body, said, monkeypatch):
    monkeypatch.setattr(launch, "__defaults__", (None, 10_000))
    out, _, given = np.zeros((3, 32), np.uint64)  # what lies between is out of bounds
    memory = [(given, False), (out, True)]
    program = kernel(body, 2)
    ranges = sorted(Memory(a.ctypes.data, a.ctypes.data + a.nbytes, w) for a, w in memory)
    with pytest.raises(Fault, match=said):
        launch(program, (1,), 8, [out.ctypes.data, given.ctypes.data], ranges, Order())


def test_unknown_instructions_are_named():
    with pytest.raises(Unknown, match=r"t, line \d+: tcgen05"):
        kernel("\ttcgen05.alloc.sync.b32 [%r1], 32;", 1)


def test_divergent_lanes_meet_again():
    """A loop of as many rounds as the lane's number: results, and one address at a time."""
    body = (
        "\tmov.u32 %r1, 0;\n\tmov.u32 %r2, 0;\n$AGAIN:\n\tsetp.ge.u32 %p1, %r1, %r0;\n"
        "\t@%p1 bra $OUT;\n\tadd.u32 %r1, %r1, 1;\n\tadd.u32 %r2, %r2, %r1;\n\tbra $AGAIN;\n"
        "$OUT:\n\tbar.sync 0;\n\tst.global.b32 [%rd90], %r2;"
    )
    out = np.zeros((N, 2), np.uint32)
    run(kernel(body, 1), [out])
    np.testing.assert_array_equal(out[:, 0], [n * (n + 1) // 2 for n in range(N)])


@triton.jit
def _sum_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(x + i), 0))


@triton.jit
def _arrive_kernel(x, arrived, out, ORDER: tl.constexpr):
    """The last of the programs adds up what all have left."""
    me, n = tl.program_id(0), tl.num_programs(0)
    tl.store(x + me, me * 10)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem=ORDER) == n - 1:
        i = tl.arange(0, 32)
        tl.store(out, tl.sum(tl.load(x + i, mask=i < n, other=0), 0))


def test_a_missing_barrier_is_a_race():
    x, out = torch.arange(512), torch.zeros(1, dtype=torch.int64)
    found: list[Any] = []
    with Device(order=Order(3, races=True), on_launch=[found.append]):
        _sum_kernel[(1,)](x, out, N=512, num_warps=4)
        assert out.item() == x.sum()
        words = found[0].program.words
        barriers = np.nonzero(words[:, 0] == NUMBER["bar.sync"])[0]
        assert len(barriers)
        words[barriers, 0] = NUMBER["nop"]
        try:
            with pytest.raises(Race, match="shared"):
                _sum_kernel[(1,)](x, out, N=512, num_warps=4)
        finally:
            words[barriers, 0] = NUMBER["bar.sync"]


@triton.jit
def _total_kernel(total, arrived, out, ORDER: tl.constexpr):
    """The last of the programs reads what all have added, its own part after the others'."""
    tl.atomic_add(total, tl.program_id(0), sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem=ORDER) == tl.num_programs(0) - 1:
        tl.store(out, tl.load(total, cache_modifier=".cg"))


@pytest.mark.parametrize("order", ["acq_rel", "relaxed"])
@pytest.mark.parametrize(("kernel", "wanted"), [(_arrive_kernel, 280), (_total_kernel, 28)])
def test_only_an_ordered_arrival_orders(kernel, wanted, order):
    """Plain stores, and relaxed sums."""
    x, out = torch.zeros((2, 8), dtype=torch.int32)
    arrived = torch.zeros(1, dtype=torch.int32)
    with Device(order=Order(1, in_flight=3, races=True)):
        if order == "relaxed":
            with pytest.raises(Race, match="read after write"):
                kernel[(8,)](x, arrived, out, ORDER=order)
        else:
            kernel[(8,)](x, arrived, out, ORDER=order)
            assert out[0] == wanted


@triton.jit
def _same_kernel(out):
    tl.store(out, tl.program_id(0))


def test_programs_that_write_one_place_are_a_race():
    out = torch.zeros(1, dtype=torch.int32)
    with Device(order=Order(1, in_flight=2, races=True)), pytest.raises(Race, match="write after"):
        _same_kernel[(2,)](out)


def test_unwritten_memory_is_noise():
    with Device(poison=1):
        assert torch.empty(64).unique().numel() > 32
        assert torch.zeros(2).new_empty(64).unique().numel() > 32
