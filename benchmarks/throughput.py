"""Decoding a trio end to end: tokens/s, latency and memory of ours beside a transformers loop.

``python -m benchmarks.throughput --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import DynamicCache

from benchmarks.harness import agreement, decoding, llama, options, report, trios
from benchmarks.harness.decoding import GREEDY, Case, Generation, Prompts, Provider, Sampling
from benchmarks.harness.measure import in_turns, ratios, speed_over, summary
from benchmarks.harness.memory import in_fresh_process, peak_memory
from benchmarks.harness.samplers import ALPHA, TEMPERATURE, TOP_P
from proxytune_kernels import Speculation, Trio
from proxytune_kernels.decoder.packing import PackingError
from proxytune_kernels.decoder.pair.shared import PairError
from proxytune_kernels.trio.files import LoadError

_SPECULATION = {"speculation": Speculation()}
_PACKED, _SHARED = {"pack_weights": True}, {"pair": "shared"}
DECODERS: dict[str, dict[str, Any]] = {
    "base-only": {"roles": ("base",)},
    "ours": {},
    "ours-shared-pair": _SHARED,
    "ours-batched-pair": {"pair": "batched"},
    "ours-speculative": _SPECULATION,
    "ours-shared-speculative": _SHARED | _SPECULATION,
    "ours-lookup": {"speculation": Speculation(drafter="prompt_lookup")},
    "ours-compiled": {"compile": True},
    "base-only-packed": {"roles": ("base",)} | _PACKED,
    "base-only-int8": {"roles": ("base",), "quantize": "int8"},
    "base-only-int4": {"roles": ("base",), "quantize": "int4"},
    "ours-packed": _PACKED,
    "ours-packed-speculative": _PACKED | _SPECULATION,
    "ours-llama.cpp": {"runtime": llama.NAME},
    "ours-int8-speculative": {"quantize": "int8"} | _SPECULATION,
    "ours-int4-speculative": {"quantize": "int4"} | _SPECULATION,
}
"""Options of our decoder, or of load_trio, by the name of the provider."""
PROVIDERS = ("naive", llama.NAME, *DECODERS)
"""In the order of tables and plots."""
DEFAULT_PROVIDERS = "naive,base-only,ours,ours-shared-pair,ours-speculative"
COMPARED = ("naive", llama.NAME, "base-only", "ours", "ours-shared-pair")
"""Providers that the speeds of the others are taken over, where they ran too."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    trio: str
    dtype: str | None
    providers: tuple[str, ...]
    prompts: str
    cases: tuple[Case, ...]
    sampling: Sampling
    repeats: int
    memory: bool


@dataclass(frozen=True)
class Work:
    """A case, and its prompts: one batch for each repeat, over and over."""

    case: Case
    batches: Sequence[Prompts]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and output."""
        prompt = max(len(prompt) for batch in self.batches for prompt in batch)
        return prompt + self.case.output_length


def make_work(trio: Trio, settings: Settings) -> list[Work]:
    """Each case with its prompts, which must fit in the trio's shortest context."""
    context = min(
        model.config.get_text_config(decoder=True).max_position_embeddings
        for model in trio.models.values()
    )
    made = []
    for case in settings.cases:
        if case.prompt_length is not None:
            batches = [trios.make_prompts(trio, case.batch_size, case.prompt_length)]
        else:
            of = case.batch_size, case.output_length, settings.repeats
            batches = trios.task_batches(trio, settings.trio, settings.prompts, *of)
        work = Work(case, batches)
        if work.longest > context:
            raise typer.BadParameter(
                f"--lengths must fit in the trio's context of {context} tokens, "
                f"got {work.longest - case.output_length}:{case.output_length}"
            )
        made.append(work)
    return made


