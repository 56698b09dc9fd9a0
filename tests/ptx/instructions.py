"""The PTX instructions that the machine knows, and the C++ of those that work lane by lane.

An elementwise instruction is one entry of :data:`ELEMENTWISE`: the type of its result, those of its
sources, and a C++ expression of a, b, c, d. What concerns memory, lanes or control is written by
hand in machine.cpp (:data:`SPECIAL`). Semantics: "Parallel Thread Execution ISA", section 9.
"""

from __future__ import annotations

from typing import NamedTuple

PREDICATE = "P"
"""A type: one bit a lane. The others are PTX's."""

_C_TYPES = {
    "b8": "uint8_t", "b16": "uint16_t", "u16": "uint16_t", "s16": "int16_t", "b32": "uint32_t",
    "u32": "uint32_t", "s32": "int32_t", "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t",
    "f32": "float", "f64": "double",
}  # fmt: skip

_ORDERED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_SAME = {"eq": "==", "ne": "!="}
# Of floats a and b: the first group is false for NaN, the second true.
_FLOAT_TESTS = {
    "eq": "a == b", "ne": "a < b || a > b", "lt": "a < b", "le": "a <= b", "gt": "a > b",
    "ge": "a >= b", "num": "a == a && b == b",
    "equ": "!(a < b || a > b)", "neu": "a != b", "ltu": "!(a >= b)", "leu": "!(a > b)",
    "gtu": "!(a <= b)", "geu": "!(a < b)", "nan": "a != a || b != b",
}  # fmt: skip


class Elementwise(NamedTuple):
    """What one lane computes."""

    result: str
    sources: tuple[str, ...]
    expression: str


def _integers() -> dict[str, Elementwise]:
    table: dict[str, Elementwise] = {}

    def op(name: str, result: str, sources: str, expression: str) -> None:
        table[name] = Elementwise(result, tuple(sources.split()), expression)

    for bits in (16, 32, 64):
        u, s, b = f"u{bits}", f"s{bits}", f"b{bits}"
        for t in (u, s):
            c = _C_TYPES[t]
            op(f"add.{t}", b, f"{b} {b}", "a + b")
            op(f"sub.{t}", b, f"{b} {b}", "a - b")
            op(f"mul.lo.{t}", b, f"{b} {b}", "a * b")
            op(f"mad.lo.{t}", b, f"{b} {b} {b}", "a * b + c")
            op(f"max.{t}", t, f"{t} {t}", "a > b ? a : b")
            op(f"min.{t}", t, f"{t} {t}", "a < b ? a : b")
            # A division by 0 gives what the device does not say: all ones here.
            signed = f"b == -1 ? ({c})(0 - ({_C_TYPES[u]})a) : a / b"
            op(f"div.{t}", t, f"{t} {t}", f"b == 0 ? ({c})-1 : {'a / b' if t == u else signed}")
            left = "a % b" if t == u else "b == -1 ? 0 : a % b"
            op(f"rem.{t}", t, f"{t} {t}", f"b == 0 ? a : {left}")
        for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            op(f"{name}.{b}", b, f"{b} {b}", f"a {sign} b")
        op(f"not.{b}", b, b, "~a")
        op(f"neg.{s}", b, b, "0 - a")
        op(f"abs.{s}", s, s, "a < 0 ? 0 - a : a")
        op(f"shl.{b}", b, f"{b} b32", f"b >= {bits} ? 0 : a << b")
        for t in (u, b):
            op(f"shr.{t}", u, f"{u} b32", f"b >= {bits} ? 0 : a >> b")
        op(f"shr.{s}", s, f"{s} b32", f"a >> (b >= {bits} ? {bits - 1} : b)")
        for t in (b, u, s):
            op(f"mov.{t}", b, b, "a")
            op(f"selp.{t}", b, f"{b} {b} P", "c ? a : b")
            tests = _SAME | ({} if t == b else _ORDERED) | (_UNSIGNED if t == u else {})
            for name, sign in tests.items():
                op(f"setp.{name}.{t}", "P", f"{t} {t}", f"a {sign} b")
    for bits, wide in ((32, ("uint64_t", "int64_t")), (64, ("unsigned __int128", "__int128"))):
        for k, double in zip("us", wide, strict=True):
            t = f"{k}{bits}"
            op(f"mul.hi.{t}", t, f"{t} {t}", f"({_C_TYPES[t]})((({double})a * b) >> {bits})")
    for k in "us":
        for bits in (16, 32):
            t, double = f"{k}{bits}", f"{k}{2 * bits}"
            op(f"mul.wide.{t}", double, f"{t} {t}", f"({_C_TYPES[double]})a * b")
            op(f"mad.wide.{t}", double, f"{t} {t} {double}", f"({_C_TYPES[double]})a * b + c")
        for bits in (32, 64):
            t = f"{k}{bits}"
            op(f"bfe.{t}", t, f"{t} b32 b32", f"bit_field<{_C_TYPES[t]}>(a, b, c)")
    op("popc.b32", "b32", "b32", "__builtin_popcount(a)")
    op("popc.b64", "b32", "b64", "__builtin_popcountll(a)")
    op("clz.b32", "b32", "b32", "a ? __builtin_clz(a) : 32")
    op("brev.b32", "b32", "b32", "reversed(a)")
    op("prmt.b32", "b32", "b32 b32 b32", "permuted(a, b, c)")
    both = "(((uint64_t)b << 32) | a)"
    op("shf.l.wrap.b32", "b32", "b32 b32 b32", f"(uint32_t)(({both} << (c & 31)) >> 32)")
    op("shf.r.wrap.b32", "b32", "b32 b32 b32", f"(uint32_t)({both} >> (c & 31))")
    op("lop3.b32", "b32", "b32 b32 b32 b32", "any_logic(a, b, c, d)")
    op("add.s16x2", "b32", "b32 b32", "((a + b) & 0xffff) | (((a >> 16) + (b >> 16)) << 16)")
    for name, expression in (("and", "a & b"), ("or", "a | b"), ("xor", "a ^ b")):
        op(f"{name}.pred", "P", "P P", expression)
    op("not.pred", "P", "P", "~a")
    op("mov.pred", "P", "P", "a")
    return table


