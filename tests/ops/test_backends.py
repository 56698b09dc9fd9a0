"""Which backends run, why the others don't, and which one is taken: on machines as they may be."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.harness.report import RESULTS
from proxytune_kernels import kernels
from proxytune_kernels.ops.backends import (
    CHOICES,
    Choice,
    _warn_reference,
    backends,
    choose,
    cuda,
    resolve,
)
from tests.test_imports import WITHOUT

PACKAGE = sys.modules[resolve.__module__]  # the name in ops is that of a function
V = 32_000
WITHOUT_CUDA = "no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, very slowly)"
WITHOUT_TRITON = "Triton is not installed: run `pip install 'proxytune_kernels[triton]'` (Linux)"
NOT_BUILT = (
    "the CUDA C++ extension is not built: install nvcc 12.8 or later, then run `pip install "
    "--no-build-isolation .` without PROXYTUNE_SKIP_CUDA_BUILD"
)

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason=WITHOUT_TRITON)
needs_cpu = pytest.mark.skipif(backends()["cpu"] is not None, reason="the extension is not built")


def logits(device: str, *rows: int) -> Any:
    """What ``resolve`` looks at: no tensor can be made for a device that is not there."""
    return SimpleNamespace(device=torch.device(device), shape=torch.Size((*(rows or (2,)), V)))


def take(backend: str | None, device: str, op: str = "sample", *rows: int) -> str:
    """The backend that runs an operator on a device."""
    return resolve(backend, logits(device, *rows), op, V)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Sets up a machine by the compute capabilities of its devices.

    It has Triton and, unless told, a CUDA C++ extension that takes rows of up to V tokens, in
    verify's rejection mode half as many.
    """
    caches = (kernels.unusable, kernels.device_unusable, cuda.missing,
              cuda.device_unusable, cuda.max_vocab_size,
              cuda.device_name, _warn_reference)  # fmt: skip

    def max_vocab_size(rejection: bool, device: int) -> int:
        return V // 2 if rejection else V

    def set_up(
        *capabilities: tuple[int, int], hip: str | None = None, triton: bool = True,
        built: bool = True, cuda_version: str | None = "13.0",
    ) -> None:  # fmt: skip
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(kernels, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr(cuda, "find_spec", lambda name: object() if built else None)
        monkeypatch.setattr(cuda, "__file__", str(tmp_path / "ops" / "backends" / "cuda.py"))
        monkeypatch.setattr(
            cuda, "_extension", lambda: SimpleNamespace(max_vocab_size=max_vocab_size)
        )
        monkeypatch.setattr(torch.version, "cuda", None if hip else cuda_version)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"NVIDIA H{i}00")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.version, "hip", hip)
        for cached in caches:
            cached.cache_clear()

    yield set_up
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def test_a_build_without_nvcc_says_later_where_it_looked(machine, tmp_path):
    """By the note that setup.py leaves: pip hides what a build prints."""
    (tmp_path / "_cuda_not_built.txt").write_text("there is no nvcc in /nowhere/bin")
    machine((9, 0), built=False)
    assert backends()["cuda"] == NOT_BUILT.replace(":", " (there is no nvcc in /nowhere/bin):", 1)


