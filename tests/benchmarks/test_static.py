"""The check of what Triton compiles to: parsing, counting, budgets, comparison, the command."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from benchmarks.harness.report import RESULTS
from benchmarks.static import budgets, compiling, report
from benchmarks.static.cases import Mark, Route
from benchmarks.static.compiling import figures_of
from benchmarks.static.figures import (
    LIMITS,
    Compiled,
    Figures,
    RouteFigures,
    Stored,
    Unit,
    compare,
    resident_warps,
    worse,
)  # fmt: skip
from benchmarks.static.sass import CannotFollow, Instruction, parse, parse_resources
from tests.benchmarks.static_command import static

# A kernel's first part masks its loads or does not; its second part is not for all rows.
SOURCE = """\
def combined(at, inside):
    base = tl.load(at, mask=inside)
    expert = tl.load(at, mask=inside)
    return expert - base


def kernel(out):
    x = combined(0, 1)
    tl.store(out.first, x)
    tl.store(out.second, x)
"""
SASS = """\
	.headerflags	@"EF_CUDA_SM90"
        .type           _kernel,@function
.text._kernel:
	//## File "{file}", line 8
        /*0000*/                   S2R R1, SR_TID.X ;
        /*0010*/                   ISETP.GT.AND P0, PT, R1, UR8, PT ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
	//## File "{file}", line 2
        /*0030*/                   LDG.E.128 R8, desc[UR6][R10.64] ;
	//## File "{file}", line 3
        /*0040*/                   LDG.E.128 R12, desc[UR6][R10.64] ;
	//## File "{file}", line 8
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_0:
	//## File "{file}", line 2
        /*0060*/              @!P1 LDG.E.U16 R8, desc[UR6][R10.64] ;
        /*0070*/              @!P1 LDG.E.U16 R9, desc[UR6][R10.64+0x2] ;
        /*0080*/                   MOV R12, R8 ;
        /*0090*/                   MOV R13, R9 ;
.L_x_1:
	//## File "{file}", line 9
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/                   LDL R3, [R1] ;
        /*00c0*/              @!P2 STG.E desc[UR6][R8.64], R33 ;
        /*00d0*/              @!P3 EXIT ;
	//## File "{file}", line 10
        /*00e0*/                   LDG.E R4, desc[UR6][R2.64] ;
        /*00f0*/                   ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR6][R2.64], R4 ;
        /*0100*/                   STG.E.64 desc[UR6][R8.64], R34 ;
        /*0110*/                   EXIT ;
