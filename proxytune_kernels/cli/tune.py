"""``proxytune tune``: an expert from data, and what it is worth beside the base."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from proxytune_kernels.analysis.rows import read_rows
from proxytune_kernels.cli.options import (
    FAILED,
    USAGE,
    UntunedOptions,
    expected,
    printable,
    quiet,
    stop,
    with_options,
)

if TYPE_CHECKING:
    from proxytune_kernels.tuning.data import CheckedRow, Example
    from proxytune_kernels.tuning.training import Settings

_MAX_LENGTH = 1024
_HELD_OUT_ROWS = 200
_SHOWN = 20
"""Wrong rows that are named."""


@with_options
def tune(
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help='JSON lines of "messages", of "prompt" and "completion", or of "text".',
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Of the trio: new, or to be resumed.")],
    *,
    models: UntunedOptions,
    held_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows for the table, not trained on.")
    ] = None,
    held_out_rows: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rows of --data that are kept for the table instead; 0 is no table.",
            show_default=f"a tenth, at most {_HELD_OUT_ROWS}",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what every row is, and train nothing.")
    ] = False,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Messages as plain text for the expert, too, whatever template it has: lm-eval "
            "and vLLM have one prompt for all roles.",
        ),
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a row.", show_default="1024, or the context"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, show_default="all rows three times", help="Of training.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0, help="The highest.", show_default="0.001; 0.0001 with --full"),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA adapter.")] = 16,
    lora_alpha: Annotated[int, typer.Option(min=1, help="Its scale, times the rank.")] = 32,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights, in float32; no adapter.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the weights under the adapter: auto, float32, bfloat16, ...")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where to train, such as cuda:0.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch.", show_default="what torch takes")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="With the threads it gives the bytes.")] = 0,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps.", show_default="a fifth of all")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in DIR.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run modelling code that a checkpoint brings."),
    ] = False,
) -> None:
    """Tune an expert on data: a LoRA adapter on the anti-expert, and a trio that steers with it.

    Example: proxytune tune --trio shipped --data sums.jsonl --out sums
    """
    if models.trio is None and (models.base is None or models.anti is None):
        raise stop("no models: give --trio shipped, --trio DIR, or --base and --anti", USAGE)
    if held_out is not None and held_out_rows is not None:
        raise stop("give --held-out or --held-out-rows, not both", USAGE)
    quiet()
    _require()
    from proxytune_kernels.tuning.data import (
        Encoding,
        check_rows,
        fingerprint,
        prompt_styles,
        split,
    )
    from proxytune_kernels.tuning.run import claim, run
    from proxytune_kernels.tuning.sources import open_untuned
    from proxytune_kernels.tuning.training import Settings

    named = {"base": models.base, "anti": models.anti, "tokenizer": models.tokenizer}
    with expected(ValueError, OSError):
        untuned = open_untuned(models.trio, **named, trust_remote_code=trust_remote_code)
        files = [(file, read_rows(file)) for file in (data, held_out) if file is not None]
    for note in untuned.agreement.notes:
        typer.echo(note)
    expert = untuned.tokenizers["expert"]
    styles = prompt_styles(files[0][1], None if plain else expert, untuned.settings)
    encoding = Encoding(untuned.tokenizers, styles, untuned.widths, untuned.agreement.vocab_size)
    longest = max_length or min(_MAX_LENGTH, untuned.max_length or _MAX_LENGTH)
    checked = [check_rows(rows, encoding, longest) for _, rows in files]
    for (file, _), rows in zip(files, checked, strict=True):
        _report(file, rows, longest, each=check)
    if check:
        return
    rows = checked[0]
    if held_out is not None:
        count = 0
    elif held_out_rows is None:
        count = min(_HELD_OUT_ROWS, -(-len(rows) // 10))
    else:
        count = held_out_rows
    if count >= len(rows):
        raise stop(f"{data} must have more rows than are held out, {count}, got {len(rows)}", USAGE)
    examples, measured = split(rows, count, seed)
    for more in checked[1:]:
        measured += [example for row in more for example in row.examples]
    settings = Settings(
        steps=steps or -(-3 * len(examples) // batch_size),
        batch_size=batch_size,
        learning_rate=learning_rate or (1e-4 if full else 1e-3),
        rank=rank,
        lora_alpha=lora_alpha,
        full=full,
        seed=seed,
        threads=threads or torch.get_num_threads(),
        dtype="float32" if full else dtype,
        device=device,
        data=fingerprint(examples),
    )
    # RuntimeError: a loss that is no number, and what torch raises where memory runs out.
    with expected(ValueError, OSError, RuntimeError):
        claim(out, settings, resume=resume)
        try:
            with _bar(settings.steps) as advance:
                ended = run(
                    *(untuned, examples, measured, settings, out, styles),
                    advance=advance,
                    save_every=checkpoint_every or -(-settings.steps // 5),
                    resume=resume,
                )
        except KeyboardInterrupt:
            typer.echo("interrupted: the same command with --resume goes on", err=True)
            raise
        typer.echo(f"wrote {out}")
        if ended is not None:
            _measure(out, settings, measured, ended)


def _require() -> None:
    """Leave with what to install where something is missing."""
    for name in ("accelerate", "peft", "scipy"):
        if find_spec(name) is None:
            raise stop(f"tuning needs {name}: pip install 'proxytune_kernels[tune]'", FAILED)


def _report(file: Path, rows: Sequence[CheckedRow], max_length: int, *, each: bool) -> None:
    """Say what a file's rows are; leaves where one can't be trained on."""
    wrong = [row for row in rows if row.wrong is not None]
    if each:
        for row in rows:
            counts = f"{row.tokens} tokens, {row.masked:.0%} masked"
            typer.echo(f"line {row.line}: {printable(row.wrong or counts)}")
    elif wrong:
        for row in wrong[:_SHOWN]:
            typer.echo(f"{file}, line {row.line}: {printable(str(row.wrong))}", err=True)
    longest = max(rows, key=lambda row: row.tokens)
    if longest.tokens:
        masked = fmean(row.masked for row in rows if row.examples)
        typer.echo(
            f"{file}: {len(rows)} rows, {sum(len(row.examples) for row in rows)} answers; "
            f"{longest.tokens} tokens at most (line {longest.line}) of {max_length}, median "
            f"{median(row.tokens for row in rows if row.examples):.0f}; prompts, which the loss "
            f"leaves out, are {masked:.0%}"
        )
    if wrong:
        raise stop(f"{file} must have rows that can be trained on, got {len(wrong)} others", FAILED)


@contextmanager
def _bar(steps: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar with the loss and the time left, on standard error."""
    columns = (
        TextColumn("loss {task.fields[loss]:.3f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"))
        yield lambda step, loss: progress.update(task, completed=step, loss=loss)


