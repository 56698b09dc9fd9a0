"""One unit of the plan: make inputs, check every provider on them, time those that are right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.cases import OURS, OWN, Inputs, Unit, fits, make_inputs, sets_needed
from benchmarks.gpu.device import CannotCapture, Device, first_line
from benchmarks.gpu.providers import Providers
from benchmarks.gpu.timing import Timed
from benchmarks.measure import paired_ratios


class DeviceLost(RuntimeError):
    """An error that all later calls on the device would report again."""


@dataclass
class UnitResult:
    """What came of a unit."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """Lines of results."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what was not measured, and why."""
    failed: bool = False
    """Ours was wrong, or could not run."""


class UnitRunner:
    """Checks and times units on a device.

    Args:
        device: what runs them.
        unavailable: providers that can't run here, with the reason.
        copy_rate: bytes per second, read and written, of a device-to-device copy.
        check, time: which of the two to do; times that were not checked are marked so.
    """

    def __init__(
        self,
        device: Device,
        unavailable: Mapping[str, str],
        copy_rate: float,
        *,
        check: bool,
        time: bool,
    ) -> None:
        self._device, self._unavailable, self._copy_rate = device, unavailable, copy_rate
        self._check, self._time = check, time
        self._providers = Providers(device)

    def run(self, unit: Unit) -> UnitResult:
        """Do one unit; what fails in it is in the result.

        Raises:
            DeviceLost: nothing can run on the device any more.
        """
        result = UnitResult()
        case, device = unit.case, self._device
        if not fits(case, device.l2_bytes, device.memory_bytes):
            result.notes.append(f"{case}: not measured, its inputs need more memory")
            return result
        with self._guarded(result, str(case), ours=True):
            result.records = self._measure(unit, result)
        device.release()
        return result

    def _measure(self, unit: Unit, result: UnitResult) -> list[dict[str, Any]]:
        case, device = unit.case, self._device
        count = sets_needed(case.logits_bytes, device.l2_bytes) if self._time else 1
        sets = make_inputs(case, count, device.torch_device, device.backend)
        timed: list[Timed] = []
        for name in unit.providers:
            if name not in self._unavailable:
                self._prepare(unit, name, sets, timed, result)
        return self._records(unit, timed) if timed else []

    def _prepare(
        self,
        unit: Unit,
        name: str,
        sets: Sequence[Inputs],
        timed: list[Timed],
        result: UnitResult,
    ) -> None:
        """Check one provider, and add it to what is timed, once for each mode."""
        case, device = unit.case, self._device
        with self._guarded(result, f"{case}: {name}", ours=name in OWN):
            prepared = self._providers.prepare(case, name, sets[0])
            if self._check:
                prepared.check(sets[0])
            if not self._time:
                return
            for mode in timing.modes(case.batch_size, case.logits_bytes, device.l2_bytes):
                one = timing.prepare(device, name, prepared, sets, mode, may_launch=name not in OWN)
                timed.append(one)

    def _records(self, unit: Unit, timed: Sequence[Timed]) -> list[dict[str, Any]]:
        samples = timing.time_all(self._device, timed)
        own = {t.mode: s for t, s in zip(timed, samples, strict=True) if t.provider == OURS}
        records = []
        for t, seconds in zip(timed, samples, strict=True):
            ours = own.get(t.mode)
            ratio = None if ours is None else asdict(paired_ratios(seconds, ours))
            rates = timing.rates(median(seconds), unit.case.logits_bytes, self._copy_rate)
            records.append(
                {
                    **unit.case.record(),
                    **t.record(),
                    "checked": self._check,
                    "microseconds": timing.microseconds(seconds),
                    **rates,
                    "time_over_ours": ratio,
                }
            )
        return records

    @contextmanager
    def _guarded(self, result: UnitResult, what: str, *, ours: bool) -> Iterator[None]:
        """Turn a failure into a note; a peer's is no failure of the run."""
        try:
            yield
        except DeviceLost:
            raise
        except AssertionError as error:
            result.notes.append(f"{what}: wrong, not timed: {error}")
        except torch.OutOfMemoryError:
            result.notes.append(f"{what}: not measured, the device's memory does not suffice")
            self._device.release()
            return  # a smaller device is no failure
        except CannotCapture as error:
            result.notes.append(f"{what}: can't be captured in a CUDA graph: {error}")
        except Exception as error:
            result.notes.append(f"{what}: failed: {first_line(error)}")
        else:
            return
        result.failed |= ours
        try:
            self._device.synchronize()
        except Exception as error:
            raise DeviceLost(f"{what}: the device is lost: {first_line(error)}") from error
