"""A CUDA device: its graphs and events, and the journal of what was measured on it."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

import proxytune_kernels as ptk
from benchmarks.harness.report import console, cpu_model, output_of, write_json_lines
from proxytune_kernels.kernels import interpreted

Run = Callable[[], object]
Record = Mapping[str, Any]

_WARM_UP = 2  # the first call compiles and allocates; the second is as all others
_COPY_BYTES = 5 * 2**28  # of the yardstick's buffer: 1.25 GiB, many times L2


class NoDevice(RuntimeError):
    """Nothing to measure on; the message is a sentence."""


class CannotCapture(RuntimeError):
    """A call does what a CUDA graph can't hold: it synchronises, or copies to the host."""


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says: one line for a note."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def slug(name: str) -> str:
    """A device's name for a file name: ``NVIDIA H100 80GB HBM3`` is ``h100-80gb-hbm3``."""
    return re.sub("[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-") or "unknown"


def find_device() -> Device:
    """The current CUDA device."""
    if torch.version.cuda is None:
        raise NoDevice(f"no CUDA device: torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise NoDevice(f"no CUDA device: torch {torch.__version__} finds none on this machine")
    if interpreted():
        raise NoDevice("TRITON_INTERPRET runs the kernels on the processor: unset it")
    if (reason := ptk.backends()["triton"]) is not None:
        raise NoDevice(f"the triton backend can't run here: {reason}")
    return Device()


class Device:
    """The current CUDA device."""

    def __init__(self) -> None:
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name: str = self._properties.name
        self.l2_bytes: int = self._properties.L2_cache_size

    def __str__(self) -> str:
        return f"{self.name}, driver {_driver_version()}"

    def describe(self) -> dict[str, Any]:
        """Fields of the environment record that tell of this device."""
        return {
            "device": "cuda",
            "device_name": self.name,
            "host_cpu": cpu_model(),
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "compute_capability": f"{self._properties.major}.{self._properties.minor}",
            "multiprocessors": self._properties.multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "device_memory_bytes": self._properties.total_memory,
        }

    def capture(self, calls: Sequence[Run]) -> Run:
        """One thing to run that does all these calls in turn on one stream, without the host."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
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
        """Device seconds of one of ``times`` runs in a row, by events on the current stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times

    def copy_record(self) -> dict[str, Any]:
        """The yardstick: bytes per second, read and written, of ten copies on the device."""
        source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        target.copy_(source)
        moved = 2 * _COPY_BYTES
        rates = [moved / self.seconds(lambda: target.copy_(source), 4) for _ in range(10)]
        return {"op": "copy", "bytes": moved, "bytes_per_second": rates}


def _driver_version() -> str | None:
    found = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else None


class Journal:
    """Lines of results, saved as they come: a run that is killed keeps what it measured.

    Args:
        output: where they go; the first replace what an earlier run left there.
        device: fields of the environment record that tell what is measured on.
    """

    def __init__(self, output: Path, device: Record) -> None:
        self.output, self.device = output, device
        self.records: list[Record] = []
        self.failed = False

    def add(self, records: Sequence[Record]) -> None:
        """Add lines of results."""
        write_json_lines(self.output, "gpu", records, self.device, append=bool(self.records))
        self.records += records

    def note(self, sentence: str, *, failed: bool = False) -> None:
        """Say and keep a sentence; a failure makes the command's exit code 1."""
        say(sentence)
        self.failed |= failed
        self.add([{"op": "note", "text": sentence, "failed": failed}])

    @contextmanager
    def guarded(self, what: str, *, ours: bool = True) -> Iterator[None]:
        """Turn what goes wrong into a note: a failure where it is ours, but for lack of memory."""
        try:
            yield
        except AssertionError as error:
            self.note(f"{what}: wrong, not timed: {error}", failed=ours)
        except torch.OutOfMemoryError:
            self.note(f"{what}: not measured, the device's memory does not suffice")
        except Exception as error:
            self.note(f"{what}: failed: {first_line(error)}", failed=ours)
        else:
            return
        # Only now: while it was handled, the error held on to all that its frames had made.
        release()
        torch.cuda.synchronize()  # raises where the device is lost

    @property
    def copy_rate(self) -> float:
        """Bytes per second, read and written, of the run's device-to-device copies."""
        [copy] = [r for r in self.records if r["op"] == "copy"]
        return median(copy["bytes_per_second"])

    def conclude(self) -> int:
        """Say where the results are, and what to send back; gives the command's exit code."""
        say(
            f"Wrote {self.output}\n"
            f"To send back: that file, committed (`git add {self.output}`) or attached to an issue."
        )
        if self.failed:
            say("And what was printed: something of ours was wrong, or failed.")
        return int(self.failed)


def release() -> None:
    """Hand back what freed tensors held."""
    gc.collect()
    torch.cuda.empty_cache()


def say(sentence: str) -> None:
    """Print as it is: no markup, no wrapping."""
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
