"""A trio in vLLM beside its three members served alone: time per step, at equal requests.

``.venv-vllm/bin/python -m benchmarks.serving --help`` (``make vllm`` makes the environment);
docs/scaling.md says what the figures mean.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import packages_distributions, version
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from benchmarks.harness import options, report
from benchmarks.harness.measure import in_turns, ratios, summary, timed
from benchmarks.harness.random_models import ModelShape, byte_tokenizer, random_model
from proxytune_kernels.integrations.vllm_plugin.export import export
from proxytune_kernels.trio.roles import ROLES

RANDOM = {
    "160m": (ModelShape(768, 3072, 12, 12, 12), ModelShape(384, 1536, 8, 6, 6)),
    "600m": (ModelShape(1536, 6144, 13, 12, 12), ModelShape(768, 3072, 12, 12, 12)),
}
"""Shapes of a base and of a pair, by the name of ``--trios``; random weights."""

_PROMPT_STRIDE = 7919  # a prime: rows' prompts differ from their first token on

# Read as vLLM is imported. The engine runs in the process that times it; nothing is compiled.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
_LOG_CHARACTERS = 4000

_engine: Any = None
"""vLLM's, in the process that it was opened in."""


@dataclass(frozen=True)
class Load:
    """Requests that start together and run for the same number of steps.

    ``prompts`` are token ids, all of one length; ``alphas`` is None where the engine is no trio.
    """

    prompts: Sequence[Sequence[int]]
    output_length: int
    temperature: float = 0.0
    alphas: Sequence[float] | None = None


class Run(NamedTuple):
    """What came out, and the seconds of each step; the first runs the prompts."""

    token_ids: list[list[int]]
    steps: list[float]


class Engine:
    """A directory opened by vLLM in a process of its own, which decodes on request.

    Several can be open at a time, so that what is compared alternates. One that is not asked waits
    and takes no time of the others. ``log`` holds what it says.
    """

    def __init__(self, directory: Path, threads: int, log: Path, **settings: Any) -> None:
        # Before the process starts: it imports torch, and with it OpenMP, before anything of ours.
        os.environ.update(_ENVIRONMENT, OMP_NUM_THREADS=str(threads))
        context, self._log = multiprocessing.get_context("spawn"), log
        self._pool = ProcessPoolExecutor(1, context, _open, (str(directory), settings, log))
        self._pool.submit(int)  # starts the process

    def decode(self, load: Load) -> Run:
        """Run requests to their end."""
        try:
            return self._pool.submit(_decode, load).result()
        except Exception as error:
            said = self._log.read_text(errors="replace")[-_LOG_CHARACTERS:]
            raise RuntimeError(f"vLLM: {error}\n{said}") from error

    def close(self) -> None:
        """End the process, at once: vLLM's own way out may hang."""
        with suppress(BrokenProcessPool):
            self._pool.submit(os._exit, 0)
        self._pool.shutdown()


def _open(directory: str, settings: dict[str, Any], log: Path) -> None:
    # What libraries say would tear up the progress bar; it is shown where something fails.
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    from vllm import LLM

    global _engine
    _engine = LLM(directory, enforce_eager=True, **settings).llm_engine


def _decode(load: Load) -> Run:
    from vllm import SamplingParams

    for row, prompt in enumerate(load.prompts):
        params = SamplingParams(
            temperature=load.temperature,
            seed=row,
            max_tokens=load.output_length,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if load.alphas is None else {"alpha": load.alphas[row]},
        )
        _engine.add_request(str(row), {"prompt_token_ids": list(prompt)}, params)
    finished: dict[int, list[int]] = {}
    steps = []
    while _engine.has_unfinished_requests():
        outputs, seconds = timed(_engine.step)
        steps.append(seconds)
        for output in outputs:
            if output.finished:
                finished[int(output.request_id)] = list(output.outputs[0].token_ids)
    return Run([finished[row] for row in sorted(finished)], steps)


@contextmanager
def exported(name: str) -> Iterator[Path]:
    """A directory that vLLM opens: the shipped trio's, a random one's, or an exported one."""
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
            for seed, role in enumerate(ROLES):
                shape = RANDOM[name][role != "base"]
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


def make_load(
    vocab_size: int, requests: int, prompt_length: int, output_length: int, temperature: float
) -> Load:
    """Prompts of token ids spread over the vocabulary; an alpha of its own for each."""
    steps = range(0, 31 * prompt_length, 31)
    starts = [row * _PROMPT_STRIDE for row in range(requests)]
    prompts = [[3 + (start + i) % (vocab_size - 3) for i in steps] for start in starts]
    alphas = [row / max(1, requests - 1) for row in range(requests)]
    return Load(prompts, output_length, temperature, alphas)