def _measure(out: Path, settings: Settings, measured: Sequence[Example], ended: float) -> None:
    """Open what was written, and print the losses of its members and of the proxy."""
    from proxytune_kernels.trio import load_trio
    from proxytune_kernels.tuning.held_out import held_out_losses

    dtype = "auto" if settings.full else settings.dtype
    trio = load_trio(out, dtype=dtype, device=settings.device)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("held-out rows", total=len(measured))
        found = held_out_losses(trio, measured, advance=lambda: progress.advance(task))
    answers = sum(found[0].tokens)
    table = Table(title=f"{len(measured)} held-out answers of {answers} tokens")
    for column in ("", "loss, nats per token", "95% interval"):
        table.add_column(column, justify="left" if not column else "right")
    losses = {each.name: each.loss for each in found}
    for name, loss in losses.items():
        table.add_row(name, f"{loss.value:.4f}", f"{loss.low:.4f} to {loss.high:.4f}")
    Console(file=sys.stdout).print(table)
    again = losses["expert"].value
    # Of the products in another dtype (on a GPU an adapter takes its layer's) that make a logit.
    rounding = 4 * torch.finfo(trio.expert.dtype).eps * max(1.0, ended)
    if not abs(again - ended) <= rounding:
        raise RuntimeError(
            f"the expert in {out} has a loss of {again:.6g}, training ended with {ended:.6g}"
        )
    ends = set(trio.eos_token_ids)
    if others := {example.answer[-1] for example in measured} - ends:
        tokens = ", ".join(f"--stop-token-id {i}" for i in sorted(others))
        typer.echo(f"Answers end with a token that ends no text of the base: give {tokens}")
