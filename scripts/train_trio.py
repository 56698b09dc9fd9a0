"""Train the trio that ships with the package, from pinned text, repeatable bit for bit.

    python scripts/train_trio.py             # into trios/shipped, about 15 minutes of one core
    python scripts/train_trio.py --quick     # the same path in seconds, with tiny models
    python scripts/train_trio.py --check     # train again and compare with what ships

See docs/trio.md for what it trains on, and for the results.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging
from trio_training import arithmetic, batches, evaluation, record, text, training
from trio_training.recipe import CONTEXT, FULL, QUICK, Recipe

SHIPPED = Path(__file__).parents[1] / "proxytune_kernels" / "data" / "trio"
HELD_OUT_SEED, OTHER_SEED = 777, 778  # of the two evaluation sets
TOKENIZER_DOCUMENTS = 600  # of the text; a tenth as many of statements are added

Models = dict[str, LlamaForCausalLM]
Phases = dict[str, training.Phase]

app = typer.Typer(add_completion=False)


def train_all(
    recipe: Recipe, tokenizer: Tokenizer, corpus: text.Corpus, progress: Progress
) -> tuple[Models, Phases]:
    """Pretrain base and anti, then tune copies of them: the expert, and the base for comparison."""
    prose = batches.encode_documents(tokenizer, corpus.training[: recipe.documents])
    statements = batches.encode_documents(
        tokenizer, batches.statement_documents(recipe.statement_documents, seed=1)
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
        windows = batches.window_batches(streams, CONTEXT, schedule.seed)
        phases[role] = training.train(model, windows, schedule, progress, f"{role}: text")
        training.round_to_bf16(model)
        models[role] = model
    tuning = {
        "expert": ("anti", recipe.expert_tuning),
        "direct": ("base", recipe.direct_tuning),
    }
    for role, (untuned, schedule) in tuning.items():
        rows_of_problems = batches.tuning_batches(
            tokenizer, schedule.rows, schedule.statement_rows, schedule.seed
        )
        models[role], phases[role] = training.tuned_copy(
            models[untuned], rows_of_problems, schedule, progress, f"{role}: sums in words"
        )
        training.round_to_bf16(models[role])
    return models, phases


def evaluate(
    recipe: Recipe, models: Models, tokenizer: Tokenizer, progress: Progress
) -> list[dict[str, Any]]:
    """Return exact match and answer NLL of every method, on held-out and on other operand pairs."""
    sets = {
        "held_out_pairs": arithmetic.problems(recipe.problems, seed=HELD_OUT_SEED, held_out=True),
        "other_pairs": arithmetic.problems(recipe.problems, seed=OTHER_SEED),
    }
    results: list[dict[str, Any]] = []
    for method in progress.track(evaluation.METHODS, description="evaluation"):
        row: dict[str, Any] = {"name": method.name}
        for name, problems in sets.items():
            answers = evaluation.greedy_answers(method, models, tokenizer, problems)
            row[name] = {
                "answer_nll": evaluation.answer_nll(method, models, tokenizer, problems),
                "exact_match": evaluation.exact_match(answers, problems),
                "example": problems[0].prompt + answers[0],
            }
        results.append(row)
    return results


def run(recipe: Recipe, out: Path, allow_other_text: bool, console: Console) -> dict[str, Any]:
    """Train, evaluate and write one trio; return its record, which is also written."""
    start = time.perf_counter()
    training.make_deterministic()
    with console.status("reading docstrings"):
        corpus = text.load_corpus(recipe.sources, allow_other_text)
        statements = batches.statement_documents(TOKENIZER_DOCUMENTS // 10, seed=2)
        tokenizer = batches.train_tokenizer(
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
    held_out = batches.encode_documents(tokenizer, corpus.held_out)
    for role in ("base", "expert", "anti"):
        training.save(models[role], out / role)
    record.save_tokenizer(tokenizer, out)
    record.write_json(out / "trio.json", record.MANIFEST)
    summary = {
        "recipe": dataclasses.asdict(recipe),
        "environment": record.environment(),
        "text": corpus.provenance,
        "parameters": {role: sum(p.numel() for p in m.parameters()) for role, m in models.items()},
        "phases": {role: dataclasses.asdict(phase) for role, phase in phases.items()},
        "held_out_text_nll": {
            role: evaluation.text_nll(model, held_out, CONTEXT) for role, model in models.items()
        },
        "results": results,
        "seconds": time.perf_counter() - start,
        "files": record.file_hashes(out),
    }
    record.write_json(out / record.RECORD, summary)
    return summary


def check(found: dict[str, Any], shipped: dict[str, Any], console: Console) -> None:
    """Compare a new run's files with the shipped record's; exit with 1 if one differs."""
    files = record.differences(found["files"], shipped["files"])
    if not files:
        console.print(f"all {len(found['files'])} files are the shipped ones, bit for bit")
        return
    for line in files:
        console.print(line, style="red", soft_wrap=True)
    for line in record.differences(found["environment"], shipped["environment"]):
        console.print(f"another environment: {line}", soft_wrap=True)
    raise typer.Exit(1)


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
            shipped = json.loads((SHIPPED / record.RECORD).read_text(encoding="utf-8"))
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
    console.print(record.results_table(found["results"]), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
