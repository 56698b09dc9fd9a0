"""A trio in vLLM beside its three members served alone: time per step, at equal requests.

``.venv-vllm/bin/python -m benchmarks.serving --help`` (``make vllm`` makes the environment);
docs/scaling.md says what the figures mean.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from benchmarks.gpu.decoder.random_models import byte_tokenizer, random_model
from benchmarks.gpu.decoder.shapes import ModelShape
from benchmarks.measure import Summary, paired_ratios
from benchmarks.report import (
    RESULTS,
    console,
    machine_line,
    make_progress,
    make_table,
    significant,
    write_json_lines,
)
from benchmarks.vllm_engine import Engine, Load, Run
from proxytune_kernels.integrations.vllm_plugin.export import export
from proxytune_kernels.trio.roles import ROLES

TARGET = 1.15
"""A step of the trio over the sum of the members' steps."""

_MS = 1e3
_PROMPT_STRIDE = 7919  # a prime: rows' prompts differ from their first token on

RANDOM = {
    "160m": (ModelShape(768, 3072, 12, 12, 12), ModelShape(384, 1536, 8, 6, 6)),
    "600m": (ModelShape(1536, 6144, 13, 12, 12), ModelShape(768, 3072, 12, 12, 12)),
}
"""Shapes of a base and of a pair, by the name of ``--trios``; random weights."""


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    requests: int
    prompt_length: int
    output_length: int
    temperature: float
    dtype: str
    repeats: int
    threads: int


@contextmanager
def exported(name: str) -> Iterator[Path]:
    """A directory that vLLM opens: the shipped trio's, one of :data:`RANDOM`, or an exported one.

    Raises:
        typer.BadParameter: there is none of that name.
    """
    if name not in RANDOM and name != "shipped":
        if not (Path(name) / "expert" / "config.json").is_file():
            raise typer.BadParameter(
                f"--trios must be among shipped, {', '.join(RANDOM)}, or directories that "
                f"`proxytune export-vllm` wrote, got {name!r}"
            )
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        out, members = Path(folder) / "trio", Path(folder) / "members"
        if name == "shipped":
            export(out, "shipped")
        else:
            base, pair = RANDOM[name]
            shapes = {"base": base, "expert": pair, "anti": pair}
            for seed, (role, shape) in enumerate(shapes.items()):
                random_model(shape, "cpu", seed).save_pretrained(members / role)
                byte_tokenizer(shape.vocab_size).save_pretrained(members / role)
            export(out, base=members / "base", expert=members / "expert", anti=members / "anti")
        yield out


def make_members(trio: Path, folder: Path) -> dict[str, Path]:
    """Directories of the members that vLLM opens alone, over the same weights."""
    members = {}
    for role in ROLES:
        members[role] = folder / role
        members[role].mkdir()
        source = trio if role == "base" else trio / role
        for file in source.glob("*"):
            if file.is_file() and file.name != "config.json":
                (members[role] / file.name).symlink_to(file.resolve())
        config = json.loads((source / "config.json").read_text())
        own = config.pop("proxy_tuning", None)
        if own is not None:
            config["architectures"] = own["base_architectures"]
        (members[role] / "config.json").write_text(json.dumps(config))
    return members


def make_load(vocab_size: int, settings: Settings) -> Load:
    """Prompts of token ids spread over the vocabulary; an alpha of its own for each."""
    prompts = [
        [
            3 + (row * _PROMPT_STRIDE + 31 * i) % (vocab_size - 3)
            for i in range(settings.prompt_length)
        ]
        for row in range(settings.requests)
    ]
    alphas = [row / max(1, settings.requests - 1) for row in range(settings.requests)]
    return Load(prompts, settings.output_length, settings.temperature, alphas)


def check(engines: Mapping[str, Engine], load: Load) -> None:
    """Check that the trio at alpha 0 has the base's tokens, and others at alpha 1.

    Raises:
        typer.Exit: it has not.
    """
    alone = engines["base"].decode(replace(load, alphas=None, temperature=0.0)).token_ids
    off, on = (
        engines["trio"]
        .decode(replace(load, alphas=[alpha] * len(alone), temperature=0.0))
        .token_ids
        for alpha in (0.0, 1.0)
    )
    if off != alone or on == alone:
        wrong = "alpha 0 has not the base's tokens" if off != alone else "alpha 1 has the base's"
        console.print(f"The check failed: {wrong}.")
        raise typer.Exit(1)


def measure(
    engines: Mapping[str, Engine], load: Load, repeats: int, tick: Any
) -> dict[str, list[Run]]:
    """Run every engine in turn, ``repeats`` times over, after one run to warm up."""
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            own = load if name == "trio" else replace(load, alphas=None)
            run = engine.decode(own)
            if repeat:
                runs[name].append(run)
            tick(name)
    return runs


