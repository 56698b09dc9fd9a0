"""The check of what nvcc makes of the CUDA C++ kernels: reading it, its promises, the command."""

import shutil
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton, whose tools read the code, is not installed")

from benchmarks.static import cluster, report, sass
from benchmarks.static.figures import Figures, Stored, Unit
from tests.benchmarks.static_command import static

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="needs a C++ compiler (c++)"
)
needs_nvcc = pytest.mark.skipif(
    cluster.missing() is not None, reason=f"needs nvcc: {cluster.missing()}"
)

SYMBOLS = {
    "sample": "_ZN3ptk4cuda1_13sample_kernelILb0EEEv21args",
    "sample_top": "_ZN3ptk4cuda1_13sample_kernelILb1EEEv21args",
    "coupled": "_ZN3ptk4cuda1_13verify_kernelILi0EEEv21args",
    "rejection": "_ZN3ptk4cuda1_13verify_kernelILi1EEEv21args",
}
LOAD = "LDG.E.NA.128.CONSTANT R8, desc[UR4][R10.64] ;"


def disassembly(bodies):
    """What nvdisasm prints of a file with these kernels."""
    parts = ["	.target	sm_90a\n"]
    for name, lines in bodies.items():
        symbol = SYMBOLS[name]
        code, address = [], 0
        for line in lines:
            label = line.endswith(":")
            code.append(line if label else f"        /*{address:04x}*/   {line}")
            address += 0 if label else 16
        parts.append(f"//--------------------- .text.{symbol} --------------------------")
        parts.append(f"\t.section\t.text.{symbol}\n.text.{symbol}:\n" + "\n".join(code))
    parts.append("//--------------------- .nv.shared.reserved.0 ----------------------")
    return "\n".join(parts)


def usage(resources):
    """What cuobjdump prints of them."""
    lines = [
        f" Function {SYMBOLS[name]}:\n  REG:{registers} STACK:{stack} SHARED:1024 LOCAL:0"
        for name, (registers, stack) in resources.items()
    ]
    return "\n".join(["\nResource usage:\n Common:\n  GLOBAL:0", *lines])


TILE = "LDS.128 R4, [R2] ;"
SUMMARY = [".s:", TILE, "MUFU.EX2 R4, R4 ;", "REDUX.SUM UR4, R5 ;", "@P0 BRA `(.s) ;"]
MASSES = [
    ".m:",
    TILE,
    *["REDUX.SUM UR4, R5 ;"] * 2,
    *["FFMA R1, R1, R1, R1 ;"] * 4,
    "@P0 BRA `(.m) ;",
]
COUNTS = [".c:", TILE, *["REDUX.SUM UR4, R5 ;"] * 3, "@P0 BRA `(.c) ;"]
LOOP = [
    ".L_x_1:", LOAD, LOAD, LOAD, "IMAD R1, R1, R1, R1 ;", "@P0 BRA `(.L_x_1) ;", *SUMMARY, *MASSES,
    *COUNTS,
]  # fmt: skip
BODIES = {
    "rejection": [*LOOP, "LDL R3, [R1] ;", "EXIT ;"],
    "coupled": [*LOOP, "STG.E desc[UR6][R8.64], R33 ;", "EXIT ;"],
    "sample_top": [*LOOP, "EXIT ;"],
    "sample": [LOAD, *LOOP, "LDG.E R4, desc[UR6][R2.64] ;", "LD.E R4, [R2] ;", "EXIT ;"],
}
RESOURCES = {
    "rejection": (254, 8), "coupled": (120, 0), "sample_top": (117, 0), "sample": (101, 0),
}  # fmt: skip


def test_kernels_are_told_apart_by_their_symbols():
    kernels = cluster.read(disassembly(BODIES), usage(RESOURCES))
    assert {name: (k.registers, k.stack) for name, k in kernels.items()} == RESOURCES
    assert {name: len(k.code.instructions) for name, k in kernels.items()} == {
        "rejection": 24, "coupled": 24, "sample_top": 23, "sample": 26,
    }  # fmt: skip
    assert kernels["rejection"].code.count("LDL") == 1


def test_a_kernel_that_is_not_there():
    without = {name: body for name, body in BODIES.items() if name != "coupled"}
    with pytest.raises(ValueError, match="no kernel verify_kernelILi0E"):
        cluster.read(disassembly(without), usage(RESOURCES))


def test_figures_of_a_kernel(monkeypatch):
    """Vectors of logits are the loads that are not kept; rows that no cluster holds have none."""
    kernels = cluster.read(disassembly(BODIES), usage(RESOURCES))
    monkeypatch.setattr(cluster, "compile_for", lambda cc: kernels)
    held = cluster.Cluster(blocks=8, threads=256, shared=97_000, widest=400_000)
    monkeypatch.setattr(cluster, "clusters", lambda wanted: [held, held._replace(blocks=0)])
    unit = Unit("V=128256", "sample", 90)
    [(found, one)] = cluster.measure([unit, unit._replace(kernel="rejection")]).items()
    assert found == unit
    loads = (one.logits_loads, one.other_loads, one.narrowest)
    assert loads == ({"16": 4}, {"4": 1}, 16)
    assert (one.blocks, one.shared, one.resident_warps) == (8, 97_000, 16)
    assert (one.routes["reading"].instructions, one.routes["mass"].instructions) == (5 / 8, 2.0)


