"""Build the Llama models, train them deterministically, store them as bf16 safetensors."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from transformers import LlamaConfig, LlamaForCausalLM

from .batches import END_ID, IGNORE, Batch
from .recipe import MAX_POSITIONS, Schedule, Shape

FINAL_LR_SHARE = 0.05
WEIGHT_DECAY = 0.05
SMOOTHED_STEPS = 50  # the recorded loss is a mean over the last steps of a phase


@dataclass(frozen=True)
class Phase:
    """What one training phase did, for the record."""

    steps: int
    tokens: int
    final_loss: float
    seconds: float


def make_deterministic() -> None:
    """Restrict torch to one thread and to algorithms that repeat bit for bit."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def build(shape: Shape, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """Return a freshly initialised fp32 Llama with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Return the mean negative log-likelihood (nats, 0-d fp32) over the labelled positions."""
    inputs, labels = batch
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    scored = labels != IGNORE
    return F.cross_entropy(model.lm_head(hidden[scored]), labels[scored])


def train(
    model: LlamaForCausalLM,
    batches: Iterator[Batch],
    schedule: Schedule,
    progress: Progress,
    label: str,
) -> Phase:
    """Train a model in place: AdamW, linear warm-up, cosine decay, gradients clipped to norm 1."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    scales = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": scales, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak_lr, betas=(0.9, 0.95), fused=True)

    def lr_share(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        decay = FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine
        return min(1.0, (step + 1) / schedule.warmup) * decay

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_share)
    model.train()
    task = progress.add_task(label, total=schedule.steps)
    start, tokens, losses = time.perf_counter(), 0, []
    for _ in range(schedule.steps):
        batch = next(batches)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        losses.append(loss.item())
        tokens += batch[0].numel()
        progress.update(task, advance=1, description=f"{label}, loss {losses[-1]:.2f}")
    model.eval()
    last = losses[-SMOOTHED_STEPS:]
    return Phase(schedule.steps, tokens, sum(last) / len(last), time.perf_counter() - start)


def tuned_copy(
    model: LlamaForCausalLM,
    batches: Iterator[Batch],
    schedule: Schedule,
    progress: Progress,
    label: str,
) -> tuple[LlamaForCausalLM, Phase]:
    """Train a copy of a model and leave the model itself as it is."""
    tuned = copy.deepcopy(model)
    return tuned, train(tuned, batches, schedule, progress, label)


@torch.no_grad()
def round_to_bf16(model: LlamaForCausalLM) -> None:
    """Round the weights to what bf16 storage holds, so that what is measured is what ships."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))


def save(model: LlamaForCausalLM, directory: Path) -> None:
    """Write config and bf16 safetensors; the model in memory stays fp32."""
    copy.deepcopy(model).bfloat16().save_pretrained(directory)