.L_x_2:
        /*0120*/                   BRA `(.L_x_2);
        /*0130*/                   NOP;
        /*0140*/                   NOP;
.L_x_3:
"""
ALL, SECOND = lambda arguments: arguments["BLOCK"], Mark("STG", "out.second")


def compiled(tmp_path, sass=SASS):
    file = tmp_path / "kernel.py"
    file.write_text(SOURCE)
    code = parse(sass.replace("{file}", str(file)))
    return Compiled(code, registers=40, stack=8, shared=2048, warps=2, arguments={"BLOCK": 512})


def code_of(*lines):
    """Instructions 16 bytes apart; a name with a colon is a label."""
    rows, address = [], 0
    for line in lines:
        if line.endswith(":"):
            rows.append(line)
        else:
            rows.append(f"        /*{address:04x}*/   {line} ;")
            address += 16
    return parse("\n".join(rows))


def none(i):
    return False


def path_of(code, *required, excluded=none, unwanted=none):
    return [i.opcode for i in code.longest_path(required, excluded, unwanted)]


def figures(**changes):
    route = RouteFigures(10.0, 0.375, 6.0)
    widths: Any = {"logits_loads": {"16": 6}, "other_loads": {"4": 2}, "stores": {"4": 1}}
    plain = Figures(40, 0, 0, 2048, 48, 100, **widths, atomics=1, barriers=3, routes={"all": route})
    return replace(plain, **changes)


def with_route(**changes):
    return figures(routes={"all": replace(figures().routes["all"], **changes)})


# Parsing


def test_instructions_carry_predicate_width_and_source(tmp_path):
    code = compiled(tmp_path).code
    load = code.instructions[3]
    assert (load.address, load.predicate, load.opcode) == (0x30, "", "LDG.E.128")
    assert load.stem == "LDG"
    assert load.source == "base = tl.load(at, mask=inside)"
    assert code.instructions[6].predicate == "!P1"
    assert code.labels[".L_x_1"] == 0xA0


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("LDG.E.128", 16),
        ("LDG.E.64.STRONG.GPU", 8),
        ("LDG.E", 4),
        ("LDG.E.U16.CONSTANT", 2),
        ("LDG.E.S8", 1),
        ("STG.E.U8", 1),
        ("LDG.E.ENL2.256", 32),
        ("LDG.E.LTC128B.64", 8),
        ("LDG.E.LTC128B", 4),
    ],
)
def test_access_bytes(opcode, size):
    assert Instruction(0, "", opcode, "", "", 0).access_bytes == size


def test_resources():
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function _scan_kernel:
  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:728 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    resources = parse_resources(text)
    assert (resources["REG"], resources["STACK"]) == (40, 16)
    with pytest.raises(ValueError, match="names no resources"):
        parse_resources("Common:\n GLOBAL:0")


# Paths


def test_longest_path_takes_the_longer_branch():
    code = code_of(
        "@P0 BRA `(.L_0)", "MOV", "BRA `(.L_1)", ".L_0:", "FADD", "FMUL", "FFMA", ".L_1:", "EXIT"
    )
    assert path_of(code) == ["BRA", "FADD", "FMUL", "FFMA", "EXIT"]
    assert path_of(code, excluded=lambda i: i.opcode == "FMUL") == ["BRA", "MOV", "BRA", "EXIT"]
    assert "MOV" in path_of(code, lambda i: i.opcode == "MOV")


def test_a_path_has_the_fewest_unwanted_instructions_and_then_is_the_longest():
    code = code_of(
        "@P0 BRA `(.L_0)", "FADD", "FADD", "MOV", "BRA `(.L_1)", ".L_0:", "FADD", "@P1 BRA `(.L_1)",
        "FMUL", ".L_1:", "EXIT",
    )  # fmt: skip
    assert path_of(code) == ["BRA", "FADD", "FADD", "MOV", "BRA", "EXIT"]
    path = path_of(code, unwanted=lambda i: i.opcode == "FADD")
    assert path == ["BRA", "FADD", "BRA", "FMUL", "EXIT"]


def test_a_path_may_end_at_an_exit_that_is_not_for_all():
    code = code_of("@P0 EXIT", "MOV", "EXIT")
    assert path_of(code, excluded=lambda i: i.opcode == "MOV") == ["EXIT"]
    assert path_of(code) == ["EXIT", "MOV", "EXIT"]


def test_the_slow_form_for_diverged_warps_is_not_followed():
    code = code_of("BRA.DIV UR4, `(.L_0)", "MOV", "EXIT", ".L_0:", "FADD", "FMUL", "FFMA", "EXIT")
    assert path_of(code) == ["BRA.DIV", "MOV", "EXIT"]


def test_slow_arithmetic_is_on_no_path():
    code = code_of(
        "@!P1 BRA `(.L_0)", "MOV", "CALL.REL.NOINC `($slow)", ".L_0:", "EXIT",
        "$slow:", "FFMA", "RET.REL.NODEC R8 `(.L_0)",
    )  # fmt: skip
    assert path_of(code) == ["BRA", "EXIT"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ((".L_0:", "MOV", "@P0 BRA `(.L_0)", "EXIT"), "loop"),
        (("CALL.REL.NOINC `(.L_0)", "EXIT", ".L_0:", "EXIT"), "no path"),
        (("RET.REL.NODEC R8 `(.L_0)", ".L_0:", "EXIT"), "RET"),
        (("BRA `(.L_9)", "EXIT"), "BRA"),
        (("MOV", "MOV"), "without an exit"),
    ],
)
def test_code_that_cannot_be_followed(lines, reason):
    with pytest.raises(CannotFollow, match=reason):
        path_of(code_of(*lines))


# Figures


