"""Quantised weights: what they change in a model's texts, its bytes and its steps.

``python -m benchmarks.quantization --help``; docs/loading.md has the results and what they mean.
"""

from __future__ import annotations

import sysconfig
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.harness import options, report, trios
from benchmarks.harness.measure import ratios, summary, time_in_turns
from proxytune_kernels import quantize
from proxytune_kernels.analysis.intervals import bootstrap
from proxytune_kernels.trio import model_info
from proxytune_kernels.trio.files import Place
from proxytune_kernels.trio.llama_cpp import RUNTIME, LlamaContext, LlamaModel
from proxytune_kernels.trio.quantization import QuantizationError

PLAIN = "plain"
VARIANTS = (PLAIN, "int8", "int4")
"""And, with a GGUF file of the same model, what llama.cpp makes of it."""
CHARACTERS = 16
"""More than a token has on average: so many for each are cut before they are tokenized."""

Record = dict[str, Any]
Piece = tuple[Tensor, int]
"""Tokens int64 [T] that stand by themselves, and how many of them are given."""


def read_texts(directory: str, tokens: int, count: int) -> dict[str, list[Piece]]:
    """English and Python that any CPython has; of a trio's member the expert's problems, too.

    English is what ``help()`` says of the language, Python the standard library: each in one
    string, and pieces of it from ``count`` places at even distances. Of the problems, 20 for each
    such piece; questions are apart from answers, which alone the expert was tuned to predict.
    """
    from transformers import AutoTokenizer

    trio = Path(directory).resolve().parent
    own = Path(directory) if (Path(directory) / "tokenizer.json").is_file() else trio
    encode = AutoTokenizer.from_pretrained(own).encode
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    whole = {
        "English": "\n\n".join(topics[name] for name in sorted(topics)),
        "Python": "\n\n".join(file.read_text("utf-8") for file in library),
    }
    texts: dict[str, list[Piece]] = {}
    for name, text in whole.items():
        starts = [len(text) * i // count for i in range(count)]
        cut = (text[start : start + CHARACTERS * tokens] for start in starts)
        texts[name] = [(torch.tensor(encode(part)[:tokens]), 1) for part in cut]
    if (trio / "trio.json").is_file():
        name = "shipped" if trio == trios.SHIPPED else directory
        problems = trios.task_prompts("arithmetic", name)[: 20 * count]
        pairs = [(encode(q), encode(a or "", add_special_tokens=False)) for q, a in problems]
        texts["questions"] = [(torch.tensor(question), 1) for question, _ in pairs]
        texts["answers"] = [(torch.tensor([*q, *a]), len(q)) for q, a in pairs]
    return texts


def sums(token_ids: Tensor, plain: Tensor, logprobs: Tensor) -> tuple[float, float, float]:
    """Compare log-probabilities [T, V] before each of T tokens int64 [T] with the plain model's.

    Returns:
        Sums over the tokens: their negative log-likelihood in nats, positions whose likeliest token
        is the plain model's, and the KL divergence from the plain model's distribution in nats.
    """
    return (
        -float(logprobs.gather(1, token_ids[:, None]).sum()),
        float((plain.argmax(-1) == logprobs.argmax(-1)).sum()),
        float((plain.exp() * (plain - logprobs)).sum()),
    )


def perplexity_of_plain(nll: Any, plain: Any, count: Any, axis: int = -1) -> np.ndarray:
    """One perplexity over another, of pieces' summed nats and numbers of tokens."""
    return np.exp((nll.mean(axis) - plain.mean(axis)) / count.mean(axis))


def line(name: str, count: np.ndarray, plain: np.ndarray, found: np.ndarray) -> Record:
    """What is said of a text: :func:`sums` [pieces, 3] of the plain model and of another one."""
    nll, agreement, divergence = found.sum(0) / count.sum()
    ratio = bootstrap(found[:, 0], plain[:, 0], count, statistic=perplexity_of_plain)
    return {"text": name, "pieces": len(count), "tokens": int(count.sum()), "nll": nll,
            "agreement": agreement, "divergence": divergence, "perplexity": ratio}  # fmt: skip


def open_models(directory: str, dtype: str, gguf: Path | None) -> dict[str, Any]:
    """Each variant, opened by itself."""
    from transformers import AutoModelForCausalLM

    trios.quiet_loading()
    models: dict[str, Any] = {}
    for variant in VARIANTS if gguf is None else VARIANTS[:1]:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        try:
            models[variant] = model if variant == PLAIN else quantize(model, variant)
        except QuantizationError as reason:
            report.say(f"{variant} is left out: {reason}", "yellow")
    if gguf is not None:
        models[RUNTIME] = LlamaModel("model", Place(str(gguf), gguf.parent), gguf.name)
    return models


@torch.inference_mode()
def measure(models: dict[str, Any], texts: dict[str, list[Piece]], repeats: int) -> list[Record]:
    """One record each, the plain model's first."""
    records: list[Record] = [
        {"variant": variant, "bytes": model_info(model)["bytes"], "quality": []}
        for variant, model in models.items()
    ]

    def predicted(model: Any, ids: Tensor, given: int) -> Tensor:
        logits: Tensor = model(ids[None]).logits[0, given - 1 : -1]
        return logits.float().log_softmax(-1)

    with report.progress_bar(sum(map(len, texts.values())), "pieces") as tick:
        for name, pieces in texts.items():
            found: list[list[tuple[float, float, float]]] = [[] for _ in models]
            for ids, given in pieces:
                # Of one piece at a time: a text's log-probabilities are gigabytes.
                plain = predicted(models[PLAIN], ids, given)
                for own, (variant, model) in zip(found, models.items(), strict=True):
                    other = plain if variant == PLAIN else predicted(model, ids, given)
                    own.append(sums(ids[given:], plain, other))
                tick(name)
            count = np.array([len(ids) - given for ids, given in pieces], dtype=float)
            rows = np.array(found)
            for record, row in zip(records, rows, strict=True):
                record["quality"].append(line(name, count, rows[0], row))
    # A token without a past: the step of a short sequence, which reads the weights once.
    one = texts["English"][0][0][None, :1]
    calls: dict[str, Any] = {v: partial(model, one) for v, model in models.items()}
    if RUNTIME in models:
        context = LlamaContext(models[RUNTIME], 1, 1)
        calls[RUNTIME] = partial(context.run, [(0, 0, one[0].tolist())], every=False)
    seconds = time_in_turns(calls, repeats)
    for record in records:
        took = seconds[record["variant"]]
        record |= {"step": summary(took), "step_over_plain": ratios(took, seconds[PLAIN])}
    return records


COLUMNS: tuple[report.Column, ...] = (
    ("", "variant", str),
    ("text", "text", str),
    ("tokens", "tokens", str),
    ("MB", "bytes", report.decimals(1, 1e-6)),
    ("nll", "nll", report.decimals(4)),
    ("perplexity of plain", "perplexity", "{0[0]:.4f} [{0[1]:.4f}, {0[2]:.4f}]".format),
    ("agrees", "agreement", report.percent),
    ("KL", "divergence", report.decimals(4)),
    ("step, ms", "step/median", report.decimals(1, 1e3)),
    ("of plain", "step_over_plain/median", report.fixed),
)
CAPTION = "Perplexities over the plain model's with 95% intervals by bootstrap over pieces."


def main(
    model: Annotated[str, typer.Argument(help="A causal LM: a directory, a trio's member, say.")],
    gguf: Annotated[
        Path | None,
        typer.Option(help="This GGUF file of it in llama.cpp, in place of int8 and int4."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of a piece of text.")] = 512,
    texts: Annotated[int, typer.Option(min=1, help="Pieces of English, and of Python.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 15,
    threads: options.Threads = 1,
    dtype: options.Dtype = "bfloat16",
    output: options.Output = None,
) -> None:
    """A model plain, in int8 and int4: what changes of its predictions, its bytes and its step."""
    of_torch = options.set_threads(threads)
    with options.user_errors():
        read = read_texts(model, tokens, texts)
        opened = open_models(model, str(dtype), gguf)
    records = measure(opened, read, repeats)
    shared = {"model": model, "dtype": dtype, "threads": of_torch}
    report.write_results(output, "quantization", shared, records)
    rows = [{**record, **row} for record in records for row in record["quality"]]
    report.print_records(f"Quantised weights of {model}", CAPTION, rows, COLUMNS)


if __name__ == "__main__":
    typer.run(main)