def make_provider(
    name: str, forms: trios.TrioForms, sampling: Sampling, rows: int, length: int
) -> Provider:
    """The provider of a name, with room for ``rows`` requests of ``length`` tokens."""
    if name == "naive":
        return decoding.NaiveLoop(forms.trio, sampling=sampling)
    if name == llama.NAME:
        return llama.LlamaProvider(forms.trio, forms.directory, sampling, rows, length)
    own = {"max_batch_size": rows, "max_seq_len": length, **DECODERS[name]}
    trio = forms.unmerged if own.get("pair") == "shared" else forms.trio
    if own.pop("runtime", None):
        trio = forms.gguf
    if "quantize" in own:
        trio = forms.quantized(own.pop("quantize"))
    return decoding.DecoderProvider(name, trio, sampling, **own)


def make_providers(
    forms: trios.TrioForms, settings: Settings, works: Sequence[Work]
) -> list[Provider]:
    """The providers asked for, each with room for the largest case and the agreement check.

    One that this trio or processor has no use for is left out, and said so: without an adapter
    there is no shared pair, two architectures are no batched one, only bf16 is packed, and int4
    needs layers of some sizes.
    """
    rows = max(work.case.batch_size for work in works)
    length = max(agreement.CHECKED_LENGTH, *(work.longest for work in works))
    made: list[Provider] = []
    for name in settings.providers:
        try:
            made.append(make_provider(name, forms, settings.sampling, rows, length))
        except (trios.TrioMissing, LoadError, PackingError, PairError) as reason:
            report.say(f"{name} is left out: {reason}.", "yellow")
    return made


Forwards = dict[str, list[float]]
"""Role -> seconds of each one-token forward."""


@torch.inference_mode()
def bare_forwards(models: Mapping[str, Any], prompts: Prompts, steps: int) -> Forwards:
    """Seconds of each of ``steps`` one-token forwards, role by role, each role's run alone.

    The floor of a step: ``model(one token, past_key_values=DynamicCache, use_cache=True)`` on a
    cache that holds the prompt, growing by one each step as in decoding. Prefill is not timed.
    """
    input_ids = torch.tensor(prompts)
    one = input_ids[:, -1:]
    seconds: Forwards = {}
    for role, model in models.items():
        cache = DynamicCache(config=model.config)
        model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        seconds[role] = []
        for _ in range(steps):
            start = time.perf_counter()
            model(input_ids=one, past_key_values=cache, use_cache=True)
            seconds[role].append(time.perf_counter() - start)
    return seconds


class Times:
    """What one provider took, repeat by repeat; seconds."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        repeats = [generation.seconds for generation in generations]
        self.totals = [max(row[-1] for row in rows) for rows in repeats]
        """Time to the last token."""
        self.first_tokens = [row[0] for rows in repeats for row in rows]
        """Of each row."""
        self.first_means = [fmean(row[0] for row in rows) for rows in repeats]
        """Mean time of a row's first token."""
        self.arrivals = [
            [b - a for row in rows for a, b in pairwise(row) if b > a] for rows in repeats
        ]
        """Times between what a row's caller gets; tokens that come together are one arrival."""
        self.token_means = [
            fmean((row[-1] - row[0]) / (len(row) - 1) for row in rows) for rows in repeats
        ]
        """Mean time of a row's token after the first."""
        self.counts = sum((Counter(g.counts) for g in generations), Counter())


def time_case(
    models: Mapping[str, Any],
    providers: Sequence[Provider],
    work: Work,
    repeats: int,
    tick: Callable[[str], object],
) -> list[Record]:
    """Time all providers and the bare forwards of models in turn, after a run of each to warm up.

    In one repeat all have the same batch of prompts. Gives a record for each provider.
    """
    output = work.case.output_length

    def prompts(repeat: int) -> Prompts:
        return work.batches[repeat % len(work.batches)]

    def decode(provider: Provider, repeat: int) -> Generation:
        return provider.generate(prompts(repeat), output)

    calls: dict[str, Callable[[int], Any]] = {p.name: partial(decode, p) for p in providers}
    calls["bare forwards"] = lambda r: bare_forwards(models, prompts(r), output - 1)
    found = in_turns(calls, repeats, lambda name: tick(f"{work.case}: {name}"), warm_up=True)
    forwards = found.pop("bare forwards")
    times = {name: Times(generations) for name, generations in found.items()}
    set_up = {p.name: p.set_up_seconds for p in providers}
    return [
        {"set_up_seconds": set_up[name], **record_of(work.case, name, times, forwards)}
        for name in times
    ]


