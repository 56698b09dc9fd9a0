"""Log-likelihoods of lm_eval's documents by ours and by lm_eval's own model.

``python -m benchmarks.evaluation --help``; docs/lm_eval.md has the results and what they mean.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import options, report, trios
from benchmarks.harness.measure import ratios, summary, timed
from benchmarks.harness.memory import in_fresh_process, peak_memory
from benchmarks.harness.random_models import ModelShape, random_model
from proxytune_kernels import Trio

WIDE = "wide"
"""A trio of random weights with the vocabulary and hidden size of SmolLM-135M."""
VOCAB_SIZE = 49_152
BLOCKS = 10
"""Parts of the documents that both answer in turn: the repeats of the measurement."""
# Nats per token that two forwards of other shapes may be apart. bf16 rounds logits of up to 16 by
# 2^-5 at most, fp16 by 2^-8; three roles at alpha 1, a log-softmax moves by twice that, and hidden
# states were rounded, too. In fp32 it is some 1e-5.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.03}

CONTEXT_TOKENS = (12, 40)
CHOICE_TOKENS = (1, 4)

PROVIDERS = ("ours", "HFLM")
Record = dict[str, Any]
Document = list[Any]
"""A document's requests, one per choice, all with its context."""
Answers = list[tuple[float, bool]]
"""(log-likelihood, is greedy) of every choice."""


def make_trio(name: str, dtype: str | None, layers: int) -> Trio:
    """``wide`` with a base of ``layers`` layers, or as ``open_trio``."""
    if name != WIDE:
        return trios.open_trio(name, dtype)
    trios.quiet_loading()
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    weights = getattr(torch, dtype or "float32")
    large = ModelShape(576, 1536, layers, 9, 3, VOCAB_SIZE, tie_word_embeddings=True)
    small = ModelShape(192, 512, 2, 3, 3, VOCAB_SIZE, tie_word_embeddings=True)
    base, expert, anti = (
        random_model(shape, "cpu", seed, dtype=weights)
        for seed, shape in enumerate((large, small, small))
    )
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    return Trio.from_models(base, expert, anti, tokenizer)


def make_documents(name: str, count: int, choices: int, seed: int = 0) -> list[Document]:
    """Documents with contexts of unequal lengths and choices of one to a few tokens (words)."""
    from lm_eval.api.instance import Instance

    rng = random.Random(seed)
    words = [f"w{i}" for i in range(1, VOCAB_SIZE)] if name == WIDE else trios.ENGLISH.split()

    def text(least: int, most: int) -> str:
        length = rng.randint(least, most)
        if name == WIDE:
            return " ".join(rng.choices(words, k=length))
        first = rng.randrange(len(words) - length)
        return " ".join(words[first : first + length])

    documents = []
    for i in range(count):
        context = text(*CONTEXT_TOKENS)
        ends = [" " + text(*CHOICE_TOKENS) for _ in range(choices)]
        documents.append([Instance("loglikelihood", {}, (context, end), i) for end in ends])
    return documents


def make_lm(name: str, trio: Trio, batch_size: int) -> Any:
    """Who answers: ``proxytune``, or lm_eval's transformers model over the three as one."""
    # Both are imported whichever is made, so that peaks of memory hold the same libraries.
    from lm_eval.models.huggingface import HFLM

    from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM
    from proxytune_kernels.integrations.lm_eval_model import ProxyTuneLM

    if name == "ours":
        return ProxyTuneLM(trio, alpha=1.0, batch_size=batch_size)
    # It warns that a model was made before it was given.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model: Any = ProxyTunedForCausalLM.from_trio(trio, 1.0)
    return HFLM(pretrained=model, tokenizer=trio.tokenizer, batch_size=batch_size)


def answer(lm: Any, documents: Sequence[Document]) -> Answers:
    """Score every choice."""
    asked = [request for document in documents for request in document]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Answers = lm.loglikelihood(asked, disable_tqdm=True)
    return found


