"""A kernel's PTX, decoded for the machine, and launches of it on arrays in this process's memory.

PTX that is not known raises :class:`Unknown` with its line; what the machine finds wrong while it
runs raises :class:`Fault`.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.ptx import build
from tests.ptx.instructions import ELEMENTWISE, NUMBER, PREDICATE

SPECIAL_REGISTERS = {
    "%tid.x": 0, "%ctaid.x": 1, "%ctaid.y": 2, "%ctaid.z": 3, "%nctaid.x": 4, "%nctaid.y": 5,
    "%nctaid.z": 6, "%laneid": 7, "%ntid.x": 8, "%warpid": 9, "%tid.y": 99, "%tid.z": 99,
}  # fmt: skip
_REGISTER_WIDTHS = {"rs": "16", "r": "32", "rd": "64", "p": PREDICATE}
_REGISTER = re.compile(r"%(rs|rd|r|p)\d+$")
_SHARED = re.compile(r"global_smem(?:\+(\d+))?")  # Triton's name of a block's shared memory
_ATOMICS = {
    "add": 0, "max.s": 1, "max.u": 2, "exch": 3, "min.s": 4, "min.u": 5, "and": 6, "or": 7
}  # fmt: skip
_REDUCTIONS = {
    "add.s": 0, "add.u": 0, "max.s": 1, "min.s": 2, "max.u": 3, "min.u": 4, "and.b": 5, "or.b": 6,
    "xor.b": 7, "max.f": 10, "min.f": 11,
}  # fmt: skip
_NOTHING_TO_DO = (
    "fence", "membar", "griddepcontrol", "prefetch", "discard", "createpolicy",
    "wgmma.fence.sync.aligned",
)  # fmt: skip
_LANES = 32

Operand = tuple[str, Any, str]
"""A register, constant or parameter: which of the three, its name or value, its width."""


class Unknown(Exception):
    """PTX that the machine was not taught."""


class Fault(Exception):
    """What a launch may not do, and where."""


def _bits(t: str) -> int:
    """Bits of a PTX type."""
    return int(re.sub(r"\D", "", t.removesuffix("x2")))


def _width(t: str) -> str:
    """Width of the register that holds a type."""
    return PREDICATE if t == PREDICATE else str(max(_bits(t), 16))


def _split(text: str) -> list[str]:
    """Operands, between the commas outside of brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


class Instruction(NamedTuple):
    """As machine.cpp has it; operands are not placed yet, and a branch names its label."""

    op: int
    predicate: Operand | None
    negated: bool
    n: int
    operands: Sequence[Operand | None]
    immediate: int | str | Operand
    size: int | Operand
    line: int
    kind: int