def loop(label, loads, others):
    """A loop of so many loads of vectors and other instructions, its jump included."""
    return [f"{label}:", *[LOAD] * loads, *["NOP ;"] * (others - 1), f"@P0 BRA `({label}) ;"]


def code_of(*lines):
    body = disassembly({"sample": lines}).split(" -\n")[-1]
    return sass.parse(body.split("//---")[1].split("---\n", 1)[1])


def test_instructions_a_token_are_those_of_the_longest_loop_over_three_roles():
    """Not of one role's, not of fp32's, which are shorter, and not of a loop around."""
    alone, fp32, bf16 = loop(".a", 2, 90), loop(".b", 6, 66), loop(".c", 6, 120)
    nested = [".d:", LOAD, *["NOP ;"] * 300, *loop(".e", 2, 10), "@P0 BRA `(.d) ;"]
    route = cluster.reading(code_of(*alone, *fp32, *bf16, *nested, "EXIT ;"))
    assert route.instructions == 126 / 16
    assert (route.logits_loads, route.logits_bytes) == (0.375, 6.0)


def test_instructions_a_token_of_the_loops_over_tiles():
    """Each load is of 4 tokens a lane; a loop around both, or with a third sum, is neither."""
    around = [".o:", *SUMMARY, *MASSES, "NOP ;", "@P0 BRA `(.o) ;"]
    routes = cluster.over_tiles(code_of(*around, *COUNTS, "EXIT ;"))
    assert {name: route.instructions for name, route in routes.items()} == {
        "summarise": 4 / 4, "mass": 8 / 4,
    }  # fmt: skip
    assert {route.logits_bytes for route in routes.values()} == {6.0}
    with pytest.raises(sass.CannotFollow, match="that of mass"):
        cluster.over_tiles(code_of(*SUMMARY, *COUNTS, "EXIT ;"))


UNIT = Unit("V=128256", "sample", 90)


def figures(**changes):
    widths: Any = {"logits_loads": {"16": 24}, "other_loads": {"4": 2}, "stores": {"4": 1}}
    plain = Figures(
        128, 0, 0, 97_000, 16, 100, **widths, atomics=1, barriers=3, routes={}, blocks=8
    )
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("kernel", "changes", "complaint"),
    [
        ("sample", {"registers": 129}, "registers 129, the budget is 128"),
        ("rejection", {"registers": 256}, "registers 256, the budget is 255"),
        ("sample", {"stack": 8}, "stack 8, the budget is 0"),
        ("sample", {"local": 2}, "local 2, the budget is 0"),
        ("sample", {"logits_loads": {"16": 2, "8": 1}}, "in loads of 16 bytes, but of 8"),
        ("sample", {"logits_loads": {}}, "in loads of 16 bytes, but of None"),
    ],
)
def test_broken_promises(kernel, changes, complaint):
    unit = UNIT._replace(kernel=kernel)
    assert list(cluster.broken_promises({unit: figures()})) == []
    [found] = cluster.broken_promises({unit: figures(**changes)})
    assert found.startswith(f"V=128256/{kernel} cc 90: ") and found.endswith(complaint)


@needs_compiler
def test_clusters_are_those_that_the_launch_chooses():
    """The sizes that the design states, and that a block's memory is no more than it may have."""
    wanted = cluster.units(cluster.LARGEST)
    found = dict(zip(wanted, cluster.clusters(wanted), strict=True))
    blocks = {(unit.case, unit.kernel, unit.cc): c.blocks for unit, c in found.items()}
    assert blocks["V=128256", "sample", 90] == blocks["V=151936", "coupled", 100] == 8
    assert blocks["V=128256 B=1", "sample", 90] == 16
    assert blocks["V=128256 B=1", "sample", 120] == 8
    assert {blocks["V=32000", "sample", cc] for cc in cluster.LARGEST} == {2}
    assert blocks["V=128256", "rejection", 120] == 0
    most = {90: 227, 100: 227, 120: 99}
    assert all(c.shared <= 1024 * most[unit.cc] for unit, c in found.items())


def test_what_is_absent_is_said():
    others = {
        UNIT: figures(),
        UNIT._replace(cc=120): figures(),
        UNIT._replace(kernel="coupled"): figures(),
    }
    stored = Stored("Triton 3.7.1", {}), Stored("nvcc 13.0.88", others)
    assert report.page(*stored).endswith("No cluster holds a row: coupled V=128256 at 12.0.\n")


def test_without_nvcc_the_command_says_what_it_leaves_out():
    done = static("--check", "--kernels", "cluster", CUDA_HOME="/nowhere")
    assert done.returncode == 0, done.stderr
    assert "CUDA C++ kernels: not compiled: there is no nvcc in /nowhere/bin" in done.stdout


@needs_nvcc
@needs_compiler
@pytest.mark.slow
def test_the_kernels_keep_their_promises_on_hopper(tmp_path):
    done = static("--kernels", "cluster", "--cc", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels keep their budgets" in done.stdout