def _floats() -> dict[str, Elementwise]:
    table: dict[str, Elementwise] = {}

    def op(name: str, result: str, sources: str, expression: str) -> None:
        table[name] = Elementwise(result, tuple(sources.split()), expression)

    for f, suffix in (("f32", "f"), ("f64", "")):
        for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*"), ("div", "/")):
            for rounding in (".rn",) if name == "div" else (".rn", ""):
                op(f"{name}{rounding}.{f}", f, f"{f} {f}", f"canonical(a {sign} b)")
                if f == "f32":
                    flushed = f"flushed(canonical(flushed(a) {sign} flushed(b)))"
                    op(f"{name}{rounding}.ftz.f32", f, f"{f} {f}", flushed)
        op(f"fma.rn.{f}", f, f"{f} {f} {f}", f"canonical(__builtin_fma{suffix}(a, b, c))")
        op(f"sqrt.rn.{f}", f, f, f"canonical(__builtin_sqrt{suffix}(a))")
        op(f"rcp.rn.{f}", f, f, "canonical(1 / a)")
        op(f"neg.{f}", f, f, "-a")
        op(f"abs.{f}", f, f, f"__builtin_fabs{suffix}(a)")
        op(f"mov.{f}", f, f, "a")
        op(f"selp.{f}", f, f"{f} {f} P", "c ? a : b")
        for name, function in (("max", "larger"), ("min", "smaller")):
            op(f"{name}.{f}", f, f"{f} {f}", f"{function}(a, b)")
            nan = f"a != a || b != b ? canonical(a + b) : {function}(a, b)"
            op(f"{name}.NaN.{f}", f, f"{f} {f}", nan)
        for name, test in _FLOAT_TESTS.items():
            op(f"setp.{name}.{f}", "P", f"{f} {f}", test)
    for name, function in (("max", "larger"), ("min", "smaller")):
        op(f"{name}.f32.3", "f32", "f32 f32 f32", f"{function}({function}(a, b), c)")
    # Approximations: the exact value, then an error (Machine::approximate).
    for name, exact in (("ex2", "exp2"), ("lg2", "log2"), ("sqrt", "sqrt"), ("rcp", "1 / "),
                        ("tanh", "tanh")):  # fmt: skip
        value = f"(float){exact}((double)a)" if exact != "1 / " else "(float)(1 / (double)a)"
        op(f"{name}.approx.f32", "f32", "f32", f"approximate({value}, a)")
        flushed = f"flushed({value.replace('(double)a', '(double)flushed(a)')})"
        op(f"{name}.approx.ftz.f32", "f32", "f32", f"approximate({flushed}, a)")
    op("div.full.f32", "f32", "f32 f32", "approximate((float)((double)a / (double)b), a + b)")
    op("rcp.approx.ftz.f64", "f64", "f64", "upper_half(1 / upper_half(a))")
    for name in ("add", "sub", "mul"):
        for rounding in (".rn", ""):
            op(f"{name}{rounding}.f32x2", "b64", "b64 b64", f"{name}_pairs(a, b)")
    op("fma.rn.f32x2", "b64", "b64 b64 b64", "fma_pairs(a, b, c)")
    for half in ("bf16", "f16"):
        wide = f"from_{half}"
        for name, test in _FLOAT_TESTS.items():
            test = test.replace("a", f"{wide}(a)").replace(" b", f" {wide}(b)")
            op(f"setp.{name}.{half}", "P", "b16 b16", test)
        op(f"add.rn.f32.{half}", "f32", "b16 f32", f"canonical({wide}(a) + b)")
        op(f"sub.rn.f32.{half}", "f32", "b16 f32", f"canonical({wide}(a) - b)")
        fma = f"canonical(__builtin_fmaf({wide}(a), {wide}(b), c))"
        op(f"fma.rn.f32.{half}", "f32", "b16 b16 f32", fma)
        for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
            op(f"{name}.rn.{half}", "b16", "b16 b16", f"to_{half}({wide}(a) {sign} {wide}(b))")
    return table