def check(engines: Mapping[str, Engine], load: Load) -> None:
    """Check that the trio at alpha 0 has the base's tokens, and others at alpha 1."""
    alone = engines["base"].decode(replace(load, alphas=None, temperature=0.0)).token_ids
    loads = [replace(load, alphas=[alpha] * len(alone), temperature=0.0) for alpha in (0.0, 1.0)]
    off, on = (engines["trio"].decode(one).token_ids for one in loads)
    if off != alone or on == alone:
        wrong = "alpha 0 has not the base's tokens" if off != alone else "alpha 1 has the base's"
        report.say(f"The check failed: {wrong}.", "red")
        raise typer.Exit(1)


def record_of(trio: str, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """A line of results. Ratios are paired by repeat; a step is one that decodes, not the first."""
    step = {name: [median(run.steps[1:]) for run in own] for name, own in runs.items()}
    first = {name: [run.steps[0] for run in own] for name, own in runs.items()}
    for seconds in (step, first):
        seconds["sum"] = [sum(repeat) for repeat in zip(*(seconds[r] for r in ROLES), strict=True)]
    return {
        "trio": trio,
        "step_ms": {name: summary(own, 1e3) for name, own in step.items()},
        "first_step_ms": {name: summary(own, 1e3) for name, own in first.items()},
        "step_over_sum": ratios(step["trio"], step["sum"]),
        "first_step_over_sum": ratios(first["trio"], first["sum"]),
    }


COLUMNS: tuple[report.Column, ...] = (
    ("trio", "trio", str),
    *((f"{r}\nalone", f"step_ms/{r}/median", report.significant) for r in (*ROLES, "sum")),
    ("trio\nstep", "step_ms/trio/median", report.significant),
    ("/ sum", "step_over_sum/median", report.significant),
    ("prompts\n/ sum", "first_step_over_sum/median", report.significant),
)


def measure(
    name: str, dtype: str, repeats: int, threads: int, requests: int, prompt: int, output: int,
    temperature: float,
) -> dict[str, Any]:  # fmt: skip
    """Open the four engines, check, and run all in turn after one run to warm up."""
    with ExitStack() as stack:
        trio = stack.enter_context(exported(name))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directories = {"trio": trio, **make_members(trio, folder)}
        total = 4 * (repeats + 1)
        tick = stack.enter_context(report.progress_bar(total, f"{name}: opening"))
        limits = {
            "tokenizer": str(trio),
            "dtype": dtype,
            "max_model_len": prompt + output,
            "max_num_seqs": requests,
            # Prompts run in one step, and never out of the cache of the run before.
            "max_num_batched_tokens": requests * prompt,
            "enable_prefix_caching": False,
        }
        engines = {}
        for role, directory in directories.items():
            engines[role] = Engine(directory, threads, folder / f"{role}.log", **limits)
            stack.callback(engines[role].close)
        config = json.loads((trio / "config.json").read_text())
        size = config["proxy_tuning"]["vocab_size"]
        load = make_load(size, requests, prompt, output, temperature)
        check(engines, load)
        loads = {role: load if role == "trio" else replace(load, alphas=None) for role in engines}
        calls = {
            role: lambda _, role=role, engine=engine: engine.decode(loads[role])
            for role, engine in engines.items()
        }
        runs = in_turns(calls, repeats, lambda r: tick(f"{name}: {r}"), warm_up=True)
        return record_of(name, runs)


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
    output: options.Output = None,
) -> None:
    """Time a step of a trio in vLLM, and of its members served alone by the same vLLM."""
    torch.set_num_threads(threads)
    disable_progress_bar()  # it would tear up ours
    [package] = {*packages_distributions()["vllm"]}  # has another name where it is the CPU build
    vllm = f"{package} {version(package)}"
    of = requests, prompt_length, output_length, temperature
    records = [measure(name, dtype, repeats, threads, *of) for name in trios.split(",")]
    shared = {
        "requests": requests, "prompt_length": prompt_length, "output_length": output_length,
        "temperature": temperature, "dtype": dtype, "repeats": repeats, "threads": threads,
        "vllm": vllm,
    }  # fmt: skip
    report.write_results(output, "serving", shared, records)
    title = (
        f"vLLM, {requests} requests, prompts of {prompt_length} and outputs of {output_length} "
        f"tokens, temperature {temperature:g}, {dtype}"
    )
    caption = (
        "Milliseconds of a step that decodes, medians; / sum: the trio's over the members' sum, "
        "paired by repeat; prompts: the first step's. "
        f"{vllm},"
    )
    report.print_records(title, caption, records, COLUMNS)


if __name__ == "__main__":
    typer.run(main)
