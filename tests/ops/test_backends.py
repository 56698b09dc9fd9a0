"""Which backends run, why the others don't, and which one is taken: on machines as they may be."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxytune_kernels import kernels
from proxytune_kernels.backends import _warn_reference, backends, resolve
from tests.test_imports import WITHOUT

NAMES = ["cpu", "triton", "reference"]
WITHOUT_CUDA = "no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, very slowly)"
WITHOUT_TRITON = "Triton is not installed: run `pip install 'proxytune_kernels[triton]'` (Linux)"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason=WITHOUT_TRITON)
needs_cpu = pytest.mark.skipif(backends()["cpu"] is not None, reason="the extension is not built")


def logits(device: str) -> Any:
    """What ``resolve`` looks at: no tensor can be made for a device that is not there."""
    return SimpleNamespace(device=torch.device(device))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets up a machine that has Triton, by the compute capabilities of its devices."""
    caches = (kernels.unusable, kernels.device_unusable, _warn_reference)

    def set_up(*capabilities: tuple[int, int], hip: str | None = None) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(kernels, "find_spec", lambda name: object())
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


def check_refused(name: str, device: str, reason: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        resolve(name, logits(device), "sample")
    assert str(caught.value) == f"sample: backend {name!r} can't run: {reason}"


def check_reference(device: str, reason: str) -> None:
    """The default is the reference, which says so once."""
    with pytest.warns(RuntimeWarning) as caught:
        assert resolve(None, logits(device), "sample") == "reference"
    kind = device.split(":")[0]
    assert [str(w.message) for w in caught] == [
        f"proxytune_kernels runs its slow reference backend on {kind}: {reason}"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(None, logits(device), "sample") == "reference"


def test_names_and_reasons():
    found = backends()
    assert list(found) == NAMES and found["reference"] is None
    for reason in found.values():
        assert reason is None or (reason == reason.strip() and "\n" not in reason)


@pytest.mark.parametrize("capability", ((8, 0), (8, 9), (9, 0), (12, 0)))
def test_a_device_that_is_recent_enough(machine, capability):
    machine(capability)
    assert backends()["triton"] is None
    assert resolve(None, logits("cuda:0"), "sample") == "triton"
    assert resolve("triton", logits("cuda"), "sample") == "triton"
    check_refused("triton", "cpu", "the logits are on cpu, it runs on cuda tensors")
    check_refused("cpu", "cuda:0", "the logits are on cuda:0, it runs on cpu tensors")
    assert resolve("reference", logits("cuda:0"), "sample") == "reference"


def test_a_device_that_is_too_old(machine):
    machine((7, 5))
    reason = "CUDA device 0 has compute capability 7.5, 8.0 or later is needed"
    assert backends()["triton"] == reason
    check_refused("triton", "cuda:0", reason)
    check_reference("cuda:0", reason)


def test_of_two_devices_the_second_is_too_old(machine):
    machine((12, 0), (7, 0))
    reason = "CUDA device 1 has compute capability 7.0, 8.0 or later is needed"
    assert backends()["triton"] is None
    assert resolve(None, logits("cuda:0"), "sample") == "triton"
    check_refused("triton", "cuda:1", reason)
    check_reference("cuda:1", reason)


def test_another_makers_device(machine):
    machine((9, 4), hip="6.4")
    reason = "the device is not NVIDIA's; the kernels were never tried on another"
    assert backends()["triton"] == reason
    check_refused("triton", "cuda:0", reason)
    check_reference("cuda:0", reason)


def test_no_device(machine):
    machine()
    assert backends()["triton"] == WITHOUT_CUDA
    check_refused("triton", "cpu", WITHOUT_CUDA)


def test_interpreted_kernels_take_tensors_of_the_cpu_when_asked(machine, monkeypatch):
    machine()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels.unusable.cache_clear()
    assert backends()["triton"] is None
    assert resolve("triton", logits("cpu"), "sample") == "triton"


@needs_cpu
def test_the_default_on_the_cpu_is_the_extension(machine):
    for capabilities in ((), ((9, 0),)):
        machine(*capabilities)
        assert resolve(None, logits("cpu"), "sample") == "cpu"


# torch's own, at the import of its compiler
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", (None, "triton"))
def test_a_compiled_function_takes_the_backend_for_a_constant(machine, monkeypatch, backend):
    """Nothing of how it is found is traced: torch can't trace a device's capability."""
    machine((9, 0))
    told = SimpleNamespace(cuda=SimpleNamespace(**vars(torch.cuda)), version=torch.version)
    monkeypatch.undo()  # the compiler asks torch too, and must hear the truth
    monkeypatch.setattr(kernels, "torch", told)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    base = logits("cuda:0")

    def step(x):
        return x + (1 if resolve(backend, base, "sample") == "triton" else 2)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_a_device_without_kernels(machine):
    machine()
    check_reference("mps", "no kernel is built for it")


def test_an_unknown_name():
    wanted = r"combine: backend must be one of \['cpu', 'reference', 'triton'\] or None, got 'gpu'"
    with pytest.raises(ValueError, match=wanted):
        resolve("gpu", logits("cpu"), "combine")


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