class Program:
    """The one kernel of a PTX text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.splitlines()
        _, _, rest = text.partition(".visible .entry")
        self.name = rest.split("(")[0].strip()
        parameters, _, body = rest.partition("\n)")
        named = re.findall(r"\.param \.(\w+)[^\n]*?(\w+_param_\d+)", parameters)
        self.parameter_types = [t for t, _ in named]
        self._parameters = {name: i for i, (_, name) in enumerate(named)}
        required = re.search(r"\.reqntid (\d+)", body)
        assert required is not None
        self.warps = int(required[1]) // _LANES
        self._code: list[Instruction] = []
        self._registers: dict[str, str] = {}
        self._constants: dict[tuple[str, int], None] = {}
        self._predicate: Operand | None = None
        self._negated = False
        self._line = 0
        first = text[: text.index(body)].count("\n") + 1 + body[: body.index("{")].count("\n")
        self._decode(body[body.index("{") + 1 : body.find("\n}")], first)

    # Operands -------------------------------------------------------------------------------------

    def _register(self, name: str, width: str) -> Operand:
        self._registers.setdefault(name, width)
        return ("register", name, width)

    def _constant(self, value: int, width: str) -> Operand:
        value &= (1 << 64) - 1
        self._constants[width, value] = None
        return ("constant", value, width)

    def _operand(self, text: str, t: str, *, source: bool = False) -> Operand:
        """A register or a constant as type t; of a ``source`` in a wider register the low part."""
        width = _width(t)
        if text.startswith("%"):
            if text in SPECIAL_REGISTERS:
                raise self._unknown(text)
            found = _REGISTER.match(text)
            have = _REGISTER_WIDTHS[found[1]] if found else width
            if have == width:
                return self._register(text, width)
            if PREDICATE in (have, width) or int(have) < int(width) or not source:
                raise self._unknown(f"{text} as {t}")
            low = self._register(f"low {text} {len(self._code)}", width)
            self._emit(f"cvt.u{width}.u{have}", [low, self._register(text, have)])
            return low
        if width == PREDICATE:
            return self._constant(-1 if int(text) else 0, width)
        if found := _SHARED.fullmatch(text):
            return self._constant(int(found[1] or 0), width)
        if text.startswith(("0f", "0d")):
            return self._constant(int(text[2:], 16), width)
        if found := re.fullmatch(r"(-?)(0[xX][0-9A-Fa-f]+|\d+)U?", text):
            value = int(found[2], 0)
            return self._constant((-value if found[1] else value) & ((1 << int(width)) - 1), width)
        if text == "tmp":  # Triton's inline assembly declares it
            return self._register(f"tmp {width}", width)
        raise self._unknown(text)

    def _address(self, text: str, width: str) -> tuple[Operand, int]:
        found = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:([+-])\s*(-?\d+))?\s*\]", text)
        if not found:
            raise self._unknown(text)
        offset = int(found[3] or 0) * (-1 if found[2] == "-" else 1)
        if found[1].startswith("%"):
            return self._register(found[1], width), offset
        return self._operand(found[1], f"b{width}"), offset

    def _vector(self, text: str, t: str) -> list[Operand | None]:
        parts = [part.strip() for part in text.strip("{}").split(",")]
        return [None if part == "_" else self._operand(part, t) for part in parts]

    # Instructions ---------------------------------------------------------------------------------

    def _unknown(self, what: str) -> Unknown:
        return Unknown(f"{self.name}, line {self._line}: {what}")

    def _emit(
        self, name: str, operands: Sequence[Operand | None] = (), n: int = 0,
        immediate: int | str | Operand = 0, size: int | Operand = 0, kind: int = 0,
    ) -> None:  # fmt: skip
        self._code.append(
            Instruction(NUMBER[name], self._predicate, self._negated, n, operands, immediate, size,
                        self._line, kind)
        )  # fmt: skip

    def _decode(self, body: str, first: int) -> None:
        labels: dict[str, int] = {}
        pending, start = "", 0
        for number, line in enumerate(body.split("\n"), first):
            line = line.partition("//")[0].strip()
            if line.startswith((".loc", ".pragma", ".file")):
                continue
            while line:
                if label := re.match(r"(\$\w+):", line):
                    labels[label[1]] = len(self._code)
                    line = line[label.end() :].strip()
                elif not pending and line[0] in "{}" and not re.match(r"\{[^{}]*\}\s*,", line):
                    line = line[1:].strip()  # a scope of inline assembly
                else:
                    start = start if pending else number
                    before, semicolon, line = line.partition(";")
                    pending, line = f"{pending} {before}".strip(), line.strip()
                    if semicolon:
                        if pending and not pending.startswith(".reg"):
                            self._line = start
                            self._statement(pending)
                        pending = ""
        self._link(labels)

    def _statement(self, text: str) -> None:
        self._predicate, self._negated = None, False
        if guard := re.match(r"@(!?)(%\w+)\s+", text):
            self._predicate = self._register(guard[2], PREDICATE)
            self._negated = bool(guard[1])
            text = text[guard.end() :]
        name, _, rest = text.partition(" ")
        arguments = _split(rest)
        family = name.split(".")[0]
        if name.startswith(_NOTHING_TO_DO):
            self._emit("nop")
        elif family == "bra":
            self._emit("bra", immediate=arguments[0])
        elif family in ("ret", "exit"):
            self._emit("ret")
        elif name in ("bar.sync", "barrier.sync"):
            if arguments != ["0"]:
                raise self._unknown(text)
            self._emit("bar.sync")
        elif name == "bar.warp.sync":
            self._emit("bar.warp.sync")
        elif family in ("ld", "st"):
            self._memory(text, name, arguments)
        elif family in ("atom", "red"):
            self._atomic(name, arguments)
        elif family in ("redux", "shfl", "vote", "ldmatrix", "stmatrix"):
            self._warp_wide(text, name, arguments)
        elif family in ("cp", "mma", "wgmma"):
            self._tensor(text, name, arguments)
        elif found := re.match(r"setp\.(eq|neu)\.(b?f16x2)$", name):
            p, q = (self._operand(one, PREDICATE) for one in arguments[0].split("|"))
            a, b = (self._operand(one, "b32") for one in arguments[1:])
            self._emit(f"setp2.{found[2]}", [p, q, a, b], immediate=int(found[1] == "neu"))
        elif family == "mov" and arguments[1] in SPECIAL_REGISTERS:
            number = SPECIAL_REGISTERS[arguments[1]]
            self._emit("sreg", [self._operand(arguments[0], "b32")], immediate=number)
        elif family == "mov" and "{" in rest:
            self._pack(name, *arguments)
        else:
            self._elementwise(text, name, arguments)

    def _elementwise(self, text: str, name: str, arguments: list[str]) -> None:
        if name in ("max.f32", "min.f32") and len(arguments) == 4:
            name += ".3"
        known = ELEMENTWISE.get(name)
        if known is None or len(arguments) != 1 + len(known.sources) or "|" in arguments[0]:
            raise self._unknown(text)
        result = self._operand(arguments[0], known.result)
        given = zip(arguments[1:], known.sources, strict=True)
        sources = [self._operand(one, t, source=True) for one, t in given]
        self._emit(name, [result, *sources])

    def _pack(self, name: str, to: str, source: str) -> None:
        t = name.split(".")[1]
        unpack = to.startswith("{")
        whole, parts = (source, to) if unpack else (to, source)
        items = [part.strip() for part in parts.strip("{}").split(",")]
        size = _bits(t) // 8 // len(items)
        operands = [self._operand(whole, t), *self._vector(parts, f"b{8 * size}")]
        self._emit("unpack" if unpack else "pack", operands, n=len(items), size=size)

    def _memory(self, text: str, name: str, arguments: list[str]) -> None:
        parts = name.split(".")
        t = parts[-1]
        space = next((part for part in parts if part in ("global", "shared", "param")), None)
        if space is None:
            raise self._unknown(text)
        if space == "param":
            found = re.fullmatch(r"\[\s*(\w+)\s*\]", arguments[1])
            if not found:
                raise self._unknown(text)
            width = _width(t)
            parameter: Operand = ("parameter", found[1], width)
            register = _REGISTER.match(arguments[0])
            have = _REGISTER_WIDTHS[register[1]] if register else width
            to = self._register(arguments[0], have)
            self._emit(
                f"mov.b{width}" if have == width else f"cvt.{t[0]}{have}.{t}", [to, parameter]
            )
            return
        store = parts[0] == "st"
        at, value = arguments if store else arguments[::-1]
        address, offset = self._address(at, "64" if space == "global" else "32")
        registers = re.findall(r"%(rs|rd|r)\d+", value)
        width = _REGISTER_WIDTHS[registers[0]] if registers else _width(t)
        values = self._vector(value, f"b{width}")
        number = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
        if len(values) != number:
            raise self._unknown(text)
        self._emit(
            f"{parts[0]}.{space}", [address, *values], n=number, immediate=offset,
            size=_bits(t) // 8, kind=int(width) // 8 + 256 * (t[0] == "s"),
        )  # fmt: skip

    def _atomic(self, name: str, arguments: list[str]) -> None:
        family, *_, what, t = name.split(".")
        kind = _ATOMICS.get(what, _ATOMICS.get(f"{what}.{t[0]}"))
        if "global" not in name or kind is None or len(arguments) != 3 - (family == "red"):
            raise self._unknown(name)
        if family == "red":
            arguments = [f"%unused_{t}", *arguments]
        address, offset = self._address(arguments[1], "64")
        order = {"acquire": 1, "release": 2, "acq_rel": 3}
        ordered = next((n for word, n in order.items() if f".{word}." in name), 0)
        operands = [self._operand(arguments[0], t), address, self._operand(arguments[2], t)]
        self._emit("atom", operands, n=ordered, immediate=offset, size=_bits(t) // 8, kind=kind)

    def _warp_wide(self, text: str, name: str, arguments: list[str]) -> None:
        parts = name.split(".")
        if parts[0] == "redux":
            kind = _REDUCTIONS.get(f"{parts[2]}.{parts[-1][0]}")
            if kind is None or len(parts) != 4:
                raise self._unknown(text)
            self._emit("redux", [self._operand(one, "b32") for one in arguments], kind=kind)
        elif parts[0] == "shfl":
            to, _, met = arguments[0].partition("|")
            operands = [self._operand(one, "b32") for one in (to, *arguments[1:4])]
            within = self._operand(met, PREDICATE) if met else None
            self._emit(f"shfl.{parts[2]}", [*operands, within])
        elif parts[0] == "vote":
            result = "b32" if parts[2] == "ballot" else PREDICATE
            operands = [self._operand(arguments[0], result), self._operand(arguments[1], PREDICATE)]
            self._emit(f"vote.{parts[2]}", operands)
        else:
            at, value = arguments if parts[0] == "stmatrix" else arguments[::-1]
            address, offset = self._address(at, "32")
            values = self._vector(value, "b32")
            self._emit(
                parts[0], [address, *values], n=len(values), immediate=offset,
                size=int("trans" in parts),
            )  # fmt: skip

    def _tensor(self, text: str, name: str, arguments: list[str]) -> None:
        """Asynchronous copies and products of matrices."""
        if re.match(r"cp\.async\.c[ag]\.", name):
            to, offset = self._address(arguments[0], "32")
            source, none = self._address(arguments[1], "64")
            if none:
                raise self._unknown(text)
            taken = self._operand(arguments[-1], "b32")  # where it is not given, all
            size = int(arguments[2], 0)
            self._emit("cp.async", [to, source, taken], immediate=offset, size=size)
        elif name == "cp.async.commit_group":
            self._emit("cp.commit")
        elif name in ("cp.async.wait_group", "cp.async.wait_all"):
            self._emit("cp.wait", immediate=int(arguments[0], 0) if arguments else 0)
        elif found := re.match(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.", name):
            d, a, b, c = (self._vector(one, "b32") for one in arguments)
            assert c[2] is not None and c[3] is not None
            operands = [*d, *a, *b, *c[:2]]
            self._emit(f"mma.{found[1]}", operands, immediate=c[2], size=c[3])
        elif found := re.match(
            r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(b?f16)\.", name
        ):
            d, inner = self._vector(arguments[0], "b32"), arguments[1].startswith("{")
            a = self._vector(arguments[1], "b32") if inner else []
            if arguments[4:6] != ["1", "1"] or (not inner and arguments[6] != "0"):
                raise self._unknown(text)
            sides = [None if inner else self._operand(arguments[1], "b64"),
                     self._operand(arguments[2], "b64")]  # fmt: skip
            keep = None if arguments[3] == "0" else self._operand(arguments[3], PREDICATE)
            self._emit(
                "wgmma", [*sides, keep, *a], n=int(found[1]), size=int(found[2] == "f16"),
                kind=int(arguments[-1]),
            )  # fmt: skip
            for k in range(0, len(d), 12):
                self._emit("nop", d[k : k + 12])
        elif name == "wgmma.commit_group.sync.aligned":
            self._emit("wgmma.commit")
        elif name == "wgmma.wait_group.sync.aligned":
            self._emit("wgmma.wait", immediate=int(arguments[0]))
        else:
            raise self._unknown(text)

    # The frame ------------------------------------------------------------------------------------

    def _link(self, labels: dict[str, int]) -> None:
        """A warp's frame: constants, parameters, registers, each for all lanes, 64-byte aligned."""
        place: dict[tuple[str, Any], int] = {}
        fixed: list[bytes] = []
        end = 0
        for width, value in self._constants:
            if width == PREDICATE:
                block = struct.pack("<I", value & 0xFFFFFFFF) + bytes(60)
            else:
                block = (value & ((1 << int(width)) - 1)).to_bytes(
                    int(width) // 8, "little"
                ) * _LANES
            place["constant", (width, value)] = end
            fixed.append(block)
            end += len(block)
        self._fixed = b"".join(fixed)
        self._given: dict[tuple[int, int], int] = {}  # parameter's number and bytes: its place
        for one in self._code:
            for operand in one.operands:
                if operand and operand[0] == "parameter":
                    key = self._parameters[operand[1]], int(operand[2]) // 8
                    if key not in self._given:
                        self._given[key] = end
                        end += _LANES * key[1]
                    place["parameter", operand[1:]] = self._given[key]
        self.constant_bytes = end
        for name, width in self._registers.items():
            place["register", name] = end
            end += 64 if width == PREDICATE else _LANES * int(width) // 8
        self.frame_bytes = end

        def at(operand: Operand | None) -> int:
            if operand is None:
                return -1
            kind, value, width = operand
            key = {"constant": (width, value), "parameter": (value, width)}.get(kind, value)
            return place[kind, key]

        self.words = np.full((len(self._code), 20), -1, dtype=np.int32)
        for words, one in zip(self.words, self._code, strict=True):
            immediate = one.immediate
            if isinstance(immediate, str):
                immediate = labels[immediate]
            words[:4] = one.op, at(one.predicate), one.negated, one.n
            words[4 : 4 + len(one.operands)] = [at(operand) for operand in one.operands]
            words[16] = at(immediate) if isinstance(immediate, tuple) else immediate
            words[17] = at(one.size) if isinstance(one.size, tuple) else one.size
            words[18:] = one.line, one.kind

    def constants(self, values: Sequence[int]) -> bytes:
        """The frame's first part, with these bits as parameters."""
        frame = bytearray(self.constant_bytes)
        frame[: len(self._fixed)] = self._fixed
        for (number, size), at in self._given.items():
            bits = values[number] & ((1 << 8 * size) - 1)
            frame[at : at + _LANES * size] = bits.to_bytes(size, "little") * _LANES
        return bytes(frame)