def test_figures_of_a_kernel(tmp_path):
    routes = (Route("first", ALL, avoids=(SECOND,)), Route("second", ALL, passes=(SECOND,)))
    got = figures_of(compiled(tmp_path), 90, routes)
    assert (got.registers, got.stack, got.local, got.shared) == (40, 8, 1, 2048)
    assert got.logits_loads == {"16": 2, "2": 2}
    assert (got.other_loads, got.stores) == ({"4": 1}, {"8": 1, "4": 1})
    assert (got.atomics, got.barriers, got.instructions) == (1, 1, 18)
    assert got.narrowest == 2
    # 512 tokens for 64 threads; the masked loads, though longer, are on no route
    first, second = got.routes["first"], got.routes["second"]
    assert (first.instructions, second.instructions) == (10 / 8, 14 / 8)
    for route in (first, second):
        assert (route.logits_loads, route.logits_bytes) == (2 / 8, 32 / 8)


def test_a_mark_that_marks_nothing_is_an_error(tmp_path):
    route = Route("second", ALL, avoids=(Mark("STG", "out.renamed"),))
    with pytest.raises(CannotFollow, match="no STG from 'out.renamed'"):
        figures_of(compiled(tmp_path), 90, (route,))


def test_loads_whose_branch_became_a_predicate_are_still_the_route(tmp_path):
    masked = SASS.replace("     LDG.E.128 R8", "@!P0 LDG.E.128 R8")
    route = figures_of(compiled(tmp_path, masked), 90, (Route("all", ALL),)).routes["all"]
    assert (route.logits_loads, route.logits_bytes) == (2 / 8, 32 / 8)


def test_what_is_seldom_needed_is_avoided_if_it_can_be(tmp_path):
    kernel = compiled(tmp_path)
    routes = (
        Route("around", ALL, seldom=(SECOND,)),
        Route("through", ALL, passes=(SECOND,), seldom=(SECOND,)),
        Route("renamed", ALL, seldom=(Mark("STG", "out.renamed"),)),
    )
    instructions = [r.instructions for r in figures_of(kernel, 90, routes).routes.values()]
    assert instructions == [10 / 8, 14 / 8, 14 / 8]


# Occupancy


@pytest.mark.parametrize(
    ("kernel", "warps"),
    [
        ((80, 40, 0, 4), 48),
        ((80, 64, 16384, 8), 32),
        ((80, 65, 0, 8), 24),
        ((80, 255, 101376, 8), 8),
        ((90, 41, 2048, 4), 40),
        ((90, 128, 50000, 8), 16),
        ((90, 168, 0, 4), 12),
        ((90, 255, 0, 16), 0),
        ((100, 96, 16384, 2), 20),
        ((100, 32, 0, 1), 32),
        ((120, 16, 0, 1), 24),
        ((120, 64, 50000, 8), 16),
        ((120, 168, 2048, 16), 0),
        ((120, 255, 101376, 4), 4),
    ],
)
def test_resident_warps(kernel, warps):
    """Compute capability, registers, shared memory, warps: what cuda_occupancy.h gives for them."""
    assert resident_warps(*kernel) == warps


# Budgets and comparison


def test_a_kernel_within_its_budget():
    assert list(budgets.over_budget("combine", figures(), True, 6)) == []
    # where rows are not aligned, narrow loads break no promise
    assert list(budgets.over_budget("combine", with_route(logits_loads=3.0), False, 6)) == []


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (figures(registers=65), "registers 65, the budget is 64"),
        (figures(stack=16), "stack 16"),
        (figures(local=1), "local 1"),
        (figures(shared=48 * 1024 + 1), "shared 49153"),
        (with_route(logits_bytes=12.0), "reads 12 bytes of logits a token, the roles hold 6"),
        (with_route(logits_loads=3.0), "takes 3 loads a token, 0.375 would do"),
    ],
)
def test_broken_budgets(changed, complaint):
    (found,) = budgets.over_budget("combine", changed, True, 6)
    assert complaint in found


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        (figures(registers=41), "registers 41, was 40"),
        (figures(stack=8), "stack 8, was 0"),
        (figures(local=2), "local 2, was 0"),
        (figures(shared=4096), "shared 4096, was 2048"),
        (figures(atomics=2), "atomics 2, was 1"),
        (figures(barriers=4), "barriers 4, was 3"),
        (figures(resident_warps=40), "resident warps 40, was 48"),
        (figures(logits_loads={"8": 6}), "narrowest 8, was 16"),
        (figures(other_loads={"16": 1, "4": 2}), "other_loads 3, was 2"),
        (figures(stores={"4": 2}), "stores 2, was 1"),
        (with_route(instructions=10.125), "all: instructions a token 10.125, was 10"),
        (with_route(logits_loads=0.75), "all: loads of logits a token 0.75, was 0.375"),
    ],
)
def test_each_figure_that_got_worse_is_named(now, complaint):
    assert list(worse(now, figures())) == [complaint]
    assert list(worse(figures(), now)) == []
    assert list(worse(now, now)) == []


