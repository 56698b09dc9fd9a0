"""The check of what Triton and nvcc compile to: parsing, counting, promises, the command."""

import re
import shutil
from itertools import product

import pytest

pytest.importorskip("triton", reason="Triton, whose tools read the code, is not installed")

from benchmarks.harness.report import RESULTS
from benchmarks.static import cuda_kernels, triton_kernels
from benchmarks.static.__main__ import main
from benchmarks.static.figures import (
    LIMITS,
    Figures,
    Promise,
    Unit,
    accesses,
    broken,
    compare,
    count,
    read_figures,
    resident_warps,
    worse,
    write_figures,
)
from benchmarks.static.sass import Instruction, parse, parse_resources

SASS = """\
	.headerflags	@"EF_CUDA_SM90"
.text._kernel:
        /*0000*/                   S2R R1, SR_TID.X ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   LDG.E.128 R8, desc[UR6][R10.64] ;
.L_x_0:
        /*0030*/              @!P1 LDG.E.U16 R8, desc[UR6][R10.64] ;
        /*0040*/              @!P1 LDG.E.U16 R9, desc[UR6][R10.64+0x2] ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   LDL R3, [R1] ;
        /*0070*/              @!P2 STG.E desc[UR6][R8.64], R33 ;
        /*0080*/                   LD.E R4, [R2] ;
        /*0090*/                   ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR6][R2.64], R4 ;
        /*00a0*/                   STG.E.64 desc[UR6][R8.64], R34 ;
        /*00b0*/                   MEMBAR.ALL.GPU ;
        /*00c0*/                   MEMBAR.ALL.CTA ;
        /*00d0*/                   CCTL.IVALL ;
        /*00e0*/                   EXIT ;
.L_x_2:
        /*00f0*/                   BRA `(.L_x_2);
        /*0100*/                   NOP;
"""
USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _scan_kernel:
  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:728 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
GOOD = Figures(40, 0, 0, 2048, 1, 48, 3, 1, 1, 100, 1, "6x16", "2x4", "1x4")
UNIT = Unit("Triton 3.7.1", "sample", "scan", 90)


# Parsing and counting


@pytest.mark.parametrize(
    ("opcode", "size"),
    [("LDG.E.128", 16), ("LDG.E.64.STRONG.GPU", 8), ("LDG.E", 4), ("LDG.E.U16.CONSTANT", 2),
     ("LDG.E.S8", 1), ("STG.E.U8", 1), ("LDG.E.ENL2.256", 32), ("LDG.E.LTC128B.64", 8),
     ("LDG.E.LTC128B", 4)],
)  # fmt: skip
def test_access_bytes(opcode, size):
    assert Instruction(opcode).access_bytes == size


def test_figures_of_a_kernel():
    """What fills up the code is not counted; accesses to memory are, where it is asked."""
    code, resources = parse(SASS), parse_resources(USAGE)
    assert code[2].opcode == "LDG.E.128"
    got = count(code, resources, 90, 2048, 4)
    assert got == Figures(40, 8, 1, 2048, 1, 48, 1, 1, 1, 15, 1, "", "", "")
    seen = count(code, resources, 90, 0, 4, lambda i: i.access_bytes != 4)
    assert seen[-3:] == ("1x16 2x2", "", "1x8 1x4")  # generic ones are not of global memory
    assert accesses(seen.logits_loads) == {16: 1, 2: 2} and accesses("") == {}
    with pytest.raises(ValueError, match="no instruction"):
        parse("nothing")
    with pytest.raises(ValueError, match="names no resources"):
        parse_resources("Common:\n GLOBAL:0")


@pytest.mark.parametrize(
    ("kernel", "warps"),
    [((80, 40, 0, 4), 48), ((80, 64, 16384, 8), 32), ((80, 65, 0, 8), 24),
     ((80, 255, 101376, 8), 8), ((90, 41, 2048, 4), 40), ((90, 128, 50000, 8), 16),
     ((90, 168, 0, 4), 12), ((90, 255, 0, 16), 0), ((100, 96, 16384, 2), 20),
     ((100, 32, 0, 1), 32), ((120, 16, 0, 1), 24),
     ((120, 64, 50000, 8), 16), ((120, 168, 2048, 16), 0), ((120, 255, 101376, 4), 4)],
)  # fmt: skip
def test_resident_warps(kernel, warps):
    """Compute capability, registers, shared memory, warps: what cuda_occupancy.h gives for them."""
    assert resident_warps(*kernel) == warps


