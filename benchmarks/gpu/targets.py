"""How good it has to be on an H100 or H200, and whether a run's measurements are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.cases import CUDA, EAGER, FLASHINFER, MAIN_VOCAB_SIZE, OURS, SAMPLE, VERIFY
from benchmarks.gpu.timing import COLD, SINGLE
from proxytune_kernels.ops.backends import choose

Record = Mapping[str, Any]

COPY_SHARE = {OURS: {"top_p": 0.70, "none": 0.85}, CUDA: {"top_p": 0.75}}
BATCH_1_MICROSECONDS = {OURS: 12.0, CUDA: 8.0}
TIMES_FASTER = {EAGER: 10.0, FLASHINFER: 2.0}
FLAT_OVER_PEAKED = 2.5
DRAM_RATIO = {OURS: {"none": 1.05, "top_p": 1.15}, CUDA: {"none": 1.05, "top_p": 1.05}}
"""By provider: what Triton's kernels have to reach, and what the CUDA C++ ones."""


@dataclass(frozen=True)
class Verdict:
    """A target and how a run stands to it."""

    target: str
    met: bool | None
    """None: not measured in this run."""
    measured: str

    def __str__(self) -> str:
        word = {True: "met", False: "missed", None: "not measured"}[self.met]
        return f"{word}: {self.target}" + (f" ({self.measured})" if self.measured else "")


def verdicts(records: Sequence[Record], device_name: str) -> list[Verdict]:
    """One verdict for each target, from all records of a run on a device."""
    return [
        *(_copy_share(records, OURS, filters) for filters in COPY_SHARE[OURS]),
        _batch_1(records, OURS),
        *(_times_faster(records, peer) for peer in TIMES_FASTER),
        _flat(records),
        *(_dram(records, OURS, filters) for filters in DRAM_RATIO[OURS]),
        *(_copy_share(records, CUDA, filters) for filters in COPY_SHARE[CUDA]),
        _batch_1(records, CUDA),
        _choices(records, device_name),
        *(_dram(records, CUDA, filters) for filters in DRAM_RATIO[CUDA]),
        _sanitizers(records),
    ]


def _whose(provider: str) -> str:
    return "" if provider == OURS else f"{provider}: "


def shape(record: Record) -> str:
    """A record's shape, for a sentence."""
    return (
        f"{record['kind']} {record['filters']} V={record['vocab_size']:,} B={record['batch_size']}"
    )


def _samples(records: Iterable[Record], provider: str, mode: str) -> dict[str, Record]:
    """A provider's times of ``sample`` by shape; the first of each, as ours may have several."""
    first: dict[str, Record] = {}
    for r in records:
        if r["op"] == SAMPLE and r.get("provider") == provider and r["mode"] == mode:
            first.setdefault(shape(r), r)
    return first


def _copy_share(records: Sequence[Record], provider: str, filters: str) -> Verdict:
    least = COPY_SHARE[provider][filters]
    target = (
        f"{_whose(provider)}B=256, V=128,256, {filters}: at least {least:.0%} of copy bandwidth"
    )
    for r in _samples(records, provider, COLD).values():
        where = (r["kind"], r["filters"], r["vocab_size"], r["batch_size"])
        if where == ("peaked", filters, MAIN_VOCAB_SIZE, 256):
            return Verdict(target, r["share_of_copy"] >= least, f"{r['share_of_copy']:.1%}")
    return Verdict(target, None, "")


def _batch_1(records: Sequence[Record], provider: str) -> Verdict:
    most = BATCH_1_MICROSECONDS[provider]
    times = {
        f"{where}, {mode}": r["microseconds"]["median"]
        for mode in (COLD, SINGLE)
        for where, r in _samples(records, provider, mode).items()
        if r["batch_size"] == 1 and r["kind"] == "peaked"
    }
    target = f"{_whose(provider)}B=1, peaked: under {most:.0f} us a call in graph replay"
    return _all(target, times, lambda t: t < most, max, " us")


def _times_faster(records: Sequence[Record], peer: str) -> Verdict:
    least = TIMES_FASTER[peer]
    name = "the combination followed by FlashInfer" if peer == FLASHINFER else "the eager chain"
    ratios = {
        where: r["time_over_ours"]["median"]
        for where, r in _samples(records, peer, COLD).items()
        if r["time_over_ours"] is not None
    }
    target = f"at least {least:.0f}x {name} at every shape"
    return _all(target, ratios, lambda ratio: ratio >= least, min, "x")


def _flat(records: Sequence[Record]) -> Verdict:
    times = {w: r["microseconds"]["median"] for w, r in _samples(records, OURS, COLD).items()}
    ratios = {
        flat: times[flat] / times[peaked]
        for flat in times
        if flat.startswith("flat") and (peaked := flat.replace("flat", "peaked", 1)) in times
    }
    target = f"flat logits at worst {FLAT_OVER_PEAKED}x the time of peaked ones"
    return _all(target, ratios, lambda ratio: ratio <= FLAT_OVER_PEAKED, max, "x")


def _choices(records: Sequence[Record], device_name: str) -> Verdict:
    """Whether the table of defaults (ops/backends) is right where it has cuda."""
    ratios = {}
    for r in records:
        if r.get("provider") != CUDA or r["mode"] != COLD or r["time_over_ours"] is None:
            continue
        op = SAMPLE if r["op"] == SAMPLE else VERIFY
        rows = r["batch_size"] * r["positions"]
        if choose(device_name, op, r["vocab_size"], rows) == CUDA:
            ratios[f"{r['op']} {shape(r)}"] = r["time_over_ours"]["median"]
    target = "cuda: never slower than triton where it is the default"
    return _all(target, ratios, lambda ratio: ratio <= 1, max, "x")


def _all(
    target: str,
    values: Mapping[str, float],
    good: Callable[[float], bool],
    worst: Callable[[Iterable[float]], float],
    unit: str,
) -> Verdict:
    """Met where all values, by shape, are good; the worst is named."""
    if not values:
        return Verdict(target, None, "")
    extreme = worst(values.values())
    where = next(key for key, value in values.items() if value == extreme)
    text = f"at worst {extreme:.3g}{unit}, {where}"
    missed = sum(not good(value) for value in values.values())
    if missed:
        text += f"; missed at {missed} of {len(values)}"
    return Verdict(target, missed == 0, text)


def _dram(records: Sequence[Record], provider: str, filters: str) -> Verdict:
    most = DRAM_RATIO[provider][filters]
    target = f"{_whose(provider)}DRAM bytes read, {filters}, peaked: at most {most}x the logits"
    for r in records:
        for case in r.get("cases", ()) if r["op"] == "profile" else ():
            if (case["provider"], case["filters"]) == (provider, filters):
                return Verdict(target, case["ratio"] <= most, f"{case['ratio']:.3f}x")
    return Verdict(target, None, "")


def _sanitizers(records: Sequence[Record]) -> Verdict:
    target = "memcheck, racecheck, initcheck and synccheck clean"
    for r in records:
        if r["op"] == "sanitize" and r.get("errors"):
            counts = r["errors"]
            if any(counts.values()):
                named = [f"{tool}: {n} error(s)" for tool, n in counts.items() if n]
                return Verdict(target, False, ", ".join(named))
            if None in counts.values():
                return Verdict(target, None, "not all of them ran")
            return Verdict(target, True, "")
    return Verdict(target, None, "")
