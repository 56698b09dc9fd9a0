"""Quantised weights beside plain ones: what they change in a model's text, its bytes, its steps.

``python -m benchmarks.quantization --help``; docs/loading.md has the results and what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import Linear

from benchmarks.choices import parse_choices
from benchmarks.environment import REPOSITORY
from benchmarks.measure import Summary, collect, interleaved, paired_ratios
from benchmarks.report import RESULTS, console, fixed, machine_line, make_table, write_json_lines
from proxytune_kernels import quantize
from proxytune_kernels.trio.quantization import weight_bytes

# English and Python.
TEXTS = ("docs/math.md", "proxytune_kernels/params.py")
PLAIN = "plain"


def _groups_of(size: int) -> Callable[[Any], object]:
    """int4 as :func:`quantize` has it, but for the size of a group; on a CPU."""

    def apply(model: Any) -> None:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        _by_torchao(model, PrototypeInt4WeightOnlyConfig(group_size=size), _is_not_head(model))

    return apply


def _with_head(quantization: str) -> Callable[[Any], object]:
    """As :func:`quantize` has it, and the output layer too."""

    def apply(model: Any) -> None:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig

        quantize(model, quantization)
        head = model.get_output_embeddings()
        config: Any = Int8WeightOnlyConfig()
        if quantization == "int4":
            config = PrototypeInt4WeightOnlyConfig(group_size=32)
        _by_torchao(model, config, lambda module, _: module is head)

    return apply


def _is_not_head(model: Any) -> Callable[[Any, str], bool]:
    head = model.get_output_embeddings()
    return lambda module, _: isinstance(module, Linear) and module is not head


def _by_torchao(model: Any, config: Any, chosen: Callable[[Any, str], bool]) -> None:
    from torchao.quantization import quantize_

    config.set_inductor_config = False
    quantize_(model, config, filter_fn=chosen)


VARIANTS: Mapping[str, Callable[[Any], object]] = {
    PLAIN: lambda model: None,
    "int8": lambda model: quantize(model, "int8"),
    "int8+head": _with_head("int8"),
    "int4": lambda model: quantize(model, "int4"),
    "int4+head": _with_head("int4"),
    "int4/64": _groups_of(64),
    "int4/128": _groups_of(128),
}
"""What is measured: as ``quantize`` does it, and what it could do instead."""


@dataclass(frozen=True)
class Quality:
    """One model on one text, beside the plain one.

    ``nll`` is the mean negative log-likelihood of the text's tokens in nats; ``agreement`` the
    share of positions whose likeliest token is the plain model's; ``divergence`` the mean KL
    divergence from the plain model's distribution to this one, in nats.
    """

    text: str
    tokens: int
    nll: float
    agreement: float
    divergence: float


def quality(text: str, token_ids: Tensor, plain: Tensor, logprobs: Tensor) -> Quality:
    """Compare log-probabilities [T, V] after each of T tokens int64 [T] with the plain model's."""
    following = logprobs[:-1].gather(1, token_ids[1:, None])
    same = plain.argmax(dim=-1) == logprobs.argmax(dim=-1)
    return Quality(
        text=text,
        tokens=len(token_ids),
        nll=-float(following.mean()),
        agreement=float(same.float().mean()),
        divergence=float((plain.exp() * (plain - logprobs)).sum(dim=-1).mean()),
    )


@torch.inference_mode()
def _logprobs(model: Any, token_ids: Tensor) -> Tensor:
    return torch.log_softmax(model(token_ids[None]).logits[0].float(), dim=-1)


@torch.inference_mode()
def measure(
    directory: str, dtype: str, variants: tuple[str, ...], tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Open a model once per variant; one record each, the plain model's first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = {name: (REPOSITORY / name).read_text() for name in TEXTS}
    ids = {
        name: torch.tensor(tokenizer(text)["input_ids"][:tokens]) for name, text in texts.items()
    }
    models: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    plain: dict[str, Tensor] = {}
    for variant in (PLAIN, *(v for v in variants if v != PLAIN)):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        VARIANTS[variant](model)
        models[variant] = model
        found = {name: _logprobs(model, token_ids) for name, token_ids in ids.items()}
        plain = plain or found
        rows = [quality(name, ids[name], plain[name], found[name]) for name in ids]
        records.append(
            {"variant": variant, "bytes": weight_bytes(model), "quality": [asdict(r) for r in rows]}
        )
    # A token without a past: the step of a short sequence, which reads the weights once.
    one = torch.tensor([[next(iter(ids.values()))[0]]])
    calls = {variant: lambda m=model: m(one) for variant, model in models.items()}
    seconds = collect(interleaved(calls, repeats))
    for record in records:
        own = seconds[record["variant"]]
        record["step"] = asdict(Summary.of(own))
        record["step_over_plain"] = asdict(paired_ratios(own, seconds[PLAIN]))
    return records


def print_records(model: str, records: list[dict[str, Any]]) -> None:
    """One line per variant and text."""
    columns = ("", "text", "MB", "nll", "agrees", "KL", "step, ms", "of plain")
    table = make_table(f"Quantised weights of {model}", columns, machine_line())
    for record in records:
        for row in record["quality"]:
            table.add_row(
                record["variant"],
                row["text"].rpartition("/")[2],
                fixed(record["bytes"] / 1e6, 1),
                fixed(row["nll"], 4),
                fixed(100 * row["agreement"], 1, "%"),
                fixed(row["divergence"], 4),
                fixed(1e3 * record["step"]["median"], 1),
                fixed(record["step_over_plain"]["median"], 2),
            )
    console.print(table)


def main(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a causal LM.")],
    dtype: Annotated[str, typer.Option(help="Of what is not quantised.")] = "bfloat16",
    variants: Annotated[str, typer.Option(help=f"Of {','.join(VARIANTS)}.")] = ",".join(VARIANTS),
    tokens: Annotated[int, typer.Option(min=2, help="Of each text.")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each, interleaved.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1,
    output: Annotated[Path, typer.Option(help="JSON lines.")] = RESULTS / "quantization.jsonl",
) -> None:
    """Measure text, bytes and a step of one model, quantised in several ways. On a CPU."""
    torch.set_num_threads(threads)
    chosen = tuple(parse_choices("--variants", variants, tuple(VARIANTS), None))
    records = measure(model, dtype, chosen, tokens, repeats)
    write_json_lines(
        output, "quantization", [{"model": model, "dtype": dtype, **r} for r in records]
    )
    print_records(model, records)
    console.print(f"Wrote {output}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