# Promises and comparison


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"registers": 65}, "registers 65, the budget is 64"),
        ({"stack": 16}, "stack 16, the budget is 0"),
        ({"local": 1}, "local 1, the budget is 0"),
        ({"shared": 49_153}, "shared 49153, the budget is 49152"),
        ({"logits_loads": "6x16 1x2"}, "logits are not read in loads of 16 bytes: 6x16 1x2"),
        ({"logits_loads": "12x8"}, "logits are not read in loads of 16 bytes: 12x8"),
        ({"logits_loads": ""}, "logits are not read in loads of 16 bytes: none"),
    ],
)
def test_broken_promises(changes, complaint):
    promise = Promise(64, 48 * 1024, wide=True)
    assert list(broken(GOOD, promise)) == []
    assert list(broken(GOOD._replace(**changes), promise)) == [complaint]
    assert not list(broken(GOOD._replace(logits_loads="9x2"), promise._replace(wide=False)))
    spilled = GOOD._replace(stack=48, local=24)
    assert not list(broken(spilled, promise._replace(stack=48)))
    assert len(list(broken(spilled, promise._replace(stack=40)))) == 2


def test_which_kernels_promise_what():
    assert triton_kernels.promise(UNIT)[:2] == (112, 48 * 1024)
    assert cuda_kernels.promise(Unit("", "V=32000", "coupled", 90)).registers == 128


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"registers": 41}, "registers 41, was 40"),
        ({"stack": 8}, "stack 8, was 0"),
        ({"local": 2}, "local 2, was 0"),
        ({"shared": 4096}, "shared 4096, was 2048"),
        ({"atomics": 2}, "atomics 2, was 1"),
        ({"barriers": 4}, "barriers 4, was 3"),
        ({"membars": 2}, "membars 2, was 1"),
        ({"l1_invalidations": 2}, "l1_invalidations 2, was 1"),
        ({"resident_warps": 40}, "resident_warps 40, was 48"),
        ({"logits_loads": "7x16"}, "logits_loads 7x16, was 6x16"),
        ({"other_loads": "1x16 2x4"}, "other_loads 1x16 2x4, was 2x4"),
        ({"stores": "2x4"}, "stores 2x4, was 1x4"),
    ],
)
def test_each_figure_that_got_worse_is_named(changes, complaint):
    now = GOOD._replace(**changes)
    assert list(worse(now, GOOD)) == [complaint]
    assert list(worse(GOOD, now)) == []
    assert list(worse(now, now)) == []


def test_a_stored_file_is_compared_with_what_is_compiled_now(tmp_path):
    other = UNIT._replace(cc=100)
    write_figures(tmp_path / "static.csv", {UNIT: GOOD, other: GOOD._replace(logits_loads="")})
    stored = read_figures(tmp_path / "static.csv")
    assert stored == {UNIT: GOOD, other: GOOD._replace(logits_loads="")}
    complaints, summaries = compare({**stored, UNIT: GOOD._replace(registers=41)}, stored, True)
    assert complaints == ["sample/scan cc 90: registers 41, was 40"]
    assert summaries == ["2 kernels of Triton 3.7.1 compared, 1 have other figures than stored."]
    now = {UNIT: GOOD, UNIT._replace(cc=80): GOOD}
    one_sided = ["sample/scan cc 80: no figures are stored"]
    assert compare(now, stored, complete=False)[0] == one_sided
    gone = "sample/scan cc 100: figures are stored, but there is no such kernel"
    assert compare(now, stored, complete=True)[0] == [*one_sided, gone]
    complaints, summaries = compare({UNIT._replace(compiler="Triton 3.6.0"): GOOD}, stored, True)
    assert complaints == []
    assert summaries == ["No figures of Triton 3.6.0 are stored: budgets alone are checked."]


def test_the_stored_figures_are_of_all_kernels():
    stored = read_figures(RESULTS / "static.csv")
    wanted = triton_kernels.units(LIMITS)
    assert {unit[1:] for unit in wanted} == {u[1:] for u in stored if "Triton" in u.compiler}
    cuda = {(u.case, u.kernel) for u in stored if "nvcc" in u.compiler}
    assert len(cuda) == len(cuda_kernels.KERNELS) * 4 + 1


# The CUDA C++ kernels

SYMBOLS = {
    "sample": "_ZN3ptk4cuda1_13sample_kernelILb0EEEv21args",
    "sample_top": "_ZN3ptk4cuda1_13sample_kernelILb1EEEv21args",
    "coupled": "_ZN3ptk4cuda1_13verify_kernelILi0EEEv21args",
    "rejection": "_ZN3ptk4cuda1_13verify_kernelILi1EEEv21args",
}
BODY = [
    "LDG.E.NA.128.CONSTANT R8, desc[UR4][R10.64] ;",
    "LDG.E R4, desc[UR6][R2.64] ;",
    "LD.E R4, [R2] ;",
    "EXIT ;",
]