def test_loads_in_the_code_count_where_none_are_counted_by_token():
    before, more = figures(routes={}), figures(routes={}, logits_loads={"16": 7})
    assert list(worse(more, before)) == ["logits_loads 7, was 6"]
    assert list(worse(figures(logits_loads={"16": 12}), figures())) == []


UNIT = Unit("sample", "scan", 90)


def stored():
    return Stored("Triton 3.7.1", {UNIT: figures()})


def test_comparison_names_the_kernel_and_what_is_on_one_side_only(tmp_path):
    stored().write(tmp_path / "static.json")
    kept = Stored.read(tmp_path / "static.json")
    assert kept == stored()
    now = Stored("Triton 3.7.1", {UNIT: figures(registers=41)})
    complaints, summary = compare(now, kept, complete=True)
    assert complaints == ["sample/scan cc 90: registers 41, was 40"]
    assert "1 have other figures" in summary
    elsewhere = Stored("Triton 3.7.1", {UNIT._replace(cc=100): figures()})
    complaints, _ = compare(elsewhere, kept, complete=True)
    assert [c.split(": ", 1)[0] for c in complaints] == ["sample/scan cc 100", str(UNIT)]
    assert len(compare(elsewhere, kept, complete=False)[0]) == 1


def test_another_triton_is_not_compared():
    complaints, summary = compare(replace(stored(), compiler="Triton 3.6.0"), stored(), True)
    assert complaints == []
    assert "are Triton 3.7.1's, these are Triton 3.6.0's" in summary


# The report


def test_twins_are_listed_once():
    twin = Unit("sample V=32000", "scan", 90)
    other = Unit("sample fp32", "scan", 90)
    kept, twins = report.split_twins({UNIT: figures(), twin: figures(), other: figures(stack=8)})
    assert list(kept) == [UNIT, other]
    assert twins == {"sample V=32000: scan": "sample: scan"}


def test_affordable_instructions():
    # An H100 issues 132 * 4 * 32 * 1.98e9 a second and reads 3.35e12 bytes.
    assert report.affordable(90, 6) == pytest.approx(6 / 3.35e12 * 132 * 128 * 1.98e9)


def test_the_stored_page_is_that_of_the_stored_figures():
    kept = Stored.read(RESULTS / "static.json")
    cluster = Stored.read(RESULTS / "static-cluster.json")
    assert (RESULTS / "static.md").read_text() == report.page(kept, cluster)
    assert set(kept.figures) == set(compiling.units(LIMITS))


# The command


def test_the_command_refuses_the_interpreter():
    done = static("--check", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks.static: TRITON_INTERPRET is set")


def test_only_all_figures_are_stored(tmp_path):
    done = static("--write", "--kernels", "combine", "--results", str(tmp_path))
    assert done.returncode == 2
    assert "--write" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_check_compiles_and_compares(tmp_path):
    """Against figures one of which can't be reached, and the others can't be missed."""
    unit = Unit("combine", "combine", 90)
    high = {"registers": 255, "shared": 2**20, "atomics": 99, "barriers": 99, "resident_warps": 0}
    routes = {"all": RouteFigures(1e6, 1e6, 6.0)}
    easy = figures(**high, stack=99, local=99, other_loads={"4": 999}, routes=routes)
    easy = replace(easy, logits_loads={"1": 999}, stores={"1": 999})
    file, arguments = tmp_path / "static.json", ("--check", "--kernels", "combine", "--cc", "90")
    Stored(f"Triton {triton.__version__}", {unit: replace(easy, registers=1)}).write(file)
    done = static(*arguments, "--results", str(tmp_path))
    assert done.returncode == 1, done.stderr
    complaint, *rest = done.stderr.strip().splitlines()
    assert complaint.startswith("combine/combine cc 90: registers ")
    assert rest == ["benchmarks.static: 1 figures are not what they should be"]
    Stored(f"Triton {triton.__version__}", {unit: easy}).write(file)
    done = static(*arguments, "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "1 kernels keep their budgets" in done.stdout
