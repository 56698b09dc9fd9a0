"""The tokenizer, and training batches of token ids with their labels."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .arithmetic import Problem, problem, statement

END_OF_TEXT = "<|endoftext|>"
END_ID = 0
IGNORE = -100  # label of a position that carries no loss (torch's cross_entropy default)
STATEMENTS_PER_DOCUMENT = 30
STATEMENTS_PER_REHEARSAL = 6  # about as many tokens as a word problem

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


def padded_batch(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Return (given, scored) token ids as a right-padded batch whose labels cover the scored alone.

    The padding needs no attention mask: it stands after all that is scored.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
    inputs = torch.full((len(pairs), length), END_ID)
    labels = torch.full((len(pairs), length), IGNORE)
    for row, (prompt, answer) in enumerate(pairs):
        token_ids = torch.tensor(prompt + answer)
        inputs[row, : len(token_ids) - 1] = token_ids[:-1]
        labels[row, len(prompt) - 1 : len(token_ids) - 1] = token_ids[len(prompt) :]
    return inputs, labels


def answer_pair(tokenizer: Tokenizer, item: Problem) -> tuple[list[int], list[int]]:
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
        yield padded_batch(pairs)