def record_of(
    case: Case, name: str, times: Mapping[str, Times], forwards: Sequence[Forwards]
) -> Record:
    """Plain values of one provider, for a line of results. Ratios are paired by repeat."""
    own, tokens = times[name], case.batch_size * case.output_length
    medians = [{role: median(s) for role, s in repeat.items()} for repeat in forwards]
    floor = {role: 1e3 * median(m[role] for m in medians) for role in medians[0]}
    bare = bool(floor)
    steps = [median(arrivals) for arrivals in own.arrivals]
    means = [sum(map(fmean, repeat.values())) for repeat in forwards]
    p50, p95 = 1e3 * np.percentile(list(chain(*own.arrivals)), (50, 95))
    totals = {other: t.totals for other, t in times.items()}
    first_means = {other: t.first_means for other, t in times.items()}
    token_means = {other: t.token_means for other, t in times.items()}
    drafted, rounds = own.counts["drafted"], own.counts["useful_slot_steps"]
    return {
        "provider": name,
        **asdict(case),
        "repeats": len(own.totals),
        "tokens_per_second": summary(tokens / s for s in own.totals),
        "first_token_ms": summary(own.first_tokens, 1e3),
        "arrival_ms": {"p50": float(p50), "p95": float(p95)},
        "token_ms": summary(own.token_means, 1e3),
        "bare_forwards_ms": {**floor, "sum": sum(floor.values())},
        "step_over_forwards": ratios(steps, [sum(m.values()) for m in medians]) if bare else None,
        "token_over_forwards": ratios(own.token_means, means) if bare else None,
        "speed_over": speed_over(name, totals, COMPARED),
        "first_token_speed_over": speed_over(name, first_means, COMPARED),
        "token_speed_over": speed_over(name, token_means, COMPARED),
        "acceptance": own.counts["accepted"] / drafted if drafted else None,
        "tokens_per_base_forward": own.counts["emitted"] / rounds if rounds else None,
        "counts": dict(own.counts),
    }


def peaks(
    trio: str, dtype: str | None, provider: str, cases: Sequence[Sequence[int]], threads: int
) -> list[dict[str, int]]:
    """Peak memory of a provider for each case (batch size, tokens of prompt, and of output).

    For a process of its own. The weights are loaded before, a one-token run has paged in the
    libraries, and each case starts with a new provider; ``extra_bytes`` is therefore the case's
    caches, temporaries and, on first use, packed weights.
    """
    torch.set_num_threads(threads)
    forms = trios.TrioForms.open(trio, dtype)

    def run(rows: int, prompt: int, output: int) -> None:
        prompts = trios.make_prompts(forms.trio, rows, prompt)
        made = make_provider(provider, forms, Sampling(), rows, prompt + output)
        made.generate(prompts, output)

    run(1, 8, 1)
    return [peak_memory(partial(run, *case)) for case in cases]


def measure(
    trio: Trio, settings: Settings, providers: Sequence[Provider], works: Sequence[Work]
) -> list[Record]:
    """Time all cases, then measure memory; one record per case and provider."""
    runs = len(works) * (len(providers) + 1) * (settings.repeats + 1)
    records: list[Record] = []
    with report.progress_bar(runs + len(providers) * settings.memory) as tick:
        for work in works:
            records += time_case(trio.models, providers, work, settings.repeats, tick)
        outputs = [(w.case.batch_size, w.longest, w.case.output_length) for w in works]
        cases = [(rows, longest - output, output) for rows, longest, output in outputs]
        for provider in providers if settings.memory else ():
            if provider.name == llama.NAME:  # beside a trio that it does not use
                continue
            given = settings.trio, settings.dtype, provider.name, cases, torch.get_num_threads()
            own = (record for record in records if record["provider"] == provider.name)
            for record, peak in zip(own, in_fresh_process(peaks, *given), strict=True):
                record["peak_memory"] = peak
            tick(f"memory: {provider.name}")
    return records


