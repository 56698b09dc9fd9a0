"""A trio through ``model.generate()``: tokens/s beside the loop one writes and beside the decoder.

``python -m benchmarks.generate --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks import options
from benchmarks.agreement import greedy_mismatches
from benchmarks.decode_timing import Case
from benchmarks.measure import Summary, paired_ratios
from benchmarks.options import describe, parse_cases
from benchmarks.prompts import make_prompts
from benchmarks.providers import (
    ALPHA,
    DecoderProvider,
    Generation,
    NaiveLoop,
    Prompts,
    Provider,
    Sampling,
)
from benchmarks.report import (
    RESULTS,
    console,
    fixed,
    machine_line,
    make_progress,
    make_table,
    significant,
    write_json_lines,
)
from benchmarks.trios import open_trio
from proxytune_kernels import Trio

TARGETS = (("generate", "naive", 1.5), ("custom-generate", "decoder", 0.95))
"""Tokens/s of a provider over another's, at least, at batch 1 on the shipped trio."""

COMPARED = ("naive", "decoder")
_CHECKED_ROWS, _CHECKED_PROMPT, _CHECKED_TOKENS = 4, 12, 16


class _Nothing(LogitsProcessor):
    """Changes no score, and is not in our op: transformers' own loop and warpers run."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


class GenerateProvider:
    """``generate()`` of the trio as one transformers model.

    Args:
        name: as in the results.
        trio: the models.
        model: the trio as one transformers model.
        sampling: temperature and top_p.
        given: further arguments of ``generate()``.
    """

    set_up_seconds = 0.0

    def __init__(self, name: str, trio: Trio, model: Any, sampling: Sampling, **given: Any) -> None:
        self.name, self.trio, self.roles = name, trio, trio.roles
        self.sampling = sampling
        self._model = model
        self._given = given
        self.path: dict[str, Any] = {}
        """How the last call ran, by the model's own account."""

    def generate(self, prompts: Prompts, max_tokens: int, *, greedy: bool = False) -> Generation:
        """See :class:`benchmarks.providers.Provider`; all tokens come at the end."""
        drawn = {} if greedy or not self.sampling.temperature else self._sampled()
        input_ids = torch.tensor(prompts)
        start = time.perf_counter()
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_tokens,
            eos_token_id=None,  # exactly so many
            **drawn,
            **self._given,
        )
        rows = output[:, input_ids.shape[1] :].tolist()
        seconds = time.perf_counter() - start
        self.path = dict(self._model.notes)
        return Generation(rows, [[seconds] * max_tokens] * len(rows))

    def _sampled(self) -> dict[str, Any]:
        return {
            "do_sample": True,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": 0,
        }


def make_providers(trio: Trio, sampling: Sampling, rows: int, length: int) -> list[Provider]:
    """The naive loop, three ways through ``generate()``, and the decoder."""
    # Once the trio is open: what it brings in makes notes, which open_trio quiets.
    from proxytune_kernels.integrations.hf import EngineGenerate, ProxyTunedForCausalLM

    model = ProxyTunedForCausalLM.from_trio(trio, ALPHA)
    engine = EngineGenerate(trio, max_batch_size=rows)
    warpers = {"logits_processor": LogitsProcessorList([_Nothing()])}
    return [
        NaiveLoop(trio, sampling=sampling),
        GenerateProvider(
            "generate-warpers", trio, model, sampling, cache_implementation="dynamic", **warpers
        ),
        GenerateProvider("generate", trio, model, sampling),
        GenerateProvider("custom-generate", trio, model, sampling, custom_generate=engine),
        DecoderProvider("decoder", trio, sampling, max_batch_size=rows, max_seq_len=length),
    ]


def check_greedy(providers: Sequence[Provider], trio: Trio) -> None:
    """Hold every provider's greedy tokens to a naive loop's before anything is timed.

    Raises:
        typer.Exit: code 1, one has other tokens than rounding explains.
    """
    prompts = make_prompts(trio, _CHECKED_ROWS, _CHECKED_PROMPT)
    mismatches = greedy_mismatches(providers, trio, prompts, _CHECKED_TOKENS)
    for mismatch in mismatches:
        console.print(str(mismatch), soft_wrap=True)
    if not all(mismatch.within_rounding for mismatch in mismatches):
        console.print("Greedy tokens disagree: nothing is timed.", style="red")
        raise typer.Exit(1)
    names = ", ".join(provider.name for provider in providers)
    console.print(
        f"Greedy tokens agree: {_CHECKED_ROWS} prompts x {_CHECKED_TOKENS} tokens, {names}"
        + (f"; {len(mismatches)} ties within rounding." if mismatches else "."),
        soft_wrap=True,
    )


Times = dict[str, list[tuple[float, float]]]
"""Provider -> of each repeat, seconds by the clock and of the processor."""


def time_case(
    providers: Sequence[Provider],
    trio: Trio,
    case: Case,
    repeats: int,
    tick: Callable[[str], object] = lambda name: None,
) -> Times:
    """Warm every provider up, then time all of them in turn, ``repeats`` times over."""
    assert case.prompt_length is not None
    prompts = make_prompts(trio, case.batch_size, case.prompt_length)
    times: Times = {provider.name: [] for provider in providers}
    for repeat in range(repeats + 1):
        for provider in providers:
            torch.manual_seed(repeat)
            clock, processor = time.perf_counter(), time.process_time()
            provider.generate(prompts, case.output_length)
            spent = time.perf_counter() - clock, time.process_time() - processor
            if repeat:  # the first warms up
                times[provider.name].append(spent)
            tick(f"{case}: {provider.name}")
    return times