class Memory(NamedTuple):
    """A tensor's memory: bounds, and whether the kernel may write there."""

    first: int
    end: int
    writable: bool


class Order(NamedTuple):
    """How a launch is carried out; ``seed`` 0: programs and warps one after another."""

    seed: int = 0
    in_flight: int = 1  # programs at a time
    races: bool = False  # looked for
    ulps: int = 0  # error of approximations, at most
    error_seed: int = 0  # approximations of one number have one error
    cut: int = 0  # instructions of a warp at which its program is given up; 0: never


class Report(NamedTuple):
    """What a launch did."""

    steps: Any  # int64 [programs]: instructions of the program's longest warp
    barriers: Any  # int64 [programs]: of its longest warp
    read: Any  # int64 [programs]: bytes of what it may not write
    wide: int  # of these, bytes that lanes load by 16
    instructions: int  # of all warps
    atomics: int
    divergences: int
    races: list[str]


class _Range(ctypes.Structure):
    _fields_ = [
        ("first", ctypes.c_uint64), ("end", ctypes.c_uint64), ("writable", ctypes.c_int64),
    ]  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_void_p), ("num_instructions", ctypes.c_int64),
        ("grid", ctypes.c_uint32 * 3), ("warps", ctypes.c_int32), ("shared", ctypes.c_int32),
        ("frame_bytes", ctypes.c_int32), ("constants", ctypes.c_char_p),
        ("constant_bytes", ctypes.c_int64), ("ranges", ctypes.POINTER(_Range)),
        ("num_ranges", ctypes.c_int64), ("seed", ctypes.c_uint64),
        ("error_seed", ctypes.c_uint64), ("in_flight", ctypes.c_int32),
        ("check_races", ctypes.c_int32), ("ulps", ctypes.c_int32), ("most_steps", ctypes.c_uint64),
        ("cut", ctypes.c_int64),
        ("executed", ctypes.c_void_p), ("steps", ctypes.c_void_p), ("barriers", ctypes.c_void_p),
        ("read", ctypes.c_void_p), ("wide", ctypes.c_int64), ("instructions", ctypes.c_int64),
        ("atomics", ctypes.c_int64),
        ("divergences", ctypes.c_int64), ("error", ctypes.c_char * 1000),
        ("races", ctypes.c_char * 20000),
    ]  # fmt: skip


