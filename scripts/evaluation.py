"""How well models answer: the likelihood of answers, and greedy ones, by one model or three mixed.

By transformers' own models and caches, so that the figures are a yardstick for the decoder and do
not depend on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from proxytune_kernels.decoder.model import Forward
from proxytune_kernels.integrations.hf.inputs import left_padded, positions

IGNORED = -100  # the label of a position that does not count in the loss, as cross_entropy wants it

Pair = tuple[list[int], list[int]]  # token ids: a prompt, which is given, and an answer
Weights = Mapping[str, float]  # model's name -> factor of its logits
Models = Mapping[str, Any]  # name -> transformers causal LM


def mixtures(alone: Sequence[str], alphas: Sequence[float]) -> dict[str, Weights]:
    """The distributions to measure: models alone, and base + alpha * (expert - anti)."""
    proxies = {f"proxy, alpha {a:g}": {"base": 1.0, "expert": a, "anti": -a} for a in alphas}
    return {**{name: {name: 1.0} for name in alone}, **proxies}


def mix(logits: Mapping[str, Tensor], weights: Weights) -> Tensor:
    """The sum of fp32 logits, each times its model's weight."""
    return torch.stack([factor * logits[name] for name, factor in weights.items()]).sum(0)


def padded_batch(pairs: Sequence[Pair], end: int) -> tuple[Tensor, Tensor]:
    """Prompts and answers for teacher forcing, padded on the right with the token ``end``.

    Returns `input_ids` and `labels`, both int64 [B, L]: `labels[b, i]` is the token that follows
    `input_ids[b, i]` where that is part of the answer, and IGNORED in the prompt and the padding. A
    causal model needs no mask for padding on the right.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
    input_ids = torch.full((len(pairs), length), end)
    labels = torch.full((len(pairs), length), IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        last = len(prompt) + len(answer) - 1
        input_ids[row, :last] = torch.tensor([*prompt, *answer][:-1])
        labels[row, len(prompt) - 1 : last] = torch.tensor(answer)
    return input_ids, labels


def answer_logits(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The fp32 logits [N, V] of a transformers causal model at the N positions that have a label.

    Only those rows meet the output layer: the whole [B, L, V] would be hundreds of megabytes.
    """
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden[labels != IGNORED])
    return logits.float()


@torch.inference_mode()
def answer_nll(
    models: Models, names: Mapping[str, Weights], pairs: Sequence[Pair], end: int, rows: int
) -> dict[str, float]:
    """The mean negative log-likelihood of an answer's token in nats, by mixture.

    Args:
        models: those that the mixtures name.
        names: mixture -> weights.
        pairs: prompts and answers.
        end: the token that pads.
        rows: pairs that are forwarded together.
    """
    sums = dict.fromkeys(names, 0.0)
    for first in range(0, len(pairs), rows):
        input_ids, labels = padded_batch(pairs[first : first + rows], end)
        logits = {name: answer_logits(model, input_ids, labels) for name, model in models.items()}
        targets = labels[labels != IGNORED]
        for name, weights in names.items():
            sums[name] += cross_entropy(mix(logits, weights), targets, reduction="sum").item()
    count = sum(len(answer) for _, answer in pairs)
    return {name: total / count for name, total in sums.items()}


@torch.inference_mode()
def complete(
    models: Models, weights: Weights, prompts: Sequence[list[int]], end: int, max_tokens: int
) -> list[list[int]]:
    """Greedy completions of prompts, padded on the left to one length; without the ``end``."""
    ids, mask = left_padded(prompts, end)
    caches = {name: DynamicCache(config=models[name].config) for name in weights}
    tokens: list[Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    while len(tokens) < max_tokens and not ended.all():
        places = positions(mask)[:, -ids.shape[1] :]
        logits = {}
        for name, cache in caches.items():
            forward = Forward(models[name])
            x = forward(ids, keep=1, cache=cache, attention_mask=mask, position_ids=places)
            logits[name] = x[:, -1].float()
        token = torch.where(ended, end, mix(logits, weights).argmax(-1))
        ended |= token == end
        tokens.append(token)
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    drawn = torch.stack(tokens, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in drawn]


def stated_answer(text: str) -> int | None:
    """The number behind the first `####` of a completion, None where there is none."""
    found = re.search(r"####\s*(-?\d+)", text)
    return int(found[1]) if found else None
