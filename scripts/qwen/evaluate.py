"""Measure a trio on held-out word problems: answer NLL, and exact match of greedy completions.

On plain transformers, with nothing of this package, so that the figures are a yardstick for the
decoder and do not depend on it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from scripts.qwen.lora import IGNORED, RECORD, Settings, answer_logits, encode
from scripts.qwen.problems import Problem, held_out, stated_answer

BATCH = 16  # problems forwarded together

Weights = Mapping[str, float]  # role -> factor of its logits
Advance = Callable[[str, int, int], None]  # what, done, total


def mixtures(alphas: Sequence[float]) -> dict[str, Weights]:
    """The distributions to measure: base, expert, and base + alpha * (expert - anti)."""
    alone: dict[str, Weights] = {"base": {"base": 1.0}, "expert": {"expert": 1.0}}
    proxies = {f"proxy, alpha {a:g}": {"base": 1.0, "expert": a, "anti": -a} for a in alphas}
    return {**alone, **proxies}


def evaluate_trio(
    directory: Path, count: int, alphas: Sequence[float], max_tokens: int, advance: Advance
) -> dict[str, Any]:
    """Measure the trio in `directory` on `count` problems it was not trained on.

    Returns what was measured on, and per mixture: `nll` (nats per answer token), `exact_match`
    (share of completions whose `#### N` is right), `stated` (share that say `#### N` at all).
    """
    tokenizer = AutoTokenizer.from_pretrained(directory / "base")
    models = {
        role: AutoModelForCausalLM.from_pretrained(directory / role, dtype=torch.bfloat16).eval()
        for role in ("base", "expert", "anti")
    }
    problems = held_out(count, trained_on=_trained_on(directory))
    names = mixtures(alphas)
    started = time.perf_counter()
    nlls, tokens = answer_nll(models, tokenizer, problems, names, advance)
    results = {}
    for name, weights in names.items():
        texts = []
        for done in range(0, count, BATCH):
            advance(f"completions, {name}", done, count)
            prompts = [p.prompt for p in problems[done : done + BATCH]]
            texts += complete(models, tokenizer, prompts, weights, max_tokens)
        answers = [stated_answer(text) for text in texts]
        right = sum(a == p.answer for a, p in zip(answers, problems, strict=True))
        stated = sum(a is not None for a in answers)
        results[name] = {
            "nll": nlls[name],
            "exact_match": right / count,
            "stated": stated / count,
            "first_completion": texts[0],
        }
    return {
        "problems": count,
        "answer_tokens": tokens,
        "max_tokens": max_tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "results": results,
    }


@torch.inference_mode()
def answer_nll(
    models: Mapping[str, torch.nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    names: Mapping[str, Weights],
    advance: Advance,
) -> tuple[dict[str, float], int]:
    """The mean negative log-likelihood, in nats, of the answers' tokens, and how many they are."""
    sums = dict.fromkeys(names, 0.0)
    tokens = 0
    for done in range(0, len(problems), BATCH):
        advance("answer NLL", done, len(problems))
        input_ids, labels = encode(tokenizer, problems[done : done + BATCH])
        targets = labels[labels != IGNORED]
        logits = {role: answer_logits(model, input_ids, labels) for role, model in models.items()}
        for name, weights in names.items():
            mixed = mix(logits, weights)
            sums[name] += cross_entropy(mixed, targets, reduction="sum").item()
        tokens += len(targets)
    return {name: total / tokens for name, total in sums.items()}, tokens


def mix(logits: Mapping[str, torch.Tensor], weights: Weights) -> torch.Tensor:
    """The sum of fp32 logits, each times its role's weight."""
    return torch.stack([factor * logits[role] for role, factor in weights.items()]).sum(0)


@torch.inference_mode()
def complete(
    models: Mapping[str, torch.nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    weights: Weights,
    max_tokens: int,
) -> list[str]:
    """Greedy completions of prompts, padded on the left to one length, without special tokens."""
    eos = tokenizer.eos_token_id
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    ids, mask = encoded.input_ids, encoded.attention_mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches: dict[str, Any] = dict.fromkeys(weights)
    tokens: list[torch.Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    while len(tokens) < max_tokens and not ended.all():
        logits = {}
        for role in weights:
            output = models[role](
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=caches[role],
                use_cache=True,
                logits_to_keep=1,
            )
            caches[role] = output.past_key_values
            logits[role] = output.logits[:, -1].float()
        token = torch.where(ended, eos, mix(logits, weights).argmax(-1))
        ended |= token == eos
        tokens.append(token)
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return tokenizer.batch_decode(torch.stack(tokens, dim=1), skip_special_tokens=True)


def print_report(report: Mapping[str, Any]) -> None:
    """Print what `evaluate_trio` returned as a table."""
    table = Table(
        title=f"{report['problems']} held-out problems, {report['answer_tokens']} answer tokens"
    )
    for column in ("", "answer NLL", "exact match", "says #### N"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in report["results"].items():
        table.add_row(
            name, f"{row['nll']:.3f}", f"{row['exact_match']:.1%}", f"{row['stated']:.1%}"
        )
    Console().print(table)


def _trained_on(directory: Path) -> list[Problem]:
    record = json.loads((directory / "expert" / RECORD).read_text())
    return Settings(**record["settings"]).problems
