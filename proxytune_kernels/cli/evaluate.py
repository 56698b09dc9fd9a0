"""``proxytune eval``: lm_eval's tasks for a trio, at one or several strengths."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from proxytune_kernels.cli.options import (
    FAILED,
    USAGE,
    TrioOptions,
    expected,
    stop,
    strengths,
    with_options,
)

_INSTALL = "pip install 'proxytune_kernels[eval]'"
_TRIO = {field.name: field.default for field in fields(TrioOptions)}
_MODEL = ("batch_size", "max_length", "max_gen_toks", "add_bos_token", "prefix_token_id",
          "backend")  # fmt: skip
_MODEL_ARGS = (*_TRIO, "alpha", *_MODEL)
_BATCH_SIZE = 8
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


@with_options
def evaluate(
    tasks: Annotated[str, typer.Option(metavar="NAME,...", help="Tasks and groups of lm_eval.")],
    model_args: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE,...",
            help=f"What the options below say, in lm_eval's way: {', '.join(_MODEL_ARGS)}.",
        ),
    ] = None,
    *,
    trio: TrioOptions,
    alpha: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X|FIRST:STEP:LAST",
            help="Strength of the steering; several, repeated or as a range, share the forwards.",
            show_default="1",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences at the same time.", show_default="8")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a model is given.", show_default="shortest context")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the context.")] = None,
    limit: Annotated[
        float | None, typer.Option(help="Documents of a task, or a share below 1; to try it out.")
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="More tasks, as yaml files.")
    ] = None,
    output_path: Annotated[
        str | None, typer.Option(metavar="DIR|FILE.json", help="Where lm_eval writes results.")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Write every document's results, too.")
    ] = False,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(metavar="KEY=VALUE,...", help="Over the tasks' generation_kwargs."),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Contexts as chats, for every role.")
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(help="Examples as turns of the chat.", show_default="with a chat template"),
    ] = None,
    system_instruction: Annotated[str | None, typer.Option(help="Before every context.")] = None,
    seed: Annotated[
        str | None,
        typer.Option(
            metavar="N|PYTHON,NUMPY,TORCH,FEWSHOT",
            help="Of few-shot examples and sampled text; as in lm_eval.",
            show_default="0,1234,1234,1234",
        ),
    ] = None,
) -> None:
    """Evaluate a trio on tasks of lm_eval; the results are lm_eval's, one for each alpha.

    Example: proxytune eval --tasks my_task --include-path tasks --trio shipped --alpha 0:0.5:1
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if log_samples and output_path is None:
        raise stop("--log-samples needs --output-path", USAGE)
    given = {name: value for name, value in asdict(trio).items() if value != _TRIO[name]}
    own = {"alpha": alpha, "batch_size": batch_size, "max_length": max_length}
    given |= {name: value for name, value in own.items() if value is not None}
    given = _merged(given, model_args)
    alphas = strengths(given.pop("alpha", None))
    seeds = _seeds(seed)
    lm_eval_model = import_lm_eval()
    names, task_manager = find_tasks(tasks.split(","), include_path)
    lm = _open(given)
    runs = lm_eval_model.evaluate_alphas(
        lm,
        alphas,
        name=Path(str(given.get("trio", given.get("base")))).name,
        output_path=output_path,
        log_samples=log_samples,
        model_args=given,
        tasks=names,
        task_manager=task_manager,
        num_fewshot=num_fewshot,
        limit=limit,
        gen_kwargs=gen_kwargs,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template
        if fewshot_as_multiturn is None
        else fewshot_as_multiturn,
        system_instruction=system_instruction,
        **dict(zip(_SEEDS, seeds, strict=True)),
    )
    # OSError: a task's data, a folder that can't be written to. RuntimeError: memory runs out.
    with expected(ValueError, OSError, RuntimeError):
        for at, results in runs:
            _print(at, results)


def _merged(options: dict[str, Any], model_args: str | None) -> dict[str, Any]:
    """Options, and what ``--model-args`` says; each once."""
    if model_args is None:
        return options
    merged = dict(options)
    for part in filter(None, model_args.split(",")):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in _MODEL_ARGS:
            raise stop(
                f"--model-args must be KEY=VALUE with keys among {', '.join(_MODEL_ARGS)}, "
                f"got {part!r}",
                USAGE,
            )
        if name in merged:
            raise stop(f"{name} must be given once, got it twice", USAGE)
        merged[name] = _value(value)
    return merged


def _value(text: str) -> Any:
    """A number, True, False or None written out; else the text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    return int(text) if text.lstrip("-").isdigit() else text


def _seeds(text: str | None) -> list[int | None]:
    """One seed for all of lm_eval's four, or four; "None" leaves one alone."""
    if text is None:
        return [0, 1234, 1234, 1234]  # lm_eval's
    parts = [part.strip() for part in text.split(",")]
    try:
        seeds = [None if part.lower() == "none" else int(part) for part in parts]
    except ValueError:
        seeds = []
    if len(seeds) not in (1, 4):
        raise stop(f"--seed must be one integer, or four with commas between, got {text!r}", USAGE)
    return seeds * 4 if len(seeds) == 1 else seeds


def import_lm_eval() -> Any:
    """The integration; leaves with what to install where lm_eval is not there."""
    try:
        from lm_eval.utils import setup_logging

        from proxytune_kernels.integrations import lm_eval_model
    except ImportError as error:
        raise stop(f"evaluation needs lm_eval ({error}): {_INSTALL}", FAILED) from error
    setup_logging(logging.WARNING)  # LMEVAL_LOG_LEVEL says otherwise
    return lm_eval_model


def find_tasks(names: Sequence[str], include_path: str | None) -> tuple[list[str], Any]:
    """Tasks by their names, and the manager that knows them."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise stop(f"--include-path must be a directory, got {include_path!r}", USAGE)
    # lm_eval's own thousands of tasks take seconds to list: only where they are needed.
    kinds = [True] if include_path is None else [False, True]
    with expected(ValueError, OSError):
        for defaults in kinds:
            manager = TaskManager(include_path=include_path, include_defaults=defaults)
            found = {name: manager.match_tasks([name]) for name in names}
            missing = [name for name, matches in found.items() if not matches]
            if not missing:
                return list(dict.fromkeys(chain.from_iterable(found.values()))), manager
    raise stop(f"--tasks has no such task: {', '.join(missing)}", USAGE)


def _open(given: dict[str, Any]) -> Any:
    """The model; leaves with the reason where it does not open."""
    from proxytune_kernels.integrations.lm_eval_model import ProxyTuneLM

    trio = TrioOptions(**{name: given[name] for name in _TRIO if name in given}).open()
    rest = {"batch_size": _BATCH_SIZE} | {n: given[n] for n in _MODEL if n in given}
    with expected(ValueError, TypeError, code=USAGE), expected(RuntimeError):
        return ProxyTuneLM(trio, **rest)


def _print(alpha: float, results: dict[str, Any]) -> None:
    """lm_eval's tables under a line that names the alpha."""
    from lm_eval.utils import make_table

    typer.echo(f"proxytune, alpha {alpha:g}")
    typer.echo(make_table(results))
    if "groups" in results:
        typer.echo(make_table(results, "groups"))
