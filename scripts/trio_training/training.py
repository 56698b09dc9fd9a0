"""The tokenizer, the batches, and models trained on them, the same bit for bit each time."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.evaluation import IGNORED, Pair, answer_logits, padded_batch
from scripts.trio_training.arithmetic import Problem, problem, statement
from scripts.trio_training.recipe import MAX_POSITIONS, Schedule, Shape

END_OF_TEXT = "<|endoftext|>"
END_ID = 0
STATEMENTS_PER_DOCUMENT = 30
STATEMENTS_PER_REHEARSAL = 6  # about as many tokens as a word problem
FINAL_LR_SHARE = 0.05
WEIGHT_DECAY = 0.05
SMOOTHED_STEPS = 50  # the recorded loss is a mean over the last steps of a phase

Batch = tuple[torch.Tensor, torch.Tensor]  # input ids and labels, int64 [rows, length] each


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose digits are tokens of their own and whose id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def statement_documents(count: int, seed: int) -> list[str]:
    """Return documents of plain arithmetic statements, one statement a line."""
    rng = random.Random(seed)
    return ["".join(statement(rng) for _ in range(STATEMENTS_PER_DOCUMENT)) for _ in range(count)]


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> torch.Tensor:
    """Return all documents as one row of token ids, int64 [N], each ended by `END_ID`."""
    encodings = tokenizer.encode_batch(list(documents))
    return torch.tensor([token for e in encodings for token in [*e.ids, END_ID]])


def window_batches(
    streams: Sequence[tuple[torch.Tensor, int]], length: int, seed: int
) -> Iterator[Batch]:
    """Yield endless next-token batches of random windows.

    Args:
        streams: token ids [N] and how many rows of each batch are cut from them.
        length: tokens per row; every stream holds more than `length + 1`.
        seed: of the windows' starts.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = [
            token_ids[start : start + length + 1]
            for token_ids, count in streams
            for start in torch.randint(
                len(token_ids) - length, (count,), generator=generator
            ).tolist()
        ]
        stacked = torch.stack(rows)
        yield stacked[:, :-1], stacked[:, 1:]


def answer_pair(tokenizer: Tokenizer, item: Problem) -> Pair:
    """Return a problem's prompt, which is given, and its answer with the end, which is scored."""
    return tokenizer.encode(item.prompt).ids, [*tokenizer.encode(item.answer).ids, END_ID]


def tuning_batches(
    tokenizer: Tokenizer, rows: int, statement_rows: int, seed: int
) -> Iterator[Batch]:
    """Yield endless batches of word problems, none with a held-out pair of operands.

    Args:
        rows: rows per batch.
        statement_rows: rows of these that hold plain statements, of any pair, all of them scored:
            without them, tuning overwrites the sums that only pretraining has shown.
        seed: of problems and statements.
    """
    rng = random.Random(seed)
    while True:
        pairs = [answer_pair(tokenizer, problem(rng)) for _ in range(rows - statement_rows)]
        for _ in range(statement_rows):
            lines = "".join(statement(rng) for _ in range(STATEMENTS_PER_REHEARSAL))
            pairs.append(([END_ID], tokenizer.encode(lines).ids))
        yield padded_batch(pairs, END_ID)


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
    return F.cross_entropy(answer_logits(model, inputs, labels), labels[labels != IGNORED])


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


@torch.no_grad()
def round_to_bf16(model: LlamaForCausalLM) -> None:
    """Round the weights to what bf16 storage holds, so that what is measured is what ships."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))


def save(model: LlamaForCausalLM, directory: Path) -> None:
    """Write config and bf16 safetensors; the model in memory stays fp32."""
    copy.deepcopy(model).bfloat16().save_pretrained(directory)


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
