"""``proxytune sweep``: scores from one alpha to the next, and the alpha that they suggest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from proxytune_kernels.analysis.rows import read_rows
from proxytune_kernels.analysis.scorers import Scorer, TextScorer, scorer_of
from proxytune_kernels.cli.evaluate import find_tasks, import_lm_eval
from proxytune_kernels.cli.options import (
    FAILED,
    USAGE,
    DecoderOptions,
    TrioOptions,
    expected,
    open_decoder,
    stop,
    strengths,
    with_options,
)
from proxytune_kernels.params import SamplingParams

if TYPE_CHECKING:
    from proxytune_kernels.analysis.sweep import Curve, Sheet
    from proxytune_kernels.trio import Trio

_LM_EVAL = "lm-eval:"
_EVERY = ["0:0.25:2"]
_BATCH_SIZE = 8


@with_options
def sweep(
    score: Annotated[
        list[str],
        typer.Option(
            metavar="SCORER",
            help="regex:PATTERN (the first group is the row's answer), MODULE:FUNCTION (of text "
            "and row), likelihood (of the row's completion), choice (the row's answer among its "
            f"choices), or {_LM_EVAL}TASK[/METRIC]. Two of them give a curve of one against the "
            "other.",
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='JSON lines of "prompt" and what the scorers read.'),
    ] = None,
    alpha: Annotated[
        list[str] | None,
        typer.Option(metavar="X|FIRST:STEP:LAST", help="May be repeated.", show_default=_EVERY[0]),
    ] = None,
    pair_alpha: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X|FIRST:STEP:LAST",
            help="Of the trio's second pair; repeated, of its third, ... One of them may be a "
            "range, which is swept in the place of --alpha.",
            show_default="further pairs rest",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows, or documents of a task; to try it out.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an output.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="A row's noise is that at every alpha.")] = 0,
    stop_text: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="Ends an output; may be repeated."),
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="More tasks of lm-eval, as yaml files.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf.")
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write every row's text and scores at every alpha."),
    ] = None,
    *,
    trio: TrioOptions,
    decoder: DecoderOptions,
) -> None:
    r"""Score a trio at strengths from 0 to 2, and suggest one.

    Suggested is the lowest alpha that the prompts can't tell from the best one: the interval of
    their difference, prompt by prompt, holds 0.

    Example: proxytune sweep --trio shipped --prompts sums.jsonl --score 'regex:#### (\d+)'
    """
    for name in ("scipy", "matplotlib") if plot else ("scipy",):
        if find_spec(name) is None:
            raise stop(f"sweeps need {name}: pip install 'proxytune_kernels[analysis]'", FAILED)
    if not 1 <= len(score) <= 2 or len(set(score)) != len(score):
        raise stop("--score must be given once, or twice with two scorers", USAGE)
    swept, alphas, fixed = _swept(alpha, pair_alpha or ())
    settings = decoder.settings()
    sys.path.insert(0, "")  # MODULE:FUNCTION beside the file of prompts
    with expected(ValueError, code=USAGE):
        scorers = {text: None if text.startswith(_LM_EVAL) else scorer_of(text) for text in score}
        params = SamplingParams(
            alpha=fixed[0], pair_alphas=fixed[1:], max_tokens=max_tokens, temperature=temperature,
            seed=seed, stop=stop_text or (),
        )  # fmt: skip
    if (prompts is None) == any(scorers.values()):
        raise stop(
            "--prompts must be given for scorers of ours, and not for lm-eval's alone", USAGE
        )
    with expected(ValueError, OSError):
        rows = [] if prompts is None else read_rows(prompts)[:limit]
    from proxytune_kernels.analysis.sweep import Sheet

    opened = trio.open()
    # RuntimeError: also what torch raises where memory runs out.
    with expected(ValueError, TypeError, OSError, RuntimeError):
        sheet = Sheet(str(prompts), rows, alphas, opened, params, swept)
        if any(isinstance(scorer, TextScorer) for scorer in scorers.values()):
            with _bar("texts", len(rows) * len(alphas)) as advance:
                sheet.generate(open_decoder(opened, **settings), advance)
        curves = [
            _task_curve(opened, text, alphas, limit, include_path)
            if scorer is None
            else _curve(sheet, scorer, len(rows))
            for text, scorer in scorers.items()
        ]
        if jsonl is not None:
            sheet.write(jsonl)
        print_curves(curves)
        if plot is not None:
            from proxytune_kernels.analysis.plots import plot_sweep

            plot_sweep(curves, plot)


def _swept(
    alpha: list[str] | None, pair_alpha: Sequence[str]
) -> tuple[int, list[float], list[float]]:
    """Which pair is swept, the strengths that it has, and one of every pair for the others."""
    further = [strengths([text]) for text in pair_alpha]
    ranges = [i for i, each in enumerate(further, 1) if len(each) > 1]
    if alpha is None:
        alpha = ["1"] if ranges else _EVERY
    every = [strengths(alpha), *further]
    if len(every[0]) > 1:
        ranges.insert(0, 0)
    if len(ranges) > 1:
        raise stop("--alpha and --pair-alpha must have one range in all, got more", USAGE)
    swept = ranges[0] if ranges else 0
    return swept, sorted(every[swept]), [each[0] for each in every]


def _curve(sheet: Sheet, scorer: Scorer, rows: int) -> Curve:
    with _bar(scorer.name, rows) as advance:
        return sheet.curve(scorer, advance)


def _task_curve(
    trio: Trio, text: str, alphas: Sequence[float], limit: int | None, include_path: str | None
) -> Curve:
    """The scores of ``lm-eval:TASK/METRIC``."""
    from proxytune_kernels.analysis.sweep import Curve

    lm_eval_model = import_lm_eval()
    task, _, metric = text.removeprefix(_LM_EVAL).partition("/")
    [name, *more], manager = find_tasks([task], include_path)
    if more:
        raise ValueError(f"--score must name one task, got {task!r} for {len(more) + 1}")
    lm = lm_eval_model.ProxyTuneLM(trio, batch_size=_BATCH_SIZE)
    metric, scores = lm_eval_model.document_scores(
        lm, alphas, name, metric or None, task_manager=manager, limit=limit
    )
    return Curve(f"{name}/{metric}", tuple(alphas), scores)


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def print_curves(curves: Sequence[Curve]) -> None:
    """A table for each scorer, what it suggests, and with two the alphas to choose among."""
    from proxytune_kernels.analysis.sweep import undominated

    console = Console(file=sys.stdout)
    for curve in curves:
        table = Table(title=Text(f"{curve.name}, {len(curve.scores[0])} rows"))
        for column in ("alpha", "score", "95% interval", "behind the best", "95% interval"):
            # Where a terminal is narrow an interval takes two lines: no digit is cut off.
            table.add_column(column, justify="right", no_wrap="interval" not in column)
        for point in curve.points:
            cells = [f"{point.alpha:g}"]
            for found in (point.score, point.behind):
                cells += [f"{found.value:.4g}", f"{found.low:.4g} to {found.high:.4g}"]
            table.add_row(*cells, style="bold" if point.alpha == curve.suggested else None)
        console.print(table)
        typer.echo(
            f"suggested alpha: {curve.suggested:g}, the lowest whose interval behind the best "
            f"({curve.best:g}) holds 0"
        )
    if len(curves) == 2:
        alphas = ", ".join(f"{alpha:g}" for alpha in undominated(*curves))
        typer.echo(f"no other alpha is better in one score and as good in the other: {alphas}")