@functools.cache
def _machine() -> Any:
    return ctypes.CDLL(str(build.machine()))


def launch(
    program: Program, grid: Sequence[int], shared: int, values: Sequence[int],
    memory: Sequence[Memory], order: Order, executed: Any = None, most_steps: int = 4 * 10**9,
) -> Report:  # fmt: skip
    """Carry out a launch.

    Args:
        program: the kernel.
        grid: up to three numbers of programs.
        shared: bytes of shared memory a program.
        values: the bits of each parameter.
        memory: what it may touch.
        order: of programs and warps, and what is checked.
        executed: int64 [instructions], where executions of each are added; None: nowhere.
        most_steps: of all warps; more are taken for a kernel that hangs.

    Raises:
        Fault: out of bounds, misaligned, a store to an input, and whatever else can't go on.
    """
    size = (*grid, 1, 1)[:3]
    steps, barriers, read = np.zeros((3, size[0] * size[1] * size[2]), dtype=np.int64)
    ranges = (_Range * len(memory))(*(_Range(*m) for m in memory))
    code, constants = program.words, program.constants(values)
    one = _Launch(
        code.ctypes.data, len(code), size, program.warps, shared, program.frame_bytes, constants,
        len(constants), ranges, len(memory), order.seed, order.error_seed, order.in_flight,
        order.races, order.ulps, most_steps, order.cut,
        None if executed is None else executed.ctypes.data, steps.ctypes.data,
        barriers.ctypes.data, read.ctypes.data,
    )  # fmt: skip
    if _machine().run_launch(ctypes.byref(one)):
        said = one.error.decode()
        line = int(said.rpartition(" ")[2])
        raise Fault(
            f"{program.name}: {said}: {program.lines[line - 1].strip() if line > 0 else ''}"
        )
    return Report(
        steps, barriers, read, one.wide, one.instructions, one.atomics, one.divergences,
        one.races.decode().splitlines(),
    )  # fmt: skip
