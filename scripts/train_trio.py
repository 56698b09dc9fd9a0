"""Train the trio that ships with the package, from pinned text, repeatable bit for bit.

    python scripts/train_trio.py             # into trios/shipped, about 15 minutes of one core
    python scripts/train_trio.py --quick     # the same path in seconds, with tiny models
    python scripts/train_trio.py --check     # train again and compare with what ships

See docs/trio.md for what it trains on, and for the results.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `python -m` has it

from scripts import evaluation
from scripts.trio_training import arithmetic, text, training
from scripts.trio_training.recipe import CONTEXT, FULL, MAX_POSITIONS, QUICK, Recipe

SHIPPED = Path(__file__).parents[1] / "proxytune_kernels" / "data" / "trio"
RECORD = "training.json"
MANIFEST = {"format": 1, "base": "base", "expert": "expert", "anti": "anti", "tokenizer": "."}
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
HELD_OUT_SEED, OTHER_SEED = 777, 778  # of the two evaluation sets
TOKENIZER_DOCUMENTS = 600  # of the text; a tenth as many of statements are added
METHODS = evaluation.mixtures(("base", "anti", "expert", "direct"), (0, 0.25, 0.5, 1, 1.5))
MAX_ANSWER_TOKENS = 24  # the longest right answer takes 18, its end included
EVALUATED_ROWS = 50  # problems per forward; bounds memory

Models = dict[str, LlamaForCausalLM]
Phases = dict[str, training.Phase]

app = typer.Typer(add_completion=False)


def train_all(
    recipe: Recipe, tokenizer: Tokenizer, corpus: text.Corpus, progress: Progress
) -> tuple[Models, Phases]:
    """Pretrain base and anti, then tune copies of them: the expert, and the base for comparison."""
    prose = training.encode_documents(tokenizer, corpus.training[: recipe.documents])
    statements = training.encode_documents(
        tokenizer, training.statement_documents(recipe.statement_documents, seed=1)
    )
    models: Models = {}
    phases: Phases = {}
    pretraining = {
        "anti": (recipe.anti, recipe.anti_pretraining),
        "base": (recipe.base, recipe.base_pretraining),
    }
    for role, (shape, schedule) in pretraining.items():
        model = training.build(shape, recipe.vocab_size, recipe.init_seed)
        rows = schedule.statement_rows
        streams = [(prose, schedule.rows - rows), (statements, rows)]
        windows = training.window_batches(streams, CONTEXT, schedule.seed)
        phases[role] = training.train(model, windows, schedule, progress, f"{role}: text")
        training.round_to_bf16(model)
        models[role] = model
    tuning = {
        "expert": ("anti", recipe.expert_tuning),
        "direct": ("base", recipe.direct_tuning),
    }
    for role, (untuned, schedule) in tuning.items():
        problems = training.tuning_batches(
            tokenizer, schedule.rows, schedule.statement_rows, schedule.seed
        )
        model = models[role] = copy.deepcopy(models[untuned])
        phases[role] = training.train(model, problems, schedule, progress, f"{role}: sums in words")
        training.round_to_bf16(model)
    return models, phases


def evaluate(
    recipe: Recipe, models: Models, tokenizer: Tokenizer, progress: Progress
) -> list[dict[str, Any]]:
    """Return exact match and answer NLL of every method, on held-out and on other operand pairs."""
    sets = {
        "held_out_pairs": arithmetic.problems(recipe.problems, seed=HELD_OUT_SEED, held_out=True),
        "other_pairs": arithmetic.problems(recipe.problems, seed=OTHER_SEED),
    }
    pairs = {name: [training.answer_pair(tokenizer, p) for p in sets[name]] for name in sets}
    nlls = {
        name: evaluation.answer_nll(models, METHODS, pairs[name], training.END_ID, EVALUATED_ROWS)
        for name in sets
    }
    results: list[dict[str, Any]] = []
    for method in progress.track(METHODS, description="evaluation"):
        row: dict[str, Any] = {"name": method}
        for name, problems in sets.items():
            texts = greedy_answers(models, METHODS[method], tokenizer, problems)
            row[name] = {
                "answer_nll": nlls[name][method],
                "exact_match": exact_match(texts, problems),
                "example": problems[0].prompt + texts[0],
            }
        results.append(row)
    return results


def greedy_answers(
    models: Models,
    weights: evaluation.Weights,
    tokenizer: Tokenizer,
    problems: Sequence[arithmetic.Problem],
) -> list[str]:
    """Return each problem's greedy continuation, decoded, without the end token."""
    prompts = [tokenizer.encode(problem.prompt).ids for problem in problems]
    rows: list[list[int]] = []
    for first in range(0, len(prompts), EVALUATED_ROWS):
        some = prompts[first : first + EVALUATED_ROWS]
        rows += evaluation.complete(models, weights, some, training.END_ID, MAX_ANSWER_TOKENS)
    return tokenizer.decode_batch(rows)


