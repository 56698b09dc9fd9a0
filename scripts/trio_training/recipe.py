"""Every size, step count, learning rate and seed of a run, in one place."""

from __future__ import annotations

from dataclasses import dataclass

CONTEXT = 256  # tokens per training window; the position limit in the configs is larger
MAX_POSITIONS = 1024


@dataclass(frozen=True)
class Shape:
    """One Llama model: hidden size, layers, MLP width, heads (head size = hidden / heads)."""

    hidden: int
    layers: int
    mlp: int
    heads: int


@dataclass(frozen=True)
class Schedule:
    """One training phase.

    Args:
        steps: optimizer steps.
        rows: rows per step.
        statement_rows: rows of these with plain arithmetic statements; the rest is text in
            pretraining, sums in words in tuning.
        peak_lr: learning rate after `warmup` steps, before it decays.
        seed: of the phase's batches.
    """

    steps: int
    rows: int
    statement_rows: int
    peak_lr: float
    seed: int
    warmup: int = 50


@dataclass(frozen=True)
class Recipe:
    """One full run of the script.

    Args:
        vocab_size: tokens in the BPE vocabulary, the end-of-text token included.
        sources: which of `text.SOURCES` the documents come from, by package name.
        documents: training documents that are used, None for all of them.
        statement_documents: documents of plain arithmetic statements, for pretraining.
        problems: word problems per evaluation set.
    """

    name: str
    vocab_size: int
    sources: tuple[str, ...]
    documents: int | None
    statement_documents: int
    base: Shape
    anti: Shape
    base_pretraining: Schedule
    anti_pretraining: Schedule
    expert_tuning: Schedule
    direct_tuning: Schedule
    problems: int
    init_seed: int = 0


FULL = Recipe(
    name="full",
    vocab_size=1536,
    sources=("sympy", "networkx", "numpy", "torch"),
    documents=None,
    statement_documents=6000,
    base=Shape(hidden=192, layers=4, mlp=512, heads=3),
    anti=Shape(hidden=64, layers=2, mlp=176, heads=2),
    base_pretraining=Schedule(steps=2000, rows=4, statement_rows=1, peak_lr=2e-3, seed=11),
    anti_pretraining=Schedule(steps=1500, rows=8, statement_rows=2, peak_lr=6e-3, seed=22),
    expert_tuning=Schedule(steps=800, rows=32, statement_rows=16, peak_lr=3e-3, seed=33),
    direct_tuning=Schedule(steps=300, rows=32, statement_rows=16, peak_lr=1e-3, seed=44, warmup=20),
    problems=300,
)

# The same path end to end in seconds: it shows that a run repeats bit for bit, not that it learns.
QUICK = Recipe(
    name="quick",
    vocab_size=512,
    sources=("torch",),
    documents=100,
    statement_documents=100,
    base=Shape(hidden=64, layers=2, mlp=176, heads=2),
    anti=Shape(hidden=32, layers=1, mlp=88, heads=1),
    base_pretraining=Schedule(steps=25, rows=4, statement_rows=1, peak_lr=3e-3, seed=11, warmup=5),
    anti_pretraining=Schedule(steps=25, rows=4, statement_rows=1, peak_lr=6e-3, seed=22, warmup=5),
    expert_tuning=Schedule(steps=20, rows=8, statement_rows=2, peak_lr=3e-3, seed=33, warmup=5),
    direct_tuning=Schedule(steps=20, rows=8, statement_rows=2, peak_lr=1e-3, seed=44, warmup=5),
    problems=2,
)
