"""docs/engine_step.cpp, the step to copy: its tokens and drafts are those of the operators."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import proxytune_kernels as ptk
from tests.capi.conftest import CPP, ROOT, link, run
from tests.documents import examples

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

VOCAB_SIZE, END, DRAFTS = 1000, 831, 3
# Parameters, the prompt's last token, the longest output: as the program has them.
REQUESTS: tuple[tuple[dict[str, Any], int, int], ...] = (
    ({"alpha": 1.0, "temperature": 0.7, "top_p": 0.9, "seed": 7}, 11, 24),
    ({"alpha": 0.5, "temperature": 1.0, "top_k": 2, "seed": -1}, 12, 9),
    ({"alpha": 0.0, "temperature": 0.0}, 13, 16),
    ({"alpha": 1.5, "temperature": 1.2, "min_p": 0.4, "seed": 1}, 14, 20),
    ({"alpha": -1.0, "temperature": 0.9, "seed": 2}, 15, 5),
)


def noise(key: int, last: int) -> np.ndarray:
    """The program's: a hash of 32 bits, its upper ten as a multiple of 1/64."""
    mixed = (key * 0x9E3779B9 ^ last * 0x85EBCA6B) & 0xFFFFFFFF
    h = np.arange(VOCAB_SIZE, dtype=np.uint64) * 0xC2B2AE35 ^ mixed
    h &= 0xFFFFFFFF
    for factor, shift in ((0x2C1B3C6D, 15), (0x297A2D39, 12)):
        h = (h ^ h >> shift) * factor & 0xFFFFFFFF
    h ^= h >> 15
    return ((h >> 22).astype(np.int64) - 512) / 64


def logits(last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    base, expert, anti = (noise(1 + role, last) / 4 for role in range(3))
    shared = 4 * noise(0, last)

    def row(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).float()[None]

    return row(base + shared), row(expert + shared), row(anti)


def tokens(parameters: dict[str, Any], last: int, most: int) -> list[int]:
    """One request alone, token by token."""
    output: list[int] = []
    while len(output) < most and (not output or output[-1] != END):
        drawn = ptk.sample(*logits(last), position=len(output), **parameters)
        last = int(drawn.token_ids)
        output.append(last)
    return output


def kept(parameters: dict[str, Any], last: int, output: list[int]) -> tuple[int, int]:
    """Drafts that agree with a request's output, and all, in rounds of DRAFTS."""
    agreed = drafted = place = 0
    steering = {name: value for name, value in parameters.items() if name != "alpha"}
    while place < len(output):
        drafted += DRAFTS
        context, run_length = (output[place - 1] if place else last), 0
        # Where the output ends, the program's target goes on: so does what it drafts against.
        for i in range(DRAFTS):
            draft = ptk.sample(logits(context)[1], position=place + i, **steering)
            target = ptk.sample(*logits(context), position=place + i, **parameters)
            context = int(draft.token_ids)
            if context != int(target.token_ids):
                break
            run_length += 1
        agreed += run_length
        place += run_length + 1
    return agreed, drafted


@pytest.fixture(scope="module")
def program(library: Path) -> Path:
    return link(library, ROOT / "docs" / "engine_step.cpp", "engine_step", [*CPP, "-O1"])


@pytest.mark.parametrize("threads", ["1", "2", "7"])
def test_the_step_gives_the_operators_tokens(program, threads):
    lines = run([program, threads]).splitlines()
    told = [[int(token) for token in line.split(":")[1].split()] for line in lines[:-1]]
    assert told == [tokens(*request) for request in REQUESTS]
    assert any(len(output) < most for output, (_, _, most) in zip(told, REQUESTS, strict=True))
    each = [kept(p, last, out) for (p, last, _), out in zip(REQUESTS, told, strict=True)]
    agreed, drafted = (sum(counts) for counts in zip(*each, strict=True))
    assert lines[-1] == f"speculation: the same tokens, {agreed} of {drafted} drafts kept"
    assert 0 < agreed < drafted


@pytest.mark.slow
def test_it_builds_as_documented(tmp_path):
    [commands] = examples("docs/engine_step.md", "sh")
    commands = commands.replace("-O3", "-O0")  # in a third of the time
    for name in ("csrc", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert "drafts kept" in run(["bash", "-ec", f"cd {tmp_path}\n{commands}"])
