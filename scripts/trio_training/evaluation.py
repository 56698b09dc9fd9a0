"""Exact match and answer likelihood of a model, or of three combined, on word problems."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from .arithmetic import Problem, stated_answer
from .batches import END_ID, IGNORE, answer_pair, padded_batch

MAX_ANSWER_TOKENS = 24  # the longest right answer takes 18, its end included
LIKELIHOOD_ROWS = 50  # problems per forward; bounds memory


@dataclass(frozen=True)
class Method:
    """Whose logits answer: one model's, or base + alpha * (expert - anti).

    Args:
        name: shown in tables.
        roles: one model's name, or `("base", "expert", "anti")`.
        alpha: strength of the steering; unused with one model.
    """

    name: str
    roles: tuple[str, ...]
    alpha: float = 0.0

    def combine(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the logits this method samples from; `logits` is in the order of `roles`."""
        if len(logits) == 1:
            return logits[0]
        base, expert, anti = logits
        return base + self.alpha * (expert - anti)


METHODS = (
    *(Method(name, (name,)) for name in ("base", "anti", "expert", "direct")),
    *(Method(f"proxy, alpha {a:g}", ("base", "expert", "anti"), a) for a in (0, 0.25, 0.5, 1, 1.5)),
)


@torch.inference_mode()
def answer_nll(
    method: Method,
    models: Mapping[str, LlamaForCausalLM],
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
) -> float:
    """Return the mean negative log-likelihood per answer token, the end token included, in nats."""
    total, count = 0.0, 0
    for at in range(0, len(problems), LIKELIHOOD_ROWS):
        inputs, labels = padded_batch(
            [answer_pair(tokenizer, p) for p in problems[at : at + LIKELIHOOD_ROWS]]
        )
        scored = labels != IGNORE
        logits = [models[r](input_ids=inputs, use_cache=False).logits[scored] for r in method.roles]
        total += F.cross_entropy(method.combine(logits), labels[scored], reduction="sum").item()
        count += int(scored.sum())
    return total / count


@torch.inference_mode()
def greedy_answers(
    method: Method,
    models: Mapping[str, LlamaForCausalLM],
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
) -> list[str]:
    """Return each problem's greedy continuation, decoded, without the end token."""
    by_length = defaultdict(list)  # prompts of one length share a batch: no padding, no mask
    for index, item in enumerate(problems):
        prompt = tokenizer.encode(item.prompt).ids
        by_length[len(prompt)].append((index, prompt))
    answers = [""] * len(problems)
    for group in by_length.values():
        fed = torch.tensor([prompt for _, prompt in group])
        caches: list[Any] = [None] * len(method.roles)
        drawn = []
        for _ in range(MAX_ANSWER_TOKENS):
            logits = []
            for at, role in enumerate(method.roles):
                output = models[role](input_ids=fed, past_key_values=caches[at], use_cache=True)
                caches[at] = output.past_key_values
                logits.append(output.logits[:, -1])
            fed = method.combine(logits).argmax(-1, keepdim=True)
            drawn.append(fed)
            if (torch.cat(drawn, dim=1) == END_ID).any(1).all():
                break
        for (index, _), row in zip(group, torch.cat(drawn, dim=1).tolist(), strict=True):
            token_ids = row[: row.index(END_ID)] if END_ID in row else row
            answers[index] = tokenizer.decode(token_ids)
    return answers


def exact_match(answers: Sequence[str], problems: Sequence[Problem]) -> float:
    """Return the share of answers whose number after `####` is the right one, 0 to 1."""
    right = sum(
        stated_answer(answer) == item.value for answer, item in zip(answers, problems, strict=True)
    )
    return right / len(problems)


@torch.inference_mode()
def text_nll(model: LlamaForCausalLM, token_ids: torch.Tensor, window: int) -> float:
    """Return the mean negative log-likelihood per token in nats, of a text [N] cut into windows."""
    count = (len(token_ids) - 1) // window
    inputs = token_ids[: count * window].view(count, window)
    labels = token_ids[1 : count * window + 1].view(count, window)
    losses = []
    for x, y in zip(inputs.split(8), labels.split(8), strict=True):
        logits = model(input_ids=x, use_cache=False).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item())
    return math.fsum(losses) / labels.numel()