def blocks_of(documents: Sequence[Document]) -> list[Sequence[Document]]:
    """At most :data:`BLOCKS` parts."""
    size = -(-len(documents) // BLOCKS)
    return [documents[first : first + size] for first in range(0, len(documents), size)]


def measure(
    name: str, trio: Trio, documents: Sequence[Document], batch_size: int
) -> tuple[list[Record], Record]:
    """Both providers over all documents, block by block in turn; a record each, and the check."""
    lms = {provider: make_lm(provider, trio, batch_size) for provider in PROVIDERS}
    answers: dict[str, Answers] = {provider: [] for provider in lms}
    seconds: dict[str, list[float]] = {provider: [] for provider in lms}
    with report.progress_bar(2 * BLOCKS, name) as tick:
        for lm in lms.values():
            answer(lm, documents[:2])  # pages in what the first call needs
        for number, block in enumerate(blocks_of(documents)):
            # Each is first in half of the blocks.
            for provider in list(lms) if number % 2 else list(lms)[::-1]:
                found, took = timed(partial(answer, lms[provider], block))
                answers[provider] += found
                seconds[provider].append(took)
                tick(f"{name}: {provider}")
    asked = [request for document in documents for request in document]
    encode = trio.tokenizer.encode
    tokens = [len(encode(request.args[1], add_special_tokens=False)) for request in asked]
    check = compare(answers["ours"], answers["HFLM"], tokens, CLOSE[trio.base.dtype])
    records: list[Record] = [
        {
            "provider": provider,
            "seconds": sum(own),
            "block_seconds": summary(own),
            "speed_over_hflm": ratios(seconds["HFLM"], own),
        }
        for provider, own in seconds.items()
    ]
    return records, check


def compare(ours: Answers, theirs: Answers, tokens: Sequence[int], close: float) -> Record:
    """How far the answers are apart, per token of a choice."""
    pairs = zip(ours, theirs, tokens, strict=True)
    apart = [abs(one[0] - other[0]) / count for one, other, count in pairs]
    if not max(apart) <= close:
        raise RuntimeError(
            f"log-likelihoods differ by up to {max(apart)} per token, beyond {close}"
        )
    return {
        "requests": len(ours),
        "difference_per_token": summary(apart),
        "worst_difference_per_token": max(apart),
        "differing_greedy": sum(a[1] != b[1] for a, b in zip(ours, theirs, strict=True)),
    }


def prepare(
    trio: str, dtype: str | None, layers: int, documents: int, choices: int
) -> tuple[Trio, list[Document]]:
    """The trio, and what it is asked."""
    return make_trio(trio, dtype, layers), make_documents(trio, documents, choices)


def peak(provider: str, threads: int, batch_size: int, *asked: Any) -> dict[str, int]:
    """Peak memory of one provider over the first block; for a process of its own."""
    torch.set_num_threads(threads)
    trio, documents = prepare(*asked)
    lm = make_lm(provider, trio, batch_size)
    answer(lm, documents[:1])
    return peak_memory(partial(answer, lm, blocks_of(documents)[0]))


COLUMNS: tuple[report.Column, ...] = (
    ("", "provider", str),
    ("s", "seconds", report.decimals(1)),
    ("x\nHFLM", "speed_over_hflm/median", report.fixed),
    ("MB on\ntop", "memory/extra_bytes", report.decimals(0, 1e-6)),
    ("MB in\nall", "memory/total_bytes", report.decimals(0, 1e-6)),
)
CAPTION = (
    f"x HFLM: its time over ours, median of {BLOCKS} blocks that both ran in turn. "
    "MB: peak memory of a block, on top of weights and libraries, and in all."
)


def main(
    trio: Annotated[
        str,
        typer.Option(
            help=f"{WIDE} (random, V = 49,152), shipped, or a directory with a trio.json."
        ),
    ] = WIDE,
    documents: Annotated[int, typer.Option(min=BLOCKS)] = 500,
    choices: Annotated[int, typer.Option(min=1, help="Continuations of a context.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Of both.")] = 8,
    layers: Annotated[int, typer.Option(min=1, help=f"Of the base of {WIDE}.")] = 4,
    threads: options.Threads = None,
    dtype: options.Dtype = None,
    output: options.Output = None,
) -> None:
    """Score multiple-choice documents with ours and with lm_eval's HFLM over the composite."""
    of_torch = options.set_threads(threads)
    asked = trio, dtype, layers, documents, choices
    with options.user_errors():
        opened, given = prepare(*asked)
    records, check = measure(trio, opened, given, batch_size)
    for record in records:
        own = record["provider"], of_torch, batch_size, *asked
        record["memory"] = in_fresh_process(peak, *own)
    name = options.trio_label(trio)
    shared = {
        "trio": name, "dtype": dtype, "layers": layers, "documents": documents,
        "choices": choices, "batch_size": batch_size, "threads": of_torch, **check,
    }  # fmt: skip
    report.write_results(output, "evaluation", shared, records, name)
    title = (
        f"loglikelihood of {documents} documents of {choices} choices, trio {trio}, batches "
        f"of {batch_size}; at most {check['worst_difference_per_token']:.1g} nats a token "
        f"apart, {check['differing_greedy']} of {check['requests']} in whether they are greedy"
    )
    report.print_records(title, CAPTION, records, COLUMNS)


if __name__ == "__main__":
    typer.run(main)