def case_of(record: Record) -> Case:
    """The case of a line of results."""
    return Case(record["batch_size"], record["prompt_length"], record["output_length"])


SPEED: tuple[report.Column, ...] = (
    ("provider", "provider", str),
    ("tok\n/s", "tokens_per_second/median", report.significant),
    ("x\nnaive", "speed_over/naive/median", report.fixed),
    ("x\nbase", "speed_over/base-only/median", report.fixed),
    ("first\nms", "first_token_ms/median", report.significant),
    ("token\nms", "token_ms/median", report.significant),
    ("p50\nms", "arrival_ms/p50", report.significant),
    ("p95\nms", "arrival_ms/p95", report.significant),
    ("/\nfloor", "token_over_forwards/median", report.fixed),
)
SPEED_CAPTION = (
    "floor: the sum of the bare forwards of all roles, measured alone in the same run. x: tokens/s "
    "over those of naive and of base-only, paired by repeat. token ms: mean time per output token "
    "after the first; / floor: that over it. p50, p95: times between what a row's caller gets, "
    "which may be several tokens. Medians over repeats."
)
DRAFTS_AND_MEMORY: tuple[report.Column, ...] = (
    ("provider", "provider", str),
    ("accepted", "acceptance", report.percent),
    ("tokens a base\nforward", "tokens_per_base_forward", report.fixed),
    ("set up\ns", "set_up_seconds", report.decimals(1)),
    ("peak\nMiB", "peak_memory/total_bytes", report.decimals(0, 2**-20)),
    ("extra\nMiB", "peak_memory/extra_bytes", report.decimals(1, 2**-20)),
)
DRAFTS_AND_MEMORY_CAPTION = (
    "accepted: share of the drafts that were kept. tokens a base forward: of one row, behind the "
    "first. set up: in none of the timings. peak: of the process; extra: above what it held with "
    "the weights loaded."
)


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """Bars of milliseconds per output token, a panel per case, beside the sum of bare forwards."""
    from matplotlib import style
    from matplotlib.figure import Figure

    panels: dict[Case, list[Record]] = {}
    for record in records:
        panels.setdefault(case_of(record), []).append(record)
    columns = len({case.batch_size for case in panels})
    rows, bars = len(panels) // columns, 1 + max(map(len, panels.values()))
    size = max(7.0, 1.1 * bars * columns), 0.6 + 2.6 * rows
    # Colours C0 to C9 that colour-blind readers tell apart.
    with style.context(["tableau-colorblind10", {"font.size": 9}]):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (case, own) in zip(grid.flat, panels.items(), strict=True):
            floor = own[0]["bare_forwards_ms"]["sum"]
            heights = [floor, *(record["token_ms"]["median"] for record in own)]
            labels = ["bare\nforwards", *(r["provider"].replace("-", "-\n") for r in own)]
            drawn = axes.bar(labels, heights, color=[f"C{i}" for i in range(bars)])
            axes.bar_label(drawn, map(report.significant, heights))
            axes.margins(y=0.12)
            axes.axhline(floor, color="black", linewidth=0.9, linestyle="--", zorder=0)
            axes.set_title(str(case), fontsize=9)
            axes.set_ylabel("ms per output token")
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, dpi=150)
    report.say(f"Wrote {path}")