def check_refused(name: str, device: str, reason: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        take(name, device)
    assert str(caught.value) == f"sample: backend {name!r} can't run: {reason}"


def check_reference(device: str, reason: str) -> None:
    """The default is the reference, which says so once."""
    with pytest.warns(RuntimeWarning) as caught:
        assert take(None, device) == "reference"
    kind = device.split(":")[0]
    assert [str(w.message) for w in caught] == [
        f"proxytune_kernels runs its slow reference backend on {kind}: {reason}"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert take(None, device) == "reference"


def test_names_and_reasons():
    found = backends()
    assert found.keys() >= {"cpu", "triton", "cuda"} and found["reference"] is None
    for reason in found.values():
        assert reason is None or (reason == reason.strip() and "\n" not in reason)


@pytest.mark.parametrize("capability", ((8, 0), (8, 9), (9, 0), (12, 0)))
def test_a_device_that_is_recent_enough(machine, capability):
    machine(capability)
    assert backends()["triton"] is None
    assert take(None, "cuda:0") == "triton"
    assert take("triton", "cuda") == "triton"
    check_refused("triton", "cpu", "the logits are on cpu, it runs on cuda tensors")
    check_refused("cpu", "cuda:0", "the logits are on cuda:0, it runs on cpu tensors")
    assert take("reference", "cuda:0") == "reference"


OLD = "CUDA device {} has compute capability {}, {} or later is needed"


@pytest.mark.parametrize(
    ("backend", "capabilities", "maker", "device", "reason"),
    [
        ("triton", [(7, 5)], {}, 0, OLD.format(0, "7.5", "8.0")),
        ("triton", [(12, 0), (7, 0)], {}, 1, OLD.format(1, "7.0", "8.0")),
        ("triton", [(9, 4)], {"hip": "6.4"}, 0,
         "the device is not NVIDIA's; the kernels were never tried on another"),
        ("cuda", [(9, 0), (8, 0)], {}, 1, OLD.format(1, "8.0", "9.0")),
    ],
)  # fmt: skip
def test_a_device_that_does_not_do(machine, backend, capabilities, maker, device, reason):
    """The only one is a reason against the backend; of two the second is one of its own."""
    machine(*capabilities, **maker)
    assert backends()[backend] == (None if device else reason)
    check_refused(backend, f"cuda:{device}", reason)
    if device:
        assert take(backend, "cuda:0") == backend
    if backend == "triton":
        check_reference(f"cuda:{device}", reason)


def test_no_device(machine):
    machine()
    assert backends()["triton"] == WITHOUT_CUDA
    check_refused("triton", "cpu", WITHOUT_CUDA)


def test_interpreted_kernels_take_tensors_of_the_cpu_when_asked(machine, monkeypatch):
    machine()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels.unusable.cache_clear()
    assert backends()["triton"] is None
    assert take("triton", "cpu") == "triton"


@needs_cpu
def test_the_default_on_the_cpu_is_the_extension(machine):
    for capabilities in ((), ((9, 0),)):
        machine(*capabilities)
        assert take(None, "cpu") == "cpu"


# torch's own, at the import of its compiler
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", (None, "triton"))
def test_a_compiled_function_takes_the_backend_for_a_constant(machine, monkeypatch, backend):
    """Nothing of how it is found is traced: torch can't trace a device's capability."""
    machine((9, 0))
    told = SimpleNamespace(cuda=SimpleNamespace(**vars(torch.cuda)), version=torch.version)
    monkeypatch.undo()  # the compiler asks torch too, and must hear the truth
    monkeypatch.setattr(kernels, "torch", told)
    monkeypatch.setattr(cuda, "torch", told)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    base = logits("cuda:0")

    def step(x):
        return x + (1 if resolve(backend, base, "sample", V) == "triton" else 2)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_a_device_without_kernels(machine):
    machine()
    check_reference("mps", "no kernel is built for it")


def test_an_unknown_name():
    wanted = (
        r"combine: backend must be one of \['cpu', 'cuda', 'reference', 'triton'\] or None, "
        r"got 'gpu'"
    )
    with pytest.raises(ValueError, match=wanted):
        take("gpu", "cpu", "combine")


# The CUDA C++ backend


@pytest.mark.parametrize(
    ("capabilities", "machine_is", "reason"),
    [
        (((9, 0),), {"built": False}, NOT_BUILT),
        (
            ((9, 0),),
            {"cuda_version": None},
            "the CUDA C++ extension is built, but can't be loaded: it launches on torch's streams, "
            f"and torch {torch.__version__} is built without CUDA",
        ),
        ((), {}, "no CUDA device"),
        (((8, 9),), {}, "CUDA device 0 has compute capability 8.9, 9.0 or later is needed"),
    ],
    ids=("not built", "CPU build of torch", "no device", "too old"),
)
def test_why_cuda_is_not_usable(machine, capabilities, machine_is, reason):
    machine(*capabilities, **machine_is)
    assert backends()["cuda"] == reason
    check_refused("cuda", "cuda:0", reason)


@pytest.mark.parametrize("capability", ((9, 0), (10, 0), (12, 1)))
def test_cuda_is_usable_and_not_the_default_where_nothing_was_measured(machine, capability):
    machine(capability)
    assert backends()["cuda"] is None
    assert take("cuda", "cuda:0") == "cuda" and take("cuda", "cuda:0", "verify", 2, 3) == "cuda"
    assert take(None, "cuda:0") == "triton"
    check_refused("cuda", "cpu", "the logits are on cpu, it runs on cuda tensors")


@pytest.mark.skipif(
    find_spec("proxytune_kernels._cuda") is None, reason="the CUDA C++ extension is not built"
)
def test_the_extension_loads_where_torch_has_cuda_and_there_alone():
    """CPU builds lack one function that it needs, and no other."""
    code = "import torch, proxytune_kernels\ntry:\n    import proxytune_kernels._cuda\n"
    code += "except ImportError as error:\n    print(error)\n"
    found = run(code).strip()
    if torch.version.cuda is None:
        assert found.endswith("undefined symbol: aoti_torch_get_current_cuda_stream")
    else:
        assert found == ""


def test_an_extension_that_does_not_load(machine, monkeypatch):
    def broken() -> Any:
        raise ImportError("undefined symbol: aoti_torch")

    machine((9, 0))
    monkeypatch.setattr(cuda, "_extension", broken)
    reason = "the CUDA C++ extension does not load: undefined symbol: aoti_torch"
    assert backends()["cuda"] == reason
    check_refused("cuda", "cuda:0", reason)


def test_a_device_that_nothing_was_compiled_for(machine, monkeypatch):
    machine((9, 0))

    def max_vocab_size(rejection: bool, device: int) -> int:
        raise RuntimeError("nothing was compiled for it")

    extension = SimpleNamespace(max_vocab_size=max_vocab_size)
    monkeypatch.setattr(cuda, "_extension", lambda: extension)
    assert backends()["cuda"] == "CUDA device 0: nothing was compiled for it"


@pytest.mark.parametrize("op", ("combine", "score"))
def test_operators_that_cuda_lacks(machine, op):
    machine((9, 0))
    reason = f"it has no kernel for {op}, backend 'triton' has one"
    with pytest.raises(RuntimeError, match=f"^{op}: backend 'cuda' can't run: {reason}$"):
        take("cuda", "cuda:0", op)
    assert take(None, "cuda:0", op) == "triton"


def test_rows_that_do_not_fit(machine, monkeypatch):
    machine((9, 0))
    base = logits("cuda:0", 2, 3)
    assert resolve("cuda", base, "verify", V, False) == "cuda"
    wanted = (
        f"^verify: backend 'cuda' can't run: its clusters hold rows of at most {V // 2} tokens on "
        f"cuda:0, vocab_size is {V}$"
    )
    with pytest.raises(RuntimeError, match=wanted):
        resolve("cuda", base, "verify", V, True)
    line = Choice("NVIDIA", "verify", (1, 2 * V), (1, 99), "cuda", "none")
    monkeypatch.setattr(PACKAGE, "CHOICES", (line,))
    assert resolve(None, base, "verify", V, False) == "cuda"
    assert resolve(None, base, "verify", V, True) == "triton"


def test_cuda_takes_over_where_triton_is_missing(machine):
    machine((9, 0), triton=False)
    assert take(None, "cuda:0") == "cuda"
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        assert take(None, "cuda:0", "combine") == "reference"


def test_the_table_decides_by_device_operator_width_and_rows(machine, monkeypatch):
    lines = (
        Choice("NVIDIA H100", "sample", (V, V), (2, 8), "triton", "none"),
        Choice("NVIDIA H", "sample", (V, V), (1, 64), "cuda", "none"),
        Choice("NVIDIA H", "verify", (V, V), (6, 6), "cuda", "none"),
    )
    machine((9, 0), (9, 0))  # NVIDIA H000 and NVIDIA H100
    monkeypatch.setattr(PACKAGE, "CHOICES", lines)
    assert take(None, "cuda:0", "sample", 1) == take(None, "cuda:0", "sample", 64) == "cuda"
    assert take(None, "cuda:0", "sample", 65) == "triton"
    assert [take(None, "cuda:1", "sample", n) for n in (1, 2, 8, 9)] == [
        "cuda", "triton", "triton", "cuda",
    ]  # fmt: skip
    assert take(None, "cuda:0", "verify", 2, 3) == "cuda"
    assert take(None, "cuda:0", "verify", 3, 3) == "triton"
    for width in (V - 1, V + 1):
        assert choose("NVIDIA H000", "sample", width, 1) == "triton"
    assert choose("NVIDIA A100", "sample", V, 1) == "triton"


def test_a_choice_that_is_not_usable_gives_way(machine, monkeypatch):
    line = Choice("NVIDIA", "sample", (1, V), (1, 99), "cuda", "none")
    monkeypatch.setattr(PACKAGE, "CHOICES", (line,))
    machine((9, 0), built=False)
    assert take(None, "cuda:0") == "triton"
    machine((9, 0))
    assert take(None, "cuda:0") == "cuda"


def test_every_choice_was_measured():
    for line in CHOICES:
        assert line.backend in ("triton", "cuda") and line.op in ("sample", "verify")
        assert (RESULTS / line.source).is_file()


# torch's own, at the import of its compiler
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_function_looks_its_shapes_up(machine, monkeypatch):
    """Widths and numbers of rows may be symbols: the table then becomes guards."""
    machine((9, 0))
    fake, extension = SimpleNamespace(**vars(torch.cuda)), cuda._extension()
    monkeypatch.undo()  # the compiler asks torch too, and must hear the truth
    told = SimpleNamespace(cuda=fake, version=SimpleNamespace(cuda="13.0"))
    monkeypatch.setattr(cuda, "torch", told)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    monkeypatch.setattr(cuda, "_extension", lambda: extension)
    monkeypatch.setattr(kernels, "unusable", lambda: None)
    monkeypatch.setattr(kernels, "device_unusable", lambda index: None)
    line = Choice("NVIDIA", "sample", (9, 2 * V), (1, 3), "cuda", "none")
    monkeypatch.setattr(PACKAGE, "CHOICES", (line,))
    base = logits("cuda:0")

    def step(x):
        chosen = choose("NVIDIA", "sample", x.shape[1], x.shape[0])
        resolved = resolve(None, base, "sample", x.shape[1])
        return x + (1 if chosen == "cuda" else 2) + (10 if resolved == "cuda" else 20)

    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    shapes = ((2, 9), (3, 9), (4, 9), (2, 8), (2, V + 1))
    assert [float(compiled(torch.zeros(shape))[0, 0]) for shape in shapes] == [11, 11, 12, 22, 21]


def run(code: str, **environment: str) -> str:
    """Output of a process that sees no device."""
    inherited = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False,
        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


ASKED = """
import sys, torch, proxytune_kernels as ptk
row = torch.tensor([[0.0, 5.0, 1.0]])
print(ptk.backends()["triton"])
print(int(ptk.sample(row, temperature=0.0).token_ids), "triton" in sys.modules)
try:
    print(int(ptk.sample(row, temperature=0.0, backend="triton").token_ids))
except RuntimeError as error:
    print(error)
"""


@needs_triton
def test_asked_for_without_a_device():
    reason, default, error = run(ASKED).splitlines()
    assert reason == WITHOUT_CUDA and default == "1 False"
    assert error == f"sample: backend 'triton' can't run: {WITHOUT_CUDA}"


@pytest.mark.parametrize("interpret", ("0", "1"))
def test_asked_for_where_it_is_not_installed(interpret):
    code = WITHOUT.format(packages={"triton"}) + ASKED
    reason, default, error = run(code, TRITON_INTERPRET=interpret).splitlines()
    assert reason == WITHOUT_TRITON and default == "1 False"
    assert error == f"sample: backend 'triton' can't run: {WITHOUT_TRITON}"


@needs_triton
@needs_cpu
def test_asked_for_in_the_interpreter():
    """It runs when asked for by name; the default is what it was, and imports no Triton."""
    assert run(ASKED, TRITON_INTERPRET="1").splitlines() == ["None", "1 False", "1"]