def printed(names):
    """What nvdisasm and cuobjdump print of a file with these kernels; each has another length."""
    text, usage = ["	.target	sm_90a\n"], ["\nResource usage:\n Common:\n  GLOBAL:0"]
    for n, symbol in enumerate(SYMBOLS[name] for name in names):
        lines = ["MOV R1, R1 ;"] * n + BODY
        code = (f"        /*{16 * i:04x}*/   {line}" for i, line in enumerate(lines))
        text.append(f"//--------------------- .text.{symbol} --------------------------")
        text.append(f"\t.section\t.text.{symbol}\n.text.{symbol}:\n" + "\n".join(code))
        usage.append(f" Function {symbol}:\n  REG:{100 + n} STACK:{n} SHARED:1024 LOCAL:0")
    text.append("//--------------------- .nv.shared.reserved.0 ----------------------")
    return "\n".join(text), "\n".join(usage)


def test_cuda_kernels_are_told_apart_by_their_symbols():
    kernels = cuda_kernels.read(*printed(reversed(SYMBOLS)))
    found = {name: (len(code), own["REG"], own["STACK"]) for name, (code, own) in kernels.items()}
    assert found == {
        "rejection": (4, 100, 0), "coupled": (5, 101, 1), "sample_top": (6, 102, 2),
        "sample": (7, 103, 3),
    }  # fmt: skip
    code, resources = kernels["sample"]
    figures = count(code, resources, 90, 0, 8, cuda_kernels.is_vector, 8)
    assert (figures.logits_loads, figures.other_loads, figures.blocks) == ("1x16", "1x4", 8)
    with pytest.raises(ValueError, match="no kernel verify_kernelILi0E"):
        cuda_kernels.read(*printed(["sample", "sample_top", "rejection"]))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler (c++)")
def test_clusters_are_those_that_the_launch_chooses():
    """The sizes that the design states, and that a block's memory is no more than it may have."""
    axes = product(cuda_kernels.SHAPES, cuda_kernels.KERNELS, cuda_kernels.LARGEST)
    wanted = [Unit("", *values) for values in axes]
    found = dict(zip((unit[1:] for unit in wanted), cuda_kernels.clusters(wanted), strict=True))
    blocks = {unit: one[0] for unit, one in found.items()}
    assert blocks["V=128256", "sample", 90] == blocks["V=151936", "coupled", 100] == 8
    assert blocks["V=128256 B=1", "sample", 90] == 16
    assert blocks["V=128256 B=1", "sample", 120] == 8
    assert {blocks["V=32000", "sample", cc] for cc in cuda_kernels.LARGEST} == {2}
    assert {blocks["V=262208", name, 90] for name in ("sample", "sample_top", "coupled")} == {16}
    assert blocks["V=262208", "sample", 120] == 0
    assert blocks["V=128256", "rejection", 120] == 0
    most = {90: 227, 100: 227, 120: 99}
    assert all(shared <= 1024 * most[unit[-1]] for unit, (_, _, shared) in found.items())


# The command


@pytest.fixture
def static(run_command, monkeypatch):
    """``python -m benchmarks.static``, with variables of the environment."""

    def run(*arguments, interpret=False, **variables):
        monkeypatch.setattr("triton.knobs.runtime.interpret", interpret)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return run_command(main, *arguments)

    return run


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("--check",), {"interpret": True}, "benchmarks.static: TRITON_INTERPRET is set"),
        (("--write", "--kernels", "combine"), {}, "--write stores all figures"),
        (("--write",), {"CUDA_HOME": "/nowhere"}, "figures too, and there is no nvcc"),
    ],
)
def test_the_command_refuses(static, tmp_path, arguments, variables, message):
    done = static(*arguments, "--file", tmp_path / "static.csv", **variables)
    assert done.exit_code == 2
    assert message in re.sub(r"[│\s]+", " ", done.stderr)
    assert not list(tmp_path.iterdir())


def test_without_nvcc_the_command_says_what_it_leaves_out(static):
    done = static("--check", "--kernels", "cluster", CUDA_HOME="/nowhere")
    assert done.exit_code == 0, done.stderr
    assert "CUDA C++ kernels: not compiled: there is no nvcc in /nowhere/bin" in done.stdout


def test_check_compares(static, tmp_path, monkeypatch):
    """With figures one of which can't be reached; `make static` compiles, and compares them all."""
    unit, file = Unit(triton_kernels.COMPILER, "combine", "combine", 90), tmp_path / "static.csv"
    monkeypatch.setattr(triton_kernels, "measure", lambda units: dict.fromkeys(units, GOOD))
    arguments = ("--check", "--kernels", "combine", "--cc", "90", "--file", file)
    write_figures(file, {unit: GOOD._replace(registers=1)})
    done = static(*arguments)
    assert done.exit_code == 1
    complaints = ["combine/combine cc 90: registers 40, was 1",
                  "benchmarks.static: 1 figures are not what they should be"]  # fmt: skip
    assert done.stderr.strip().splitlines() == complaints
    write_figures(file, {unit: GOOD})
    done = static(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "1 kernels keep their budgets" in done.stdout
