"""Which backends there are, why one can't run, and which is the default."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

import proxytune_kernels as ptk
from proxytune_kernels import kernels
from tests.test_imports import WITHOUT

backends = import_module("proxytune_kernels.backends")  # the package's `backends` is the function


def run(code: str) -> str:
    """What a fresh process prints, without Triton's interpreter."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SAMPLE = "import torch, proxytune_kernels as ptk\n"
ASK = SAMPLE + "try: ptk.sample(torch.zeros(1, 4), backend='triton')\n"
ASK += "except RuntimeError as error: print(error)"


def test_names():
    assert list(ptk.backends()) == ["cpu", "triton", "reference"]
    assert ptk.backends()["reference"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_without_a_device_says_so():
    reason = run(SAMPLE + "print(ptk.backends()['triton'])")
    assert reason.startswith("no CUDA device")
    assert run(ASK) == f"sample: backend 'triton' can't run: {reason}"


def test_triton_that_is_not_installed_is_named():
    said = run(WITHOUT.format(packages="{'triton'}") + ASK)
    assert "can't run: Triton is not installed" in said and "pip install" in said


@pytest.mark.skipif(ptk.backends()["cpu"] is not None, reason="the extension is not built")
def test_the_default_on_cpu_is_the_cpu_kernel():
    assert backends.resolve(None, torch.zeros(1, 4), "sample") == "cpu"


class _Logits:
    """All that `resolve` reads of a tensor on a device that is not here."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch say that there is one CUDA device, of the given compute capability."""

    def make(capability, hip=None):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(kernels, "find_spec", lambda name: object())
        kernels.unusable.cache_clear()
        kernels.device_unusable.cache_clear()

    yield make
    monkeypatch.undo()
    kernels.unusable.cache_clear()
    kernels.device_unusable.cache_clear()


@pytest.mark.parametrize("capability", ((8, 0), (8, 9), (9, 0), (12, 0)))
def test_the_default_on_cuda_is_triton(gpu, capability):
    gpu(capability)
    assert ptk.backends()["triton"] is None
    assert backends.resolve(None, _Logits("cuda"), "sample") == "triton"
    assert backends.resolve("triton", _Logits("cuda:0"), "sample") == "triton"


def test_an_old_device_is_refused_and_runs_the_reference(gpu):
    gpu((7, 5))
    reason = ptk.backends()["triton"]
    assert reason == "CUDA device 0 has compute capability 7.5, 8.0 or later is needed"
    with pytest.raises(RuntimeError, match=reason):
        backends.resolve("triton", _Logits("cuda"), "score")
    backends._warn_reference.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow reference backend on cuda: CUDA device 0 has"):
        assert backends.resolve(None, _Logits("cuda"), "sample") == "reference"


def test_hip_is_refused(gpu):
    gpu((9, 4), hip="6.4")
    assert "not NVIDIA's" in str(ptk.backends()["triton"])


def test_tensors_elsewhere_are_refused(gpu):
    gpu((9, 0))
    with pytest.raises(RuntimeError, match="the logits are on cpu, it runs on cuda tensors"):
        ptk.sample(torch.zeros(1, 4), backend="triton")
    if ptk.backends()["cpu"] is None:
        with pytest.raises(RuntimeError, match="the logits are on cuda:0, it runs on cpu tensors"):
            backends.resolve("cpu", _Logits("cuda:0"), "sample")


def test_other_devices_run_the_reference():
    backends._warn_reference.cache_clear()
    with pytest.warns(RuntimeWarning, match="no kernel is built for it"):
        assert backends.resolve(None, _Logits("xpu"), "sample") == "reference"