def exact_match(texts: Sequence[str], problems: Sequence[arithmetic.Problem]) -> float:
    """Return the share of answers whose number after `####` is the right one, 0 to 1."""
    answers = map(evaluation.stated_answer, texts)
    right = [a == problem.value for a, problem in zip(answers, problems, strict=True)]
    return sum(right) / len(right)


def run(recipe: Recipe, out: Path, allow_other_text: bool, console: Console) -> dict[str, Any]:
    """Train, evaluate and write one trio; return its record, which is also written."""
    start = time.perf_counter()
    training.make_deterministic()
    with console.status("reading docstrings"):
        corpus = text.load_corpus(recipe.sources, allow_other_text)
        statements = training.statement_documents(TOKENIZER_DOCUMENTS // 10, seed=2)
        tokenizer = training.train_tokenizer(
            [*corpus.training[:TOKENIZER_DOCUMENTS], *statements], recipe.vocab_size
        )
    columns = (
        *Progress.get_default_columns()[:3],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        models, phases = train_all(recipe, tokenizer, corpus, progress)
        results = evaluate(recipe, models, tokenizer, progress)
    held_out = training.encode_documents(tokenizer, corpus.held_out)
    for role in ("base", "expert", "anti"):
        training.save(models[role], out / role)
    save_tokenizer(tokenizer, out)
    write_json(out / "trio.json", MANIFEST)
    summary = {
        "recipe": asdict(recipe),
        "environment": environment(),
        "text": corpus.provenance,
        "parameters": {role: sum(p.numel() for p in m.parameters()) for role, m in models.items()},
        "phases": {role: asdict(phase) for role, phase in phases.items()},
        "held_out_text_nll": {
            role: training.text_nll(model, held_out, CONTEXT) for role, model in models.items()
        },
        "results": results,
        "seconds": time.perf_counter() - start,
        "files": file_hashes(out),
    }
    write_json(out / RECORD, summary)
    return summary


def check(found: dict[str, Any], shipped: dict[str, Any], console: Console) -> None:
    """Compare a new run's files with the shipped record's; exit with 1 if one differs."""
    files = differences(found["files"], shipped["files"])
    if not files:
        console.print(f"all {len(found['files'])} files are the shipped ones, bit for bit")
        return
    for line in files:
        console.print(line, style="red", soft_wrap=True)
    for line in differences(found["environment"], shipped["environment"]):
        console.print(f"another environment: {line}", soft_wrap=True)
    raise typer.Exit(1)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokenizer so that `AutoTokenizer.from_pretrained(directory)` opens it."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=training.END_OF_TEXT,
        eos_token=training.END_OF_TEXT,
        pad_token=training.END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
    ).save_pretrained(directory)
    # transformers 5 writes a class name that 4 does not know; both know this one.
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def file_hashes(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a trio's directory, the record itself excepted."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


def environment() -> dict[str, str]:
    """Return the versions and the machine that a bit-for-bit repetition depends on."""
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def differences(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """Return one line for each key whose value differs between two flat mappings."""
    return [
        f"{key}: {found.get(key, 'absent')} here, {recorded.get(key, 'absent')} in the record"
        for key in sorted({*found, *recorded})
        if found.get(key) != recorded.get(key)
    ]


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as the Markdown table that docs/trio.md holds."""
    lines = [
        "| | answer NLL, held-out pairs | exact match, held-out pairs | exact match, other pairs |",
        "| --- | --- | --- | --- |",
    ]
    for row in results:
        held_out, other = row["held_out_pairs"], row["other_pairs"]
        lines.append(
            f"| {row['name']} | {held_out['answer_nll']:.3f} | {held_out['exact_match']:.1%} "
            f"| {other['exact_match']:.1%} |"
        )
    return "\n".join(lines)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Directory to write the trio to.")] = Path(
        "trios/shipped"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny models, few steps: shows that the path works.")
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--check", help="Train again and compare every file with the shipped trio."),
    ] = False,
    allow_other_text: Annotated[
        bool,
        typer.Option("--allow-other-text", help="Accept other versions of the text's packages."),
    ] = False,
) -> None:
    """Train the trio that ships with the package, with one thread, repeatable bit for bit."""
    console = Console()
    if quick and compare:
        raise typer.BadParameter("--check compares a full run: leave out --quick")
    transformers_logging.disable_progress_bar()
    try:
        if compare:
            shipped = json.loads((SHIPPED / RECORD).read_text(encoding="utf-8"))
            with tempfile.TemporaryDirectory() as directory:
                found = run(FULL, Path(directory), allow_other_text, console)
            check(found, shipped, console)
        else:
            out.mkdir(parents=True, exist_ok=True)  # before the minutes of work, not after
            found = run(QUICK if quick else FULL, out, allow_other_text, console)
            console.print(f"wrote {out}", soft_wrap=True, highlight=False)
    except (text.TextMismatch, OSError) as error:
        console.print(f"error: {error}", style="red", soft_wrap=True)
        raise typer.Exit(2) from None
    console.print(results_table(found["results"]), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
