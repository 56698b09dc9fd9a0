"""How like a real trio's the peaked logits are: ``python -m benchmarks.logit_statistics``."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.logits import make_logits
from benchmarks.prompts import make_prompts
from benchmarks.providers import TEMPERATURE, TOP_P, combined
from benchmarks.report import console, make_table, significant
from benchmarks.trios import open_trio
from proxytune_kernels import RowParams, Trio, reference

_SKIPPED = 8  # the first positions have too little context to be typical
_RANKS = (10, 100, 1_000, 10_000)
_NEGLIGIBLE = math.exp(-20)


@torch.inference_mode()
def trio_logits(trio: Trio, length: int) -> Tensor:
    """Combined logits [length - 8, V] of a trio over English."""
    ids = torch.tensor(make_prompts(trio, 1, length))
    return combined(
        {
            role: model(ids).logits[0, _SKIPPED:, : trio.vocab_size].float()
            for role, model in trio.models.items()
        }
    )


def statistics(x: Tensor) -> dict[str, Tensor]:
    """Per row of x [B, V], what decides how much work a sampler has."""
    logprobs = x.log_softmax(-1)
    params = RowParams.make(len(x), temperature=TEMPERATURE, top_p=TOP_P)
    falling = x.sort(-1, descending=True).values
    top = falling[:, :1]
    weights = ((x - top) / TEMPERATURE).exp()
    return {
        "entropy, nats": -(logprobs.exp() * logprobs).sum(-1),
        "kept": torch.cat(
            [
                reference.distribution(x[i : i + 1], params.rows(slice(i, i + 1))).kept.sum(-1)
                for i in range(len(x))
            ]
        ),
        "standard deviation": x.std(-1),
        "top - median": top[:, 0] - falling.median(-1).values,
        **{f"top - rank {r:,}": top[:, 0] - falling[:, r - 1] for r in _RANKS if r <= x.shape[-1]},
        "weights over e^-20": (weights >= _NEGLIGIBLE).sum(-1),
    }


def main(
    trio: Annotated[str, typer.Option(help="shipped, qwen, or a directory.")] = "qwen",
    length: Annotated[int, typer.Option(min=_SKIPPED + 1, help="Tokens of English.")] = 160,
) -> None:
    """Compare a trio's combined logits on English with the benchmarks' peaked ones."""
    x = trio_logits(open_trio(trio, None), length)
    base, expert, anti = make_logits("peaked", len(x), x.shape[-1], torch.float32)
    made = combined({"base": base, "expert": expert, "anti": anti})
    columns = ("", f"{trio}", "p10", "p90", "peaked", "p10", "p90")
    caption = f"Medians over {len(x)} rows, V = {x.shape[-1]:,}. Kept: at temperature "
    table = make_table("Combined logits", columns, f"{caption}{TEMPERATURE}, top_p {TOP_P}.")
    generated = statistics(made)
    for name, values in statistics(x).items():
        quantiles = torch.tensor([0.5, 0.1, 0.9])
        both = (values.float().quantile(quantiles), generated[name].float().quantile(quantiles))
        table.add_row(name, *(significant(float(q)) for side in both for q in side))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
