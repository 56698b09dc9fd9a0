"""A run's state: the time that is left, and what came of it so far."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.device import first_line
from benchmarks.harness.report import Column, console, environment, look_up, write_json_lines

Record = Mapping[str, Any]

# Guesses, until the first of a kind was measured: a unit of replays, one that compiles twice, all
# ways to decode a trio at a batch size.
_FIRST_COSTS = {"plain": 3.0, "compiled": 25.0, "decoding": 60.0}
_NEWEST = 0.5  # weight of the newest cost in the running mean: batch sizes come in runs


class Budget:
    """Seconds left of a run, and what still fits by what the like of it took."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._costs = dict(_FIRST_COSTS)

    def left(self, reserved: float = 0.0) -> float:
        """Seconds left when some are reserved for later; never negative."""
        return max(0.0, self._end - self._clock() - reserved)

    def fits(self, kind: str, reserved: float = 0.0) -> bool:
        """Whether one more unit of a kind is likely to end in time."""
        return self._costs[kind] <= self.left(reserved)

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Learn what a unit of a kind takes."""
        start = self._clock()
        yield
        self._costs[kind] += _NEWEST * (self._clock() - start - self._costs[kind])


class DeviceLost(RuntimeError):
    """An error that all later calls on the device would report again."""


@dataclass(frozen=True)
class Outcome:
    """How a stage went: ``failed`` makes the command's exit code 1."""

    sentence: str
    failed: bool = False
    fields: Record = field(default_factory=dict)


class Journal:
    """Lines of results, saved as they come, as a run may be cut short.

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

    def outcome(self, stage: str, outcome: Outcome) -> None:
        """Say and keep how a stage went; a failure makes the exit code 1."""
        say(outcome.sentence)
        self.failed |= outcome.failed
        text = {"op": stage, "text": outcome.sentence, "failed": outcome.failed}
        self.add([{**text, **outcome.fields}])

    def note(self, sentence: str, *, failed: bool = False) -> None:
        """Say what was not done, and why."""
        self.outcome("note", Outcome(sentence, failed))

    @contextmanager
    def guarded(self, what: str, *, ours: bool = True) -> Iterator[None]:
        """Turn what goes wrong into a note: a failure where it is ours, but for lack of memory."""
        try:
            yield
        except DeviceLost:
            raise
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
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise DeviceLost(f"{what}: the device is lost: {first_line(error)}") from error

    @property
    def copy_rate(self) -> float:
        """Bytes per second, read and written, of the run's device-to-device copies."""
        [copy] = [r for r in self.records if r["op"] == "copy"]
        return median(copy["bytes_per_second"])

    @property
    def where(self) -> str:
        """One line that says where the numbers come from."""
        e = {**environment(), **self.device}
        revision = "no git revision" if e["revision"] is None else e["revision"][:10]
        if e["dirty"]:
            revision += " with local changes"
        versions = f"torch {e['torch']}, triton {e['triton']}"
        return f"{e['device_name']}, driver {e['driver']}, {versions}, {revision}"

    def conclude(self, page: str | None, draw: Callable[[Path], None] | None) -> None:
        """Write a page and a picture beside the results, where there are."""
        written = [self.output]
        if page is not None:
            written.append(self.output.with_suffix(".md"))
            written[-1].write_text(page)
        if draw is not None:
            try:
                draw(self.output.with_suffix(".png"))
                written.append(self.output.with_suffix(".png"))
            except ModuleNotFoundError as error:
                self.note(f"No picture: {error}.")
        for path in written:
            say(f"Wrote {path}")


def release() -> None:
    """Hand back what freed tensors held."""
    gc.collect()
    torch.cuda.empty_cache()


def say(sentence: str) -> None:
    """Print as it is: no markup, no wrapping."""
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def cells(record: Record, columns: Sequence[Column]) -> list[str]:
    """A record's text in each column; a dash for what it does not have."""
    found = [(look_up(record, path), text) for _, path, text in columns]
    return ["-" if value is None else text(value) for value, text in found]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    ruler = ["---"] * len(columns)
    return [f"| {' | '.join(cells)} |" for cells in (columns, ruler, *rows)]