def records(case: Case, times: Times, providers: Sequence[Provider]) -> list[dict[str, Any]]:
    """One record per provider; ratios are paired by repeat."""
    tokens = case.batch_size * case.output_length
    columns = {name: list(zip(*spent, strict=True)) for name, spent in times.items()}
    made = []
    for provider in providers:
        clock, processor = columns[provider.name]
        others = [name for name in COMPARED if name in columns and name != provider.name]
        made.append(
            {
                "provider": provider.name,
                **asdict(case),
                "repeats": len(clock),
                "tokens_per_second": asdict(Summary.of(tokens / s for s in clock)),
                "processor_ms_per_token": asdict(Summary.of(1e3 * s / tokens for s in processor)),
                "speed_over": {o: asdict(paired_ratios(columns[o][0], clock)) for o in others},
                "processor_speed_over": {
                    o: asdict(paired_ratios(columns[o][1], processor)) for o in others
                },
                "path": provider.path if isinstance(provider, GenerateProvider) else {},
            }
        )
    return made


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Tokens/s, and the ratios to the naive loop and to the decoder."""
    columns = ("provider", "tok\n/s", "x\nnaive", "x\ndecoder", "cpu ms\n/ token", "cpu x\nnaive",
               "cpu x\ndecoder")  # fmt: skip
    caption = (
        "x: tokens/s over those of naive and of the decoder, paired by repeat; cpu x: the same of "
        f"processor time. Medians. {machine_line()}"
    )
    table = make_table(title, columns, caption)
    previous = None
    for row in rows:
        case = Case(row["batch_size"], row["prompt_length"], row["output_length"])
        if case != previous:
            table.add_section()
            table.add_row(f"[bold]{case}")
            previous = case
        over = {
            (kind, other): summary["median"]
            for kind in ("speed_over", "processor_speed_over")
            for other, summary in row[kind].items()
        }
        table.add_row(
            row["provider"],
            significant(row["tokens_per_second"]["median"]),
            *(fixed(over.get(("speed_over", other))) for other in COMPARED),
            significant(row["processor_ms_per_token"]["median"]),
            *(fixed(over.get(("processor_speed_over", other))) for other in COMPARED),
        )
    console.print(table)


def print_verdicts(rows: Sequence[Mapping[str, Any]]) -> None:
    """Which targets are met, at batch 1."""
    for row in rows:
        for provider, other, least in TARGETS:
            if row["provider"] != provider or row["batch_size"] != 1:
                continue
            over = row["speed_over"][other]
            verdict = "met" if over["median"] >= least else "missed"
            case = Case(row["batch_size"], row["prompt_length"], row["output_length"])
            console.print(
                f"{case}: {provider} has {over['median']:.2f} times {other}'s tokens/s "
                f"({over['p10']:.2f} to {over['p90']:.2f}), target {least:g}: {verdict}.",
                soft_wrap=True,
            )


def main(
    trio: Annotated[
        str, typer.Option(help="shipped, qwen, or a directory with a trio.json.")
    ] = "shipped",
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4",
    lengths: Annotated[str, typer.Option(help="Comma-separated prompt:output pairs.")] = "8:128",
    greedy: Annotated[bool, typer.Option(help="Temperature 0, no top_p.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs.")] = 15,
    threads: options.Threads = None,
    dtype: options.Dtype = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON lines.", show_default="benchmarks/results/generate-<trio>.jsonl"),
    ] = None,
) -> None:
    """Time generate() of a trio as one transformers model, side by side with what it replaces."""
    if threads is not None:
        torch.set_num_threads(threads)
    cases = parse_cases(batch_sizes, lengths)
    if any(case.prompt_length is None for case in cases):
        raise typer.BadParameter("--lengths must be prompt:output pairs, got own")
    sampling = Sampling(0.0, 1.0) if greedy else Sampling()
    try:
        opened = open_trio(trio, dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    rows = max(_CHECKED_ROWS, *(case.batch_size for case in cases))
    longest = max(_CHECKED_PROMPT + _CHECKED_TOKENS,
                  *((case.prompt_length or 0) + case.output_length for case in cases))  # fmt: skip
    providers = make_providers(opened, sampling, rows, longest)
    check_greedy(providers, opened)
    found = []
    with make_progress() as progress:
        task = progress.add_task("timing", total=len(cases) * len(providers) * (repeats + 1))
        for case in cases:
            times = time_case(
                providers,
                opened,
                case,
                repeats,
                lambda name: progress.update(task, advance=1, description=name),
            )
            found += records(case, times, providers)
    name = trio if trio in ("shipped", "qwen") else Path(trio).name
    path = output or RESULTS / f"generate-{name}{'-greedy' if greedy else ''}.jsonl"
    dtypes = {role: info["dtype"] for role, info in opened.info()["roles"].items()}
    shared = {"trio": name, "dtype": dtypes, "sampling": {"alpha": ALPHA, **asdict(sampling)}}
    write_json_lines(path, "generate", [{**shared, **record} for record in found])
    kind = "/".join(dict.fromkeys(dtypes.values()))
    print_table(found, f"generate() of a trio, {name}, {kind}, {describe(sampling)}")
    if name == "shipped":
        print_verdicts(found)
    console.print(f"Wrote {path}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
