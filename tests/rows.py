"""Rows of logits of the kinds that decide which way a kernel goes.

Real vocabularies' likely tokens lie together: a tokenizer gives low ids to what is frequent. Noise
that is independent of the id, as in most tests, never shows what that does to tiles of ids.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.samplers import Logits, make_logits

PROMPT = "12 + 30 = 42\n7 + 5 = 12\nReverse of abc is cba\n"


def _alone(base: Tensor) -> Logits:
    """With a pair that changes nothing."""
    return base, torch.zeros_like(base), torch.zeros_like(base)


def _normal(deviation: float) -> Callable[[int, int, int], Logits]:
    def make(rows: int, vocab_size: int, seed: int) -> Logits:
        noise = np.random.default_rng(seed).standard_normal((rows, vocab_size), dtype=np.float32)
        return _alone(torch.from_numpy(noise * deviation))

    return make


def _peaked(rows: int, vocab_size: int, seed: int) -> Logits:
    return make_logits("peaked", rows, vocab_size, torch.float32, seed)


def _together(rows: int, vocab_size: int, seed: int) -> Logits:
    """Peaked, and the r-th likeliest token has an id of about r: within a factor of four."""
    roles = _peaked(rows, vocab_size, seed)
    spread = 1 + 3 * np.random.default_rng(seed).random((rows, vocab_size))
    place = torch.from_numpy((np.arange(vocab_size) * spread).argsort(-1, kind="stable"))
    order = roles[0].argsort(dim=-1, descending=True, stable=True).gather(1, place)
    base, expert, anti = (role.gather(1, order) for role in roles)
    return base, expert, anti


def _infinite(rows: int, vocab_size: int, seed: int) -> Logits:
    """Peaked, with three tokens of +inf."""
    base, expert, anti = _peaked(rows, vocab_size, seed)
    base[:, [vocab_size // 9, vocab_size // 3, vocab_size - 1]] = torch.inf
    return base, expert, anti


def _constant(rows: int, vocab_size: int, seed: int) -> Logits:
    return _alone(torch.full((rows, vocab_size), 1.5))


KINDS: dict[str, Callable[[int, int, int], Logits]] = {
    "peaked": _peaked,
    "together": _together,
    "middling": _normal(2.5),
    "flat": _normal(0.5),
    "infinite": _infinite,
    "constant": _constant,
}
"""By name, of rows, vocab_size, seed. Peaked and together: like a real trio's (benchmarks.harness.
samplers), independent of the id or not. Middling, flat: normal, standard deviations 2.5 and .5."""


def make(kind: str, rows: int, vocab_size: int, dtype: torch.dtype, seed: int = 0) -> Logits:
    """Base, expert and anti of a kind of :data:`KINDS`, [rows, vocab_size] each."""
    base, expert, anti = (role.to(dtype) for role in KINDS[kind](rows, vocab_size, seed))
    return base, expert, anti


def shipped(positions: int = 16) -> Logits:
    """The shipped trio's logits at the last positions of a prompt, [positions, V]: V is small."""
    import proxytune_kernels as ptk

    trio = ptk.load_trio("shipped")
    ids = torch.tensor([trio.tokenizer.encode(PROMPT)])
    with torch.no_grad():
        base, expert, anti = (
            trio.models[role](ids, use_cache=False).logits[0, -positions:, : trio.vocab_size]
            for role in ("base", "expert", "anti")
        )
    return base, expert, anti
