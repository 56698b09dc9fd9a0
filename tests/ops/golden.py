"""Golden draws: what every backend must draw, for ever. ``golden.json`` holds them.

They are written by ``python -m tests.ops.golden`` from the reference. Running it again must change
nothing; a change of the file is a change of the contract, and needs an entry in CHANGELOG.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels import reference

PATH = Path(__file__).with_name("golden.json")

NOTE = (
    "Golden draws: changing them changes what a seed means, and is an entry in CHANGELOG.md. "
    "Written by `python -m tests.ops.golden`. Logits of role r in 0, 1, 2 at token i: "
    "(((i + 1) * (2654435761 + 2 * r) + 40503 * case * (r + 1)) mod 2^32 >> 22) - 512, "
    "over 2^shift for base and over 2^(shift + 1) for expert and anti. From case 180 on tokens "
    "have edits, golden.edits_of."
)

WIDTHS = (1, 6, 128, 1000, 50_257)
SEEDS = (0, 1, 7, 2**32 + 5, 2**63 + 11, 2**64 - 1)
POSITIONS = (0, 1, 300, 2**31, 2**40 + 3)
FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.9},
    {"top_k": 40},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.75, "min_p": 0.0625, "filter_order": "hf"},
    {"top_k": 50, "top_p": 0.75, "min_p": 0.0625, "filter_order": "joint"},
    {"temperature": 0.5},
    {"temperature": 0.0},
    {"temperature": 1.5, "top_p": 0.99, "alpha": 0.5},
)


def logits(case: int, vocab_size: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three roles' logits [1, V], whole numbers over a power of two: exact in every dtype."""
    token = torch.arange(1, vocab_size + 1)
    roles = []
    for r in range(3):
        word = (token * (2654435761 + 2 * r) + 40503 * case * (r + 1)) & 0xFFFFFFFF
        roles.append((((word >> 22) - 512).float() / 2 ** (shift + (r > 0)))[None])
    return roles[0], roles[1], roles[2]


def params_of(entry: dict[str, Any]) -> ptk.RowParams:
    return ptk.RowParams.make(1, seed=entry["seed"], position=entry["position"], **entry["params"])


def edits_of(entry: dict[str, Any]) -> ptk.Edits | None:
    """Of a case from 180 on, half of the first 200 tokens."""
    vocab_size, case = entry["vocab_size"], entry["case"]
    if case < 180:
        return None
    ids = torch.arange(case % 2, 200, 2)[None]
    return ptk.Edits.make(
        torch.where(ids < vocab_size, ids, -1),
        counts=ids % 5 // 2,
        in_prompt=ids % 3 == 0,
        bias=(ids % 7 - 3) / 4,
        repetition_penalty=1.25,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
    )


def _entry(case: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "case": case,
        "vocab_size": WIDTHS[case % len(WIDTHS)],
        "shift": 5 + case % 4,
        "seed": SEEDS[case % len(SEEDS)],
        "position": POSITIONS[case // 3 % len(POSITIONS)],
        "stream": "draft" if case % 11 == 10 else "sample",
        "params": FILTERS[case % len(FILTERS)],
    }
    params = params_of(entry)
    roles = logits(case, entry["vocab_size"], entry["shift"])
    x = reference.combine(*roles, params.alpha, edits=edits_of(entry))
    out = reference.sample(x, params, entry["stream"])
    return entry | {"token_id": int(out.token_ids), "num_kept": int(out.num_kept)}


def write() -> None:
    """Write the file again."""
    entries = ",\n  ".join(json.dumps(_entry(case)) for case in range(200))
    PATH.write_text(f'{{"note": {json.dumps(NOTE)},\n "draws": [\n  {entries}\n]}}\n')


if __name__ == "__main__":
    write()