def record_of(trio: str, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """A line of results. Ratios are paired by repeat; a step is one that decodes, not the first."""

    def steps(name: str, clock: str) -> list[float]:
        return [Summary.of(getattr(run, clock)[1:]).median for run in runs[name]]

    def over_sum(clock: str) -> dict[str, Any]:
        sums = [sum(repeat) for repeat in zip(*(steps(r, clock) for r in ROLES), strict=True)]
        return asdict(paired_ratios(steps("trio", clock), sums))

    first = {name: [run.seconds[0] for run in own] for name, own in runs.items()}
    prompts = [sum(repeat) for repeat in zip(*(first[role] for role in ROLES), strict=True)]
    return {
        "trio": trio,
        "step_ms": {n: asdict(Summary.of(_MS * s for s in steps(n, "seconds"))) for n in runs},
        "first_step_ms": {n: asdict(Summary.of(_MS * s for s in own)) for n, own in first.items()},
        "step_over_sum": over_sum("seconds"),
        "cpu_over_sum": over_sum("cpu_seconds"),
        "first_step_over_sum": asdict(paired_ratios(first["trio"], prompts)),
    }


def print_table(records: Sequence[Mapping[str, Any]], settings: Settings) -> None:
    """The table, and whether the target is met."""
    columns = (
        "trio",
        "members\nbase",
        "\nexpert",
        "\nanti",
        "\nsum",
        "trio\nstep",
        "/ sum",
        "CPU\n/ sum",
        "prompts\n/ sum",
    )
    caption = (
        "Milliseconds of a step that decodes, medians; / sum: the trio's over the members' sum, "
        "paired by repeat; CPU: the same of the process's CPU time; prompts: the first step's. "
        f"{_vllm_version()}, {machine_line()}"
    )
    title = (
        f"vLLM, {settings.requests} requests, prompts of {settings.prompt_length} and outputs of "
        f"{settings.output_length} tokens, temperature {settings.temperature:g}, {settings.dtype}"
    )
    table = make_table(title, columns, caption)
    for record in records:
        each = [record["step_ms"][role]["median"] for role in ROLES]
        table.add_row(
            record["trio"],
            *(significant(ms) for ms in (*each, sum(each), record["step_ms"]["trio"]["median"])),
            *(
                significant(record[ratio]["median"])
                for ratio in ("step_over_sum", "cpu_over_sum", "first_step_over_sum")
            ),
        )
    console.print(table)
    for record in records:
        ratio = record["step_over_sum"]["median"]
        verdict = "met" if ratio <= TARGET else "missed"
        console.print(
            f"{record['trio']}: {ratio:.3f} times the members' sum, target {TARGET}: {verdict}."
        )


def run_trio(name: str, settings: Settings, progress: Any) -> dict[str, Any]:
    """Open the four engines, check, and measure."""
    with exported(name) as trio, tempfile.TemporaryDirectory() as folder:
        directories = {"trio": trio, **make_members(trio, Path(folder))}
        task = progress.add_task(f"{name}: opening", total=4 * (settings.repeats + 2) + 1)
        limits = {
            "tokenizer": str(trio),
            "dtype": settings.dtype,
            "max_model_len": settings.prompt_length + settings.output_length,
            "max_num_seqs": settings.requests,
            # Prompts run in one step, and never out of the cache of the run before.
            "max_num_batched_tokens": settings.requests * settings.prompt_length,
            "enable_prefix_caching": False,
        }
        engines = {
            engine: Engine(directory, settings.threads, Path(folder) / f"{engine}.log", **limits)
            for engine, directory in directories.items()
        }
        try:
            for engine in engines.values():
                engine.wait()
                progress.advance(task)
            load = make_load(_vocab_size(trio), settings)
            check(engines, load)
            progress.advance(task)

            def tick(engine: str) -> None:
                progress.update(task, advance=1, description=f"{name}: {engine}")

            return record_of(name, measure(engines, load, settings.repeats, tick))
        finally:
            for engine in engines.values():
                engine.close()


def _vocab_size(trio: Path) -> int:
    size: int = json.loads((trio / "config.json").read_text())["proxy_tuning"]["vocab_size"]
    return size


def _vllm_version() -> str:
    """Of the package, which has another name where it is the CPU build."""
    [package] = {*packages_distributions()["vllm"]}
    return f"{package} {version(package)}"


def main(
    trios: Annotated[
        str,
        typer.Option(help=f"shipped, {', '.join(RANDOM)} (random), or exported directories."),
    ] = "shipped,160m",
    requests: Annotated[int, typer.Option(min=1, help="At the same time.")] = 8,
    prompt_length: Annotated[int, typer.Option(min=1)] = 32,
    output_length: Annotated[int, typer.Option(min=3)] = 49,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of OpenMP, in each engine.")] = 1,
    output: Annotated[Path, typer.Option(help="JSON lines.")] = RESULTS / "serving.jsonl",
) -> None:
    """Time a step of a trio in vLLM, and of its members served alone by the same vLLM."""
    torch.set_num_threads(threads)
    disable_progress_bar()  # it would tear up ours
    settings = Settings(
        requests, prompt_length, output_length, temperature, dtype, repeats, threads
    )
    with make_progress() as progress:
        records = [run_trio(name, settings, progress) for name in trios.split(",")]
    shared = {**asdict(settings), "vllm": _vllm_version()}
    records = [{**shared, **record} for record in records]
    write_json_lines(output, "serving", records)
    print_table(records, settings)
    console.print(f"Wrote {output}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
