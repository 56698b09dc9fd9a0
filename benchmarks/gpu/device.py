"""What is measured on: CUDA events, CUDA graphs, and what the device is called."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

import proxytune_kernels as ptk
from benchmarks.environment import cpu_model
from proxytune_kernels.kernels import interpreted

Run = Callable[[], object]

BACKEND = "triton"

_WARM_UP = 2  # the first call compiles and allocates; the second is as all others


class NoDevice(RuntimeError):
    """Nothing to measure on; the message is a sentence."""


class CannotCapture(RuntimeError):
    """A call does what a CUDA graph can't hold: it synchronises, or copies to the host."""


class Device(Protocol):
    """What the command needs of a device. The command has a CUDA one; tests bring their own."""

    name: str
    """As the driver calls it."""
    torch_device: str
    """For ``torch.empty(device=...)``."""
    backend: str
    """Of provider ``ours``, by its name in ``ptk.backends()``."""
    cuda_backend: str
    """Of provider ``cuda``; it may not be usable."""
    l2_bytes: int
    memory_bytes: int

    def describe(self) -> dict[str, Any]:
        """Fields of the environment record that tell of this device."""

    def synchronize(self) -> None:
        """Wait for all work; raises what an earlier call left behind."""

    def capture(self, calls: Sequence[Run]) -> Run:
        """One thing to run that does all these calls in turn, without the host between them.

        Raises:
            CannotCapture: a call can't be captured.
        """

    def seconds(self, run: Run, times: int) -> float:
        """Device seconds of one of ``times`` runs in a row."""

    def release(self) -> None:
        """Hand back what freed tensors held."""


def find_device() -> CudaDevice:
    """The current CUDA device.

    Raises:
        NoDevice: there is none, or the backend can't run on it; says which and why.
    """
    if torch.version.cuda is None:
        raise NoDevice(f"no CUDA device: torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise NoDevice(f"no CUDA device: torch {torch.__version__} finds none on this machine")
    if interpreted():
        raise NoDevice("TRITON_INTERPRET runs the kernels on the processor: unset it")
    reason = ptk.backends()[BACKEND]
    if reason is not None:
        raise NoDevice(f"the {BACKEND} backend can't run here: {reason}")
    return CudaDevice()


class CudaDevice:
    """The current CUDA device: see :class:`Device`."""

    torch_device = "cuda"
    backend = BACKEND
    cuda_backend = "cuda"

    def __init__(self) -> None:
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name: str = self._properties.name
        self.l2_bytes: int = self._properties.L2_cache_size
        self.memory_bytes: int = self._properties.total_memory

    def describe(self) -> dict[str, Any]:
        """See :class:`Device`."""
        return {
            "device": "cuda",
            "device_name": self.name,
            "host_cpu": cpu_model(),
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "compute_capability": f"{self._properties.major}.{self._properties.minor}",
            "multiprocessors": self._properties.multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "device_memory_bytes": self.memory_bytes,
        }

    def synchronize(self) -> None:
        """See :class:`Device`."""
        torch.cuda.synchronize()

    def capture(self, calls: Sequence[Run]) -> Run:
        """See :class:`Device`. The calls run one after another on one stream."""
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves torch on the capturing stream; the outer context comes back.
        with torch.cuda.stream(torch.cuda.current_stream()):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    calls[0]()
            torch.cuda.synchronize()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    for call in calls:
                        call()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # The end of a broken capture raises too; what broke it says more.
                raise CannotCapture(first_line(error.__context__ or error)) from error
        return graph.replay

    def seconds(self, run: Run, times: int) -> float:
        """See :class:`Device`. By CUDA events on the current stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times

    def release(self) -> None:
        """See :class:`Device`."""
        torch.cuda.empty_cache()


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def slug(name: str) -> str:
    """A device's name for a file name: ``NVIDIA H100 80GB HBM3`` is ``h100-80gb-hbm3``."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word != "nvidia") or "unknown"


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says: one line for a note."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
