"""Which backend is the default on a CUDA device: what was measured fastest for the shape.

Every line is a measurement and names the results file that holds it. Where no line fits, Triton
runs: nothing was measured there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

UNMEASURED = "triton"


class Choice(NamedTuple):
    """What is fastest on a device within a range of shapes."""

    device: str
    """How the driver's name of the device begins: ``NVIDIA H100``."""
    op: str
    vocab_sizes: tuple[int, int]
    """From, to: both included."""
    rows: tuple[int, int]
    """Rows of logits of each role, likewise: requests for ``sample``, requests times positions for
    ``verify``."""
    backend: str
    source: str
    """The measurement: a file in benchmarks/results."""


CHOICES: tuple[Choice, ...] = ()


def choose(
    device: str, op: str, vocab_size: int, rows: int, choices: Sequence[Choice] | None = None
) -> str:
    """The backend of the first line that fits, else :data:`UNMEASURED`.

    Args:
        device: as the driver calls it.
        op: name of the public operator.
        vocab_size: agreed width.
        rows: rows of logits of each role.
        choices: lines to look in; None for :data:`CHOICES`.

    Example:
        >>> line = Choice("NVIDIA H", "sample", (1, 65_536), (1, 8), "cuda", "gpu-h200.jsonl")
        >>> choose("NVIDIA H200", "sample", 32_000, 8, [line])
        'cuda'
        >>> choose("NVIDIA H200", "sample", 32_000, 9, [line])
        'triton'
    """
    for choice in CHOICES if choices is None else choices:
        if (
            device.startswith(choice.device)
            and op == choice.op
            and choice.vocab_sizes[0] <= vocab_size <= choice.vocab_sizes[1]
            and choice.rows[0] <= rows <= choice.rows[1]
        ):
            return choice.backend
    return UNMEASURED