def run(settings: Settings, output: Path, draw: bool) -> None:
    """Load, check, measure, write and show."""
    forms = trios.TrioForms.open(settings.trio, settings.dtype)
    trio, name = forms.trio, options.trio_label(settings.trio)
    works = make_work(trio, settings)
    providers = make_providers(forms, settings, works)
    # llama.cpp rounds in ways of its own.
    ties = agreement.check_greedy([p for p in providers if llama.NAME not in p.name])
    for provider in providers:
        # What it saw of another text, in the check, would last far into a short timed run.
        if isinstance(provider, decoding.DecoderProvider) and provider.decoder.speculation:
            provider.set_up()
    records = measure(trio, settings, providers, works)
    shared = {
        "trio": name,
        "dtype": trios.dtypes(trio),
        "model_parameters": {r: info["parameters"] for r, info in trio.info()["roles"].items()},
        "sampling": {"alpha": ALPHA, **asdict(settings.sampling)},
        "prompts": settings.prompts,
    }
    for record in records:
        record["greedy_ties"] = [str(t) for t in ties if t.provider == record["provider"]]
    report.write_results(output, "throughput", shared, records)
    title = (
        f"Proxy-tuned decoding, trio {name}, {trios.dtype_label(trio)}, {settings.prompts}, "
        f"{settings.sampling}"
    )
    floor = "floor {bare_forwards_ms[sum]:.3g} ms".format_map
    report.print_records(
        title, SPEED_CAPTION, records, SPEED, lambda r: f"{case_of(r)}, {floor(r)}"
    )
    report.print_records(
        "Drafts, set-up and memory", DRAFTS_AND_MEMORY_CAPTION, records, DRAFTS_AND_MEMORY,
        lambda record: str(case_of(record)),
    )  # fmt: skip
    if draw:
        plot(records, output.with_suffix(".png"), title)


def result_stem(trio: str, prompts: str, sampling: Sampling, quick: bool) -> str:
    """A file name for each trio, kind of prompts and way to draw."""
    parts = ["throughput", Path(trio).name]
    if prompts != "text":
        parts.append(prompts)
    if sampling.temperature == 0.0:
        parts.append("greedy")
    elif sampling != Sampling():
        parts.append(f"t{sampling.temperature:g}-p{sampling.top_p:g}")
    return "-".join([*parts, *(["quick"] if quick else [])])


def main(
    trio: options.TrioName = "shipped",
    providers: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(PROVIDERS)}.")
    ] = DEFAULT_PROVIDERS,
    prompts: Annotated[
        str, typer.Option(help=f"One of {', '.join(trios.PROMPTS)}: the text that prompts are of.")
    ] = "text",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = TEMPERATURE,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = TOP_P,
    greedy: Annotated[bool, typer.Option(help="Temperature 0, no top_p.")] = False,
    batch_sizes: Annotated[
        str | None, typer.Option(help="Comma-separated.", show_default="1,4")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated prompt:output pairs; the paper's speed test is 8:512,512:8,8:8. "
            "With arithmetic and code own:output, prompts as long as they are.",
            show_default="8:128,128:8,8:8; own:32; own:15 with the shipped trio",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="Batch 1, lengths 8:32,32:8, three repeats, where not given.")
    ] = False,
    compile: Annotated[bool, typer.Option(help="Also ours with torch.compile.")] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed runs.", show_default="5")
    ] = None,
    threads: options.Threads = None,
    dtype: options.Dtype = None,
    output: options.Output = None,
    plot: options.Plot = True,
    memory: Annotated[bool, typer.Option(help="Also peak memory, one process a provider.")] = True,
) -> None:
    """Time decoding a trio: a transformers loop, the base alone, and ours, side by side."""
    options.set_threads(threads)
    if prompts not in trios.PROMPTS:
        raise typer.BadParameter(
            f"--prompts must be one of {', '.join(trios.PROMPTS)}, got {prompts!r}"
        )
    if lengths is None:
        short = "8:32,32:8" if quick else "8:128,128:8,8:8"
        lengths = short if prompts == "text" else f"own:{trios.task_tokens(trio)}"
    cases = decoding.parse_cases(batch_sizes or ("1" if quick else "1,4"), lengths, prompts)
    wanted = set(options.parse_choices("--providers", providers, PROVIDERS, None))
    settings = Settings(
        trio=trio,
        dtype=dtype,
        providers=tuple(p for p in PROVIDERS if p in wanted or (compile and p == "ours-compiled")),
        prompts=prompts,
        cases=cases,
        sampling=GREEDY if greedy else Sampling(temperature, top_p),
        repeats=repeats or (3 if quick else 5),
        memory=memory,
    )
    with options.user_errors():
        stem = result_stem(trio, prompts, settings.sampling, quick)
        run(settings, output or report.RESULTS / f"{stem}.jsonl", plot)


if __name__ == "__main__":
    typer.run(main)