def _conversions() -> dict[str, Elementwise]:
    table: dict[str, Elementwise] = {}

    def op(name: str, result: str, source: str, expression: str) -> None:
        table[name] = Elementwise(result, (source,), expression)

    for half in ("bf16", "f16"):
        op(f"cvt.f32.{half}", "f32", "b16", f"from_{half}(a)")
        op(f"cvt.rn.{half}.f32", "b16", "f32", f"to_{half}(a)")
        both = f"((uint32_t)to_{half}(a) << 16) | to_{half}(b)"  # the first is the upper half
        table[f"cvt.rn.{half}x2.f32"] = Elementwise("b32", ("f32", "f32"), both)
    op("cvt.f64.f32", "f64", "f32", "(double)a")
    op("cvt.rn.f32.f64", "f32", "f64", "canonical((float)a)")
    integers = [f"{k}{bits}" for k in "su" for bits in (16, 32, 64)]
    for t in integers:
        op(f"cvt.rn.f32.{t}", "f32", t, "(float)a")
        op(f"cvt.rn.f64.{t}", "f64", t, "(double)a")
        for other in integers:
            if other[1:] != t[1:]:
                op(f"cvt.{other}.{t}", other, t, f"({_C_TYPES[other]})a")
        if t[1:] != "16":
            for f in ("f32", "f64"):
                op(f"cvt.rzi.{t}.{f}", t, f, f"saturated<{_C_TYPES[t]}>((double)a)")
    op("cvt.s16.s8", "s16", "b16", "(int16_t)(int8_t)a")
    op("cvt.s32.s8", "s32", "b32", "(int32_t)(int8_t)a")
    op("cvt.u32.u8", "u32", "b32", "a & 255")
    return table


ELEMENTWISE = _integers() | _floats() | _conversions()

SPECIAL = (
    "nop", "bra", "ret", "bar.sync", "bar.warp.sync", "sreg",
    "ld.global", "st.global", "ld.shared", "st.shared", "atom", "cp.async", "cp.commit", "cp.wait",
    "pack", "unpack", "setp2.bf16x2", "setp2.f16x2", "redux",
    "shfl.bfly", "shfl.up", "shfl.down", "shfl.idx", "vote.ballot", "vote.any", "vote.all",
    "ldmatrix", "stmatrix", "mma.bf16", "mma.f16", "wgmma", "wgmma.commit", "wgmma.wait",
)  # fmt: skip

NUMBER = {name: i for i, name in enumerate((*SPECIAL, *ELEMENTWISE))}


def _case(name: str, one: Elementwise) -> str:
    """A case of the machine's switch: F is the frame, m the lanes that take part."""
    sources = list(zip("abcd", one.sources, strict=False))
    lines = [f"case {NUMBER[name]}: {{  // {name}"]
    if one.sources == (PREDICATE,) * len(sources):  # all lanes at once
        values = [
            f"const uint32_t {v} = bits_at(I.o[{k + 1}]);" for k, (v, _) in enumerate(sources)
        ]
        return "\n".join(
            [*lines, *values, f"set_bits(I.o[0], {one.expression}, m);", "break;", "}"]
        )
    for k, (v, t) in enumerate(sources):
        if t == PREDICATE:
            lines.append(f"const uint32_t {v}_ = bits_at(I.o[{k + 1}]);")
        else:
            lines.append(f"const {_C_TYPES[t]}* {v}_ = ({_C_TYPES[t]}*)(F + I.o[{k + 1}]);")
    get = " ".join(
        f"const uint32_t {v} = ({v}_ >> l) & 1;" if t == PREDICATE else
        f"const {_C_TYPES[t]} {v} = {v}_[l];"
        for v, t in sources
    )  # fmt: skip
    if one.result == PREDICATE:
        lines += [
            "alignas(64) uint32_t met[32];",
            f"for (int l = 0; l < 32; l++) {{ {get} met[l] = ({one.expression}) ? 1 : 0; }}",
            "set_bits(I.o[0], packed(met), m);",
        ]
    else:
        lines += [
            f"{_C_TYPES[one.result]}* to = ({_C_TYPES[one.result]}*)(F + I.o[0]);",
            f"if (m == ALL) for (int l = 0; l < 32; l++) {{ {get} to[l] = {one.expression}; }}",
            f"else for (int l = 0; l < 32; l++) if (m >> l & 1) {{ {get} to[l] = {one.expression}; }}",  # noqa: E501
        ]
    return "\n".join([*lines, "break;", "}"])


def numbers() -> str:
    """C++: a constant for each instruction that is written by hand."""
    names = (f"{name.replace('.', '_').upper()} = {NUMBER[name]}" for name in SPECIAL)
    return "enum Special {" + ", ".join(names) + "};\n"


def cases() -> str:
    """C++: the cases of the switch for the elementwise instructions."""
    return "\n".join(_case(name, one) for name, one in ELEMENTWISE.items()) + "\n"
